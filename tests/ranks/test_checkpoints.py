"""Checkpoints of shards: written by one number of processes, gone on from by another, and made a whole model."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fakes import tiny_config, tiny_dataset, tiny_items, write_prepared
from processes import rank_device, run_ranks
from safetensors.torch import load_file

from pixrec import storage
from pixrec.artifact import load_model
from pixrec.data.sequences import load_dataset
from pixrec.training.checkpoint import make_whole, publish, save_checkpoint
from pixrec.training.phases import begin

MODELS = {"full": {}, "lora": {"lora": {"enabled": True, "rank": 2}}}
BEFORE, AFTER = 2, 3
TRAIN = {"parallel": "fsdp2", "histories_per_step": 6, "modality_dropout": 0.0, "epochs": 9}


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def goes_on(folder: str, name: str, checkpoint: str | None, steps: int) -> None:
    """Train some steps, from a checkpoint where one is given; leaves the losses and a checkpoint of all ranks."""
    rank, size = rank_and_size()
    data = str(Path(folder) / "data")
    config = tiny_config(model=MODELS[name], train=TRAIN)
    trainer, model, _ = begin("interleaved", [data], config, rank_device(), vocabulary=[data], checkpoint=checkpoint)
    losses = [trainer.train_step()["loss"] for _ in range(steps)]
    trainer.validate(load_dataset(data).held_out("valid"))  # a forward pass, after which FSDP keeps weights whole
    made = save_checkpoint(trainer, model, {"valid_ndcg@10": 0.5})
    assert made is not None, "every rank has a part"
    kind = f"{name}-{size}" if checkpoint is None else f"{Path(checkpoint).name}-to-{size}"
    storage.copy_folder(made, str(Path(folder) / kind))  # as Ray Train puts them together
    np.save(f"{folder}/{kind}-losses-{rank}.npy", losses)


def begin_all(folder: str) -> None:
    for name in MODELS:
        goes_on(folder, name, None, BEFORE)


def go_on_all(folder: str) -> None:
    """From what the other number of processes left."""
    for name in MODELS:
        goes_on(folder, name, f"{folder}/{name}-{3 - rank_and_size()[1]}", AFTER)


def undisturbed(folder: str) -> None:
    for name in MODELS:
        goes_on(folder, name, None, BEFORE + AFTER)


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    write_prepared(Path(folder) / "data", tiny_dataset(tiny_items(with_pictures=[0, 1]), num_users=12, num_events=7))
    torch.set_num_threads(1)
    begin_all(folder)  # alone
    run_ranks(folder, (2, begin_all), (2, go_on_all), backend=request.param)
    go_on_all(folder)
    os.makedirs(f"{folder}/whole")
    os.symlink(f"{folder}/data", f"{folder}/whole/data")
    undisturbed(f"{folder}/whole")
    return folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=["1-to-2", "2-to-1"])
def test_another_number_of_ranks_goes_on_as_the_undisturbed_run(runs: str, name: str, sizes: tuple[int, int]):
    before, after = sizes
    expected = np.load(f"{runs}/whole/{name}-1-losses-0.npy")
    for rank in range(before):
        np.testing.assert_allclose(np.load(f"{runs}/{name}-{before}-losses-{rank}.npy"), expected[:BEFORE], rtol=1e-5)
    for rank in range(after):
        found = np.load(f"{runs}/{name}-{before}-to-{after}-losses-{rank}.npy")
        np.testing.assert_allclose(found, expected[BEFORE:], rtol=1e-4)  # Adam turns rounding into steps


@pytest.mark.parametrize("name", MODELS)
def test_no_rank_writes_what_another_has(runs: str, name: str):
    """Two shards of a checkpoint together hold as much as the one of a single process, and none is a pickle."""
    sizes = {}
    for size in (1, 2):
        files = sorted(Path(runs, f"{name}-{size}").rglob("*"))
        shards = [file for file in files if file.parent.name == "shards"]
        assert [file.name.split("-model")[0] for file in shards] == [f"shard-{i + 1:05}" for i in range(size)]
        assert {file.suffix for file in files if file.is_file()} <= {".safetensors", ".json", ".yaml", ".jinja"}
        sizes[size] = [sum(tensor.numel() for tensor in load_file(file).values()) for file in shards]
    assert sum(sizes[2]) == sizes[1][0]
    assert max(sizes[2]) < 0.75 * sizes[1][0]


@pytest.mark.parametrize("name", MODELS)
def test_shards_of_two_ranks_become_a_whole_model(runs: str, name: str, tmp_path: Path):
    models = []
    for kind in (f"{name}-2-to-1", f"{name}-1-to-2"):
        make_whole(f"{runs}/{kind}")
        publish(f"{runs}/{kind}", str(tmp_path / kind), {})
        assert not storage.list_files(str(tmp_path / kind / "shards"))
        models.append(load_model(str(tmp_path / kind)))
    one, two = (model.tower.state_dict() for model in models)
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=1e-3, atol=1e-4)
