"""Two gloo processes against one on the joined batch: each loss part and every gradient (DESIGN §3)."""

import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fakes import tiny_config, tiny_dataset, tiny_model

from pixrec.model.catalog import Catalog
from pixrec.training import BatchSource, Collator, Trainer

PARTS = {"all": (0.3, 0.4), "nig": (0.0, 0.0), "tt": (1.0, 0.0), "ut": (0.0, 1.0)}
TOLERANCE = 1e-5


def gradients(part: str, tower: str) -> dict[str, torch.Tensor]:
    """Losses and gradients of one step, whatever the number of processes."""
    alpha, beta = PARTS[part]
    config = tiny_config(
        model={"user_tower": tower, "compact_dropout": 0.0},
        train={"alpha": alpha, "beta": beta, "modality_dropout": 0.0, "gradient_clip": 1e9, "histories_per_step": 7},
    )
    dataset = tiny_dataset(num_users=9, num_events=7)
    model = tiny_model(config, dataset.items)
    source = BatchSource(dataset.training_histories(), config.model.max_history_items, config.train)
    catalog = Catalog(dataset.items, model.encoder)
    collator = Collator(catalog, dataset.training_counts(), config, source.examples_per_step)
    trainer = Trainer(model.tower, source, collator, config)
    row = trainer.train_step()
    found = {n: p.grad.clone() for n, p in model.tower.named_parameters() if p.grad is not None}
    return found | {k: torch.tensor(v) for k, v in row.items() if k.startswith("loss")}


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for tower in ("interleaved", "compact"):
            for part in PARTS if tower == "interleaved" else ("ut",):
                found = gradients(part, tower)
                np.savez(f"{folder}/{tower}-{part}-{rank}.npz", **{k: v.numpy() for k, v in found.items()})
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (port, folder), nprocs=2)
    return folder


@pytest.mark.parametrize(("tower", "part"), [*(("interleaved", part) for part in PARTS), ("compact", "ut")])
def test_two_ranks_equal_one(joined, tower, part):
    torch.set_num_threads(1)
    single = gradients(part, tower)
    ranks = [np.load(f"{joined}/{tower}-{part}-{rank}.npz") for rank in (0, 1)]
    assert set(single) <= set(ranks[0].files)
    for name, expected in single.items():
        scale = max(float(expected.abs().max()), 1e-3)
        for rank in ranks:
            difference = float(np.abs(rank[name] - expected.numpy()).max())
            assert difference <= TOLERANCE * scale, (name, difference, scale)
