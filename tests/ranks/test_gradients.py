"""Two and four processes (gloo, and nccl where there are GPUs) against one on the joined batch: each part of the loss
and every gradient.

Under DDP and FSDP2, with and without GradCache, on a batch that the workers cannot share evenly.
"""

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model
from processes import rank_device, run_ranks

from pixrec.model.catalog import Catalog
from pixrec.model.parallel import whole
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.reading import Collator
from pixrec.training.windows import ShiftedWindows

CASES = {
    "all": {"alpha": 0.3, "beta": 0.4},
    "nig": {"alpha": 0.0, "beta": 0.0},
    "tt": {"alpha": 1.0, "beta": 0.0},
    "ut": {"alpha": 0.0, "beta": 1.0},
    "lora": {"alpha": 0.3, "beta": 0.4},
    "further": {"alpha": 0.3, "beta": -0.4, "symmetric": True, "mask_history": True, "extra_negatives": 4},
}
MODELS = {"lora": {"freeze_vision": True, "lora": {"enabled": True, "rank": 2}}}
WAYS = {
    "ddp": {},
    "fsdp2": {"parallel": "fsdp2"},
    "ddp-gradcache": {"micro_batch_histories": 2},
    "fsdp2-gradcache": {"parallel": "fsdp2", "micro_batch_histories": 2},
}
# On two every part under DDP and FSDP2, GradCache on the mixture and on the further options; on four the latter alone.
RUNS = {
    2: [(way, case) for way in WAYS for case in CASES if "gradcache" not in way or case in ("all", "lora", "further")],
    4: [(way, case) for way in WAYS for case in ("all", "further")],
}
TOLERANCE = 1e-5


def gradients(way: str, case: str) -> dict[str, np.ndarray]:
    """Losses, gradients and new weights of one step, and the figures of a validation; any number of processes."""
    config = tiny_config(
        model=MODELS.get(case, {}),
        train={**CASES[case], **WAYS[way], "modality_dropout": 0.0, "gradient_clip": 1e9, "histories_per_step": 7},
    )
    dataset = tiny_dataset(tiny_items(with_pictures=[0, 1]), num_users=9, num_events=7)  # some workers see no picture
    model = tiny_model(config, dataset.items)
    model.tower.to(rank_device())
    source = ShiftedWindows(dataset.training_histories(), config.model.max_history_items, config.train)
    catalog = Catalog(dataset.items, model.encoder)
    collator = Collator(catalog, dataset.training_counts(), config, source.examples_per_step)
    trainer = InterleavedTrainer(model.tower, source, collator, config)
    row = trainer.train_step()
    found = {n: whole(p.grad).clone() for n, p in trainer.named.items() if p.grad is not None}
    figures = trainer.validate(dataset.held_out("valid"))
    found |= {f"{k}": torch.tensor(v) for k, v in row.items() if k.startswith(("loss", "gradient_norm"))}
    found |= {f"{k}": torch.tensor(v) for k, v in figures.items() if "loss" in k}
    trainer.train_step()  # the state that a step leaves behind takes another one
    assert set(trainer.training_tensors()) >= {f"{n}/exp_avg" for n in trainer.named if n in found}
    return {name: value.cpu().numpy() for name, value in found.items()}


def save_gradients(folder: str) -> None:
    """The work of a rank."""
    size, rank = dist.get_world_size(), dist.get_rank()
    for way, case in RUNS[size]:
        np.savez(f"{folder}/{size}-{way}-{case}-{rank}.npz", **gradients(way, case))


@functools.cache
def alone(case: str) -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    return gradients("ddp", case)


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def joined(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("ranks"))
    run_ranks(folder, *((size, save_gradients) for size in RUNS), backend=request.param)
    return folder


@pytest.mark.parametrize(("size", "way", "case"), [(size, *run) for size, runs in RUNS.items() for run in runs])
def test_many_ranks_equal_one(joined: str, size: int, way: str, case: str):
    single = alone(case)
    for rank in range(size):
        found = np.load(f"{joined}/{size}-{way}-{case}-{rank}.npz")
        for name, expected in single.items():
            if name not in found.files:
                continue  # below
            difference = float(np.linalg.norm(found[name] - expected))
            assert difference <= TOLERANCE * max(float(np.linalg.norm(expected)), 1e-3), (name, difference)
        lacking = set(single) - set(found.files)
        assert all(not np.abs(single[name]).any() for name in lacking), lacking


STEPS = 4


def losses() -> np.ndarray:
    """Losses of some steps with modality dropout, in two passes each; any number of processes."""
    config = tiny_config(
        train={"modality_dropout": 0.3, "histories_per_step": 7, "gradient_accumulation": 2, "learning_rate": 1e-4}
    )
    dataset = tiny_dataset(tiny_items(with_pictures=range(8)), num_users=9, num_events=7)
    model = tiny_model(config, dataset.items)
    model.tower.to(rank_device())
    source = ShiftedWindows(dataset.training_histories(), config.model.max_history_items, config.train)
    collator = Collator(
        Catalog(dataset.items, model.encoder), dataset.training_counts(), config, source.examples_per_step
    )
    trainer = InterleavedTrainer(model.tower, source, collator, config)
    return np.array([trainer.train_step()["loss"] for _ in range(STEPS)])


def save_losses(folder: str) -> None:
    """The work of a rank."""
    np.save(f"{folder}/losses-{dist.get_world_size()}-{dist.get_rank()}.npy", losses())


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_ranks_drop_the_modalities_that_one_does(backend: str, tmp_path_factory: pytest.TempPathFactory):
    """What is left is the order in which floats are summed."""
    folder = str(tmp_path_factory.mktemp("losses"))
    run_ranks(folder, (2, save_losses), backend=backend)
    torch.set_num_threads(1)
    single = losses()
    for rank in range(2):
        np.testing.assert_allclose(np.load(f"{folder}/losses-2-{rank}.npy"), single, rtol=1e-6)
