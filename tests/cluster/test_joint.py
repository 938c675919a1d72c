"""Both towers together under Ray Train, which ends where one process ends, from the beginning or a checkpoint.

That two processes end where one does is shown in tests/ranks, and of workers of Ray Train in test_compact.py.
"""

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
from pixrec.cluster import train
from pixrec.cluster.workers import run_workers
from pixrec.model.catalog import Catalog
from pixrec.training.phases import begin

CONFIG = tiny_config(
    model={"user_tower": "compact", "compact": {"dropout": 0.0}},
    train={
        "num_workers": 0,
        "compact": {"histories_per_step": 4},
        "joint": {
            "epochs": 2,
            "learning_rate": 0.00005,  # the second epoch brings something too
            "item_learning_rate": 0.00005,
            "warmup_steps": 0,
            "fresh_items_per_step": 5,
            "micro_batch_items": 2,
            "refresh_every_steps": 2,
        },
    },
)


def test_a_worker_ends_where_a_process_without_ray_does(tmp_path: Path, ray_session: None):
    dataset = write_prepared(tmp_path / "data", tiny_dataset(num_events=7))
    before = write_model(tmp_path / "begun", tiny_model(CONFIG)).tower.state_dict()
    rows: list[dict[str, Any]] = []
    job = job_of("joint", tmp_path / "begun", dataset.uri, CONFIG)
    best = run_workers(train._worker, job, str(tmp_path / "work"), CONFIG.train, rows.append)
    assert next(row["epoch"] for row in rows if "epoch" in row) == 0
    assert {"staleness", "age_steps", "fresh_share"} <= set(next(row for row in rows if "loss" in row))
    assert any("table_staleness" in row for row in rows)

    model = load_model(best)
    alone, reference, _ = begin("joint", [dataset.uri], CONFIG, "cpu", start=str(tmp_path / "begun"))
    figures = alone.fit(dataset.held_out("valid"))
    assert figures["epoch"] > 0, "the towers learned nothing together: this test shows nothing"
    assert model.info["epoch"] == figures["epoch"]
    assert model.info["metrics"]["valid_ndcg@10"] == pytest.approx(figures["valid_ndcg@10"])
    after = model.tower.state_dict()
    assert not torch.allclose(after["item_proj.weight"], before["item_proj.weight"], atol=1e-4)
    for name, weight in reference.tower.state_dict().items():
        torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-4)

    # What `embed` gives are the vectors of the item tower as it is now.
    alone.refresh()
    vectors = model.embedder().items(Catalog(dataset.items, model.encoder), np.arange(len(dataset.items)))
    np.testing.assert_allclose(vectors, alone.item_vectors().numpy(), atol=1e-3)


def test_from_a_checkpoint_it_goes_on_as_if_nothing_had_happened(tmp_path: Path, train_here: Callable[..., Any]):
    dataset = write_prepared(tmp_path / "data", tiny_dataset(num_events=7))
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, num_workers=1))
    write_model(tmp_path / "begun", tiny_model(config))
    whole, checkpoints = train_here("joint", str(tmp_path / "begun"), dataset, config)
    resumed, more = train_here("joint", str(tmp_path / "begun"), dataset, config, checkpoints[1])
    assert (len(checkpoints), len(more)) == (3, 1)
    for name, weight in whole.tower.state_dict().items():
        assert torch.equal(resumed.tower.state_dict()[name], weight), name


def test_it_is_the_last_part_of_train(monkeypatch: pytest.MonkeyPatch):
    begun_with, rows = [], []

    def run(worker: Any, job: dict[str, Any], work: str, settings: Any, on_row: Callable[..., None]) -> str:
        begun_with.append(job["start"])
        on_row({"epoch": 0})
        return f"the best of {work}"

    monkeypatch.setattr(train, "run_workers", run)
    monkeypatch.setattr(train, "make_whole", lambda checkpoint: None)
    assert train._fit("both", "data", "work", CONFIG, rows.append) == "the best of work/joint"
    assert begun_with == [None, "the best of work", "the best of work/compact"]
    assert [row["part"] for row in rows] == ["both", "both_compact", "both_compact_joint"]
