"""Both towers together under Ray Train, as the last part of `train`: two workers, one of them killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_dataset, write_prepared

from pixrec.artifact import load_model
from pixrec.cluster import joint as module
from pixrec.cluster.joint import _begin
from pixrec.cluster.train import check_ready, train
from pixrec.model.catalog import Catalog

CONFIG = tiny_config(
    model={"user_tower": "compact", "compact": {"dropout": 0.0}},
    train={
        "num_workers": 2,
        "max_failures": 1,
        "max_steps": 1,
        "compact": {"epochs": 1, "learning_rate": 1e-6, "histories_per_step": 4},  # leaves something to learn
        "joint": {
            "epochs": 2,
            "learning_rate": 0.003,
            "item_learning_rate": 0.001,
            "warmup_steps": 0,
            "fresh_items_per_step": 5,
            "micro_batch_items": 2,
            "refresh_every_steps": 2,
        },
    },
)


def killed_once(note: Path, copy: Path) -> Callable[[dict[str, Any]], None]:
    """The work of a worker that keeps a copy of the model it begins with, and dies at the second epoch while the file
    `note` is there."""

    def work(job: dict[str, Any]) -> None:  # defined in here, so that it reaches the workers whole
        from pixrec.cluster import joint

        class Mortal(joint.JointTrainer):
            def train_epoch(self, *args: Any) -> None:
                if self.rank == 0 and not copy.exists():
                    shutil.copytree(job["model"], copy)
                if self.epoch == 1 and self.rank == 1 and note.exists():
                    note.unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                super().train_epoch(*args)

        joint.JointTrainer = Mortal
        joint._worker(job)

    return work


def test_train_ends_with_both_towers_together_where_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
):
    dataset = write_prepared(tmp_path / "data", tiny_dataset(num_events=7))
    note, begun = tmp_path / "note", tmp_path / "begun"
    note.touch()
    monkeypatch.setattr(module, "_worker", killed_once(note, begun))
    rows: list[dict[str, Any]] = []
    data, out = str(tmp_path / "data"), str(tmp_path / "model")
    check_ready(data, out, CONFIG, False)
    info = train(data, out, CONFIG, resume=False, on_row=rows.append)
    assert not note.exists()
    mine = [row for row in rows if row["part"] == "both_compact_joint"]
    assert next(row["epoch"] for row in mine if "epoch" in row) == 0
    assert {"staleness", "age_steps", "fresh_share"} <= set(next(row for row in mine if "loss" in row))
    logged = [json.loads(line) for line in (tmp_path / "model" / "training.jsonl").read_text().splitlines()]
    assert any("table_staleness" in row for row in logged)

    model = load_model(out)
    alone, reference, _ = _begin(str(begun), dataset, CONFIG, "cpu", None)
    figures = alone.fit(dataset.held_out("valid"))
    assert figures["epoch"] > 0, "the towers learned nothing together: this test shows nothing"
    assert info["epoch"] == figures["epoch"]
    assert info["metrics"]["valid_ndcg@10"] == pytest.approx(figures["valid_ndcg@10"])
    before = load_model(str(begun)).tower.state_dict()
    after = model.tower.state_dict()
    assert not torch.allclose(after["item_proj.weight"], before["item_proj.weight"], atol=1e-4)
    for name, weight in reference.tower.state_dict().items():
        torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-4)

    # What `embed` gives are the vectors of the item tower as it is now.
    alone.refresh()
    vectors = model.embedder().items(Catalog(dataset.items, model.encoder), np.arange(len(dataset.items)))
    np.testing.assert_allclose(vectors, alone.item_vectors().numpy(), atol=1e-3)
