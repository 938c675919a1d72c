"""Both towers trained together by two gloo processes and by one: gradients, figures, the table of item vectors."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fakes import small_encoders, tiny_config, tiny_dataset, tiny_items, tiny_model
from processes import rank_device, run_ranks

from pixrec.model.catalog import Catalog
from pixrec.model.encoders import EncoderTower
from pixrec.training import content
from pixrec.training.content import content_table
from pixrec.training.joint import JointTrainer

LOSSES = ["full", "sampled", "sampled, row by row", "full, of encoders", "full, of encoders with adapters"]
ENCODERS = "encoders.json"
"""Settings of two small encoders, which one process has written for all."""
TOLERANCE = 1e-5
# Five histories and five fresh items: the workers cannot share them evenly.
TRAIN = {"gradient_clip": 1e9, "joint": {"epochs": 1, "fresh_items_per_step": 5, "micro_batch_items": 2}}


def steps(loss: str, folder: str) -> dict[str, np.ndarray]:
    """Gradients of a first step, and what an epoch makes of loss, table and figures; any number of processes."""
    name, _, special = loss.partition(", ")
    moved = {"id_optimizer": "rowwise_adagrad"} if special == "row by row" else {}
    dataset = tiny_dataset(tiny_items(with_pictures=[0, 1]), num_users=9, num_events=7)  # some share has no picture
    encoders = json.loads((Path(folder) / ENCODERS).read_text()) if "encoders" in special else {}
    config = tiny_config(
        model={
            "user_tower": "compact",
            "compact": {"dropout": 0.0},
            "lora": {"enabled": "adapters" in special, "rank": 2},
            **encoders,
        },
        train={**TRAIN, "compact": {"loss": name, "negatives": 6, "histories_per_step": 5, **moved}},
    )
    model = tiny_model(config, dataset.items)
    model.tower.to(rank_device())
    rows = np.arange(len(dataset.items))
    id_rows = np.where(rows < len(model.embedded_ids), rows, -1)
    catalog = Catalog(dataset.items, model.encoder)
    if isinstance(model.tower, EncoderTower):
        with torch.no_grad():
            model.tower.fit(model.tower.item_vectors(catalog.items(rows).to(model.tower.log_temperature.device)))
        model.tower.backbone.tune(config.model, 0)
    counts = dataset.training_counts()
    trainer = JointTrainer(model.tower, catalog, dataset.training_histories(), counts, id_rows, config)
    trainer._step(trainer.source.epoch(0)[0])
    found = {name: p.grad.clone() for name, p in trainer.named.items() if p.grad is not None}
    logged: list[dict[str, float]] = []
    trainer.train_epoch(logged.append)
    found["table"] = trainer.content.clone()
    found["ids"] = trainer.tower.id_embedding.weight.detach().clone()
    figures = trainer.validate(dataset.held_out("valid"))
    found |= {name: torch.tensor(value) for name, value in {**logged[-1], **figures}.items()}
    return {name: value.cpu().numpy() for name, value in found.items()}


def mapped_content(folder: str) -> np.ndarray:
    """The table that all processes write together, in blocks that do not fit their number."""
    os.environ["PIXREC_CACHE"] = folder
    content.MAPPED_FROM, content.ROWS_AT_A_TIME = 1, 3
    config = tiny_config(model={"user_tower": "compact"})
    dataset = tiny_dataset(tiny_items(10), num_users=4)
    model = tiny_model(config, dataset.items)
    return content_table(model, Catalog(dataset.items, model.encoder), config, config.model.embedding_width).numpy()


def save_steps(folder: str) -> None:
    """The work of a rank."""
    np.save(f"{folder}/content-{dist.get_rank()}.npy", mapped_content(f"{folder}/cache"))
    for loss in LOSSES:
        np.savez(f"{folder}/{loss}-{dist.get_rank()}.npz", **steps(loss, folder))


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def joined(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("ranks"))
    (Path(folder) / ENCODERS).write_text(json.dumps(small_encoders(Path(folder))))
    run_ranks(folder, (2, save_steps), backend=request.param)
    return folder


@pytest.mark.parametrize("loss", LOSSES)
def test_two_ranks_equal_one(joined: str, loss: str):
    torch.set_num_threads(1)
    single = steps(loss, joined)
    of_encoders = [name for name in single if name.startswith("backbone.text.")]
    assert np.abs(single[of_encoders[-1] if "encoders" in loss else "item_proj.weight"]).any()
    assert single["staleness"] > 0
    found = [np.load(f"{joined}/{loss}-{rank}.npz") for rank in range(2)]
    np.testing.assert_array_equal(found[0]["table"], found[1]["table"])
    for each in found:
        assert set(each.files) == set(single)
        for name, expected in single.items():
            # An optimiser has moved the table and what is measured on it: Adam turns rounding into steps.
            later = name == "table" or (expected.ndim == 0 and "temperature" not in name)
            limit = 1e-3 if later else TOLERANCE
            difference = float(np.linalg.norm(each[name] - expected))
            assert difference <= limit * max(float(np.linalg.norm(expected)), 1e-3), (name, difference)


def test_two_ranks_write_and_map_one_table(joined: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    for name in ("MAPPED_FROM", "ROWS_AT_A_TIME"):
        monkeypatch.setattr(content, name, getattr(content, name))
    monkeypatch.setenv("PIXREC_CACHE", "")
    alone = mapped_content(str(tmp_path))
    for rank in range(2):
        np.testing.assert_allclose(np.load(f"{joined}/content-{rank}.npy"), alone, atol=1e-6)
