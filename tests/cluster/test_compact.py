"""The compact tower under Ray Train: two workers end where one process ends, from the beginning or a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import job_of, tiny_config, tiny_dataset, tiny_model, write_model, write_prepared

from pixrec.artifact import load_model
from pixrec.cluster.train import _worker
from pixrec.cluster.workers import run_workers
from pixrec.data.sequences import Dataset
from pixrec.errors import InputError
from pixrec.model.catalog import Catalog
from pixrec.training.phases import begin
from pixrec.training.stages import check_ready

SHAPE = {"dropout": 0.0}  # the workers draw their own
CONFIG = tiny_config(
    model={"user_tower": "compact", "compact": SHAPE},
    train={
        "num_workers": 2,
        "max_workers": 2,  # as an elastic run is asked for
        "compact": {"epochs": 4, "validate_every_epochs": 1, "learning_rate": 0.01, "histories_per_step": 4},
    },
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """With a model beside it whose item tower is trained, so to say, in `base`."""
    write_model(tmp_path / "base", tiny_model(tiny_config(model={"compact": SHAPE})))
    return write_prepared(tmp_path / "data", tiny_dataset(num_events=7))


def test_two_workers_end_where_one_process_does(tmp_path: Path, dataset: Dataset, ray_session: None):
    rows: list[dict[str, Any]] = []
    job = job_of("compact", tmp_path / "base", dataset.uri, CONFIG)
    best = run_workers(_worker, job, str(tmp_path / "work"), CONFIG.train, rows.append)
    model = load_model(best)
    assert model.tower.compact is not None
    assert model.config.model.user_tower == "compact"

    alone, reference, _ = begin("compact", [dataset.uri], CONFIG, "cpu", start=str(tmp_path / "base"))
    figures = alone.fit(dataset.held_out("valid"))
    assert model.info["epoch"] == figures["epoch"]
    assert model.info["metrics"]["valid_ndcg@10"] == pytest.approx(figures["valid_ndcg@10"])
    assert model.embedded_ids == reference.embedded_ids
    for name, weight in reference.tower.compact.state_dict().items():
        torch.testing.assert_close(model.tower.compact.state_dict()[name], weight, rtol=1e-3, atol=1e-4)

    catalog = Catalog(dataset.items, model.encoder)
    vectors = model.embedder().items(catalog, np.arange(len(dataset.items)))
    np.testing.assert_allclose(vectors, alone.item_vectors().numpy(), atol=1e-3)
    assert {row["step"] for row in rows if "loss" in row} >= set(range(1, model.info["step"] + 1))


def test_from_a_checkpoint_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, dataset: Dataset, train_here: Callable[..., Any]
):
    """Whoever dies, the workers begin again at the last checkpoint (a test of `train` kills one)."""
    whole, checkpoints = train_here("compact", str(tmp_path / "base"), dataset, CONFIG)
    assert len(checkpoints) == CONFIG.train.compact.epochs
    resumed, more = train_here("compact", str(tmp_path / "base"), dataset, CONFIG, checkpoints[1])
    assert len(more) == CONFIG.train.compact.epochs - 2
    for name, weight in whole.tower.compact.state_dict().items():
        assert torch.equal(resumed.tower.compact.state_dict()[name], weight), name


TIMED = tiny_config(model={"user_tower": "compact", "compact": {"time": "both", **SHAPE}})


def test_time_is_refused_before_ray_where_timestamps_are_an_order_only(tmp_path: Path, dataset: Dataset):
    with pytest.raises(InputError, match=r"order of the events.*model\.compact\.time to none"):
        check_ready(dataset.uri, str(tmp_path / "out"), TIMED, resume=False)
    check_ready(dataset.uri, str(tmp_path / "out"), CONFIG, resume=False)


def test_what_is_trained_reads_each_event_with_its_time(tmp_path: Path):
    dataset = tiny_dataset(num_events=7)
    moments = np.random.default_rng(0).integers(1, 10**8, len(dataset.events.rows)).cumsum()
    dataset = dataclasses.replace(dataset, events=dataclasses.replace(dataset.events, timestamps=moments))
    dataset = write_prepared(tmp_path / "data", dataset)
    write_model(tmp_path / "base", tiny_model(TIMED))
    trainer = begin("compact", [dataset.uri], TIMED, "cpu", start=str(tmp_path / "base")).trainer
    event_at = {int(moment): int(row) for moment, row in zip(moments, dataset.events.rows, strict=True)}
    windows = [window for batch in trainer.source.epoch(0) for window in batch]
    assert windows
    assert all(event_at[moment] == row for window in windows for row, moment in window.tolist())
