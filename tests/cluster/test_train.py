"""Runs that are disturbed end as the undisturbed run would have: killed workers, errors, --resume."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import TINY, tiny_dataset, write_prepared

from pixrec import cli
from pixrec.artifact import load_model, new_model
from pixrec.cluster import train as module
from pixrec.cluster import vision
from pixrec.cluster.train import train
from pixrec.config import Config, dump_config
from pixrec.data.sequences import Dataset
from pixrec.errors import InputError
from pixrec.model.catalog import Catalog
from pixrec.model.vision import find_tokens
from pixrec.training import BatchSource, Collator, Trainer

STEPS, SURVIVED = 8, 1
TIMINGS = {"seconds", "samples_per_second", "tokens_per_second", "data_wait_share", "peak_memory_bytes"}
CONFIG = dataclasses.replace(
    TINY,
    train=dataclasses.replace(
        TINY.train, num_workers=2, epochs=10, max_steps=STEPS, validate_every_steps=2, max_failures=SURVIVED
    ),
)


def sabotaged(notes: Path) -> Callable[[dict[str, Any]], None]:
    """The work of a worker that notes its steps and does what a file `<fault>-<step>-<rank>` of `notes` asks, once.

    `kill` ends the process as a lost machine would, `raise` is an error of its own, `nan` spoils the weights.
    """

    def work(job: dict[str, Any]) -> None:  # defined in here, so that it reaches the workers whole
        from pixrec.cluster import train
        from pixrec.errors import InputError

        class Saboteur(train.Trainer):
            def train_step(self) -> dict[str, float]:
                with open(notes / f"steps-{self.rank}", "a") as file:
                    file.write(f"{self.step}\n")
                faults = ("kill", "raise", "nan")
                kill, error, spoilt = (notes / f"{fault}-{self.step}-{self.rank}" for fault in faults)
                if kill.exists():
                    kill.unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                if error.exists():
                    error.unlink()
                    raise InputError(f"a fault at step {self.step}")
                if spoilt.exists():
                    self.tower.item_proj.weight.data.fill_(float("nan"))
                return super().train_step()

        train.Trainer = Saboteur
        train._worker(job)

    return work


def figures(folder: Path) -> list[dict[str, Any]]:
    """The training log without what differs from run to run."""
    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def test_a_disturbed_run_ends_as_the_undisturbed(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    data, out, hidden = tmp_path / "data", tmp_path / "model", tmp_path / ".model.training"
    write_prepared(data, tiny_dataset(num_users=20))
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))

    def run(*more: str) -> list[str]:
        """The lines on stderr of a run that fails, the summary of one that does not."""
        options = ("--data", str(data), "--out", str(out), "--config", str(tmp_path / "config.yaml"), *more)
        code = cli.main(["train", *options])
        captured = capfd.readouterr()
        assert (code, bool(captured.out)) in ((0, True), (2, False)), captured.err
        return [captured.out] if code == 0 else captured.err.splitlines()

    calm = train(str(data), str(tmp_path / "calm"), CONFIG, resume=False, on_row=lambda row: None)

    # One worker is killed, which the run survives; then all raise, which it does not.
    notes = tmp_path / "notes"
    notes.mkdir()
    for fault in ("kill-5-1", "raise-7-0", "raise-7-1"):
        (notes / fault).touch()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_worker", sabotaged(notes))
        assert run()[-1] == "pixrec train: a fault at step 7"
        assert sorted(os.listdir(notes)) == ["steps-0", "steps-1"], "all faults have struck"
        steps = [int(line) for line in (notes / "steps-1").read_text().split()]
        again = steps[6]
        assert steps == [*range(6), *range(again, STEPS)]
        assert again in (2, 4), "the run went on from a checkpoint"
        assert sorted(os.listdir(tmp_path)) == [".model.training", "calm", "config.yaml", "data", "notes"]

        # The log fails while the last steps are taken: no model yet, but nothing of the training is lost.
        def full(row: dict[str, Any]) -> None:
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            train(str(data), str(out), CONFIG, resume=True, on_row=full)
        resumed_at = int((notes / "steps-1").read_text().split()[len(steps)])
        assert resumed_at in (4, 6)
        assert not out.exists()

    assert "differs from the unfinished run's" in run("--resume", "--set", "train.seed=1")[0]
    write_prepared(tmp_path / "other", tiny_dataset(num_users=21))
    assert "is not the data set" in run("--resume", "--data", str(tmp_path / "other"))[0]
    assert hidden.exists()

    summary = json.loads(run("--resume")[0])
    assert not hidden.exists()
    assert summary["fingerprint"] == calm["fingerprint"] == load_model(str(out)).fingerprint
    assert {key: value for key, value in summary.items() if key != "out"} == calm
    assert figures(out) == figures(tmp_path / "calm")


def test_divergence_ends_the_run_with_the_batch_kept_and_is_not_tried_again(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data, notes = tmp_path / "data", tmp_path / "notes"
    dataset = write_prepared(data, tiny_dataset(num_users=20))
    notes.mkdir()
    for rank in (0, 1):
        (notes / f"nan-3-{rank}").touch()
    monkeypatch.setattr(module, "_worker", sabotaged(notes))
    with pytest.raises(InputError, match=r"the loss is nan at step 4.*learning_rate.*is kept at") as error:
        train(str(data), str(tmp_path / "model"), CONFIG, resume=False, on_row=lambda row: None)
    assert (notes / "steps-0").read_text().split() == ["0", "1", "2", "3"]
    kept = json.loads(Path(str(error.value).rsplit(" ", 1)[1]).read_text())
    assert kept["step"] == 4
    assert kept["histories"]
    assert {item for history in kept["histories"] for item in history} <= set(dataset.items.item_ids)
    assert not (tmp_path / "model").exists()


def test_a_sharded_elastic_run_leaves_a_whole_model(ray_session: None, tmp_path: Path):
    """FSDP2 on as many workers as there is room for, from 1 to 2; what is saved needs neither."""
    write_prepared(tmp_path / "data", tiny_dataset(num_users=20))
    settings = dataclasses.replace(
        CONFIG.train, parallel="fsdp2", num_workers=1, max_workers=2, micro_batch_histories=2, max_steps=3
    )
    config = dataclasses.replace(CONFIG, train=settings)
    rows: list[dict[str, Any]] = []
    info = train(str(tmp_path / "data"), str(tmp_path / "model"), config, resume=False, on_row=rows.append)
    model = load_model(str(tmp_path / "model"))
    assert info["fingerprint"] == model.fingerprint
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


def test_a_frozen_vision_part_works_once_for_each_picture(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ray Data fills the store, a second run finds it, and the model is near the one trained without it."""
    dataset = write_prepared(tmp_path / "data", tiny_dataset())
    settings = dataclasses.replace(CONFIG.train, num_workers=1, max_steps=2)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, freeze_vision=True), train=settings)
    rows: list[dict[str, Any]] = []
    train(str(tmp_path / "data"), str(tmp_path / "model"), config, resume=False, on_row=rows.append)
    model = load_model(str(tmp_path / "model"))
    tokens = find_tokens(str(tmp_path / "data"), config, model.tower.backbone)
    assert tokens is not None
    assert tokens.hold(dataset.items)
    monkeypatch.setattr(vision, "PictureEncoder", None)
    vision.vision_once(str(tmp_path / "data"), config)  # nothing left to do

    trainer, catalog = plain_trainer(dataset, config)
    assert catalog.tokens is None
    losses = [trainer.train_step()["loss"] for _ in range(2)]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=1e-3)


def plain_trainer(dataset: Dataset, config: Config) -> tuple[Trainer, Catalog]:
    model = new_model(config, [dataset.items.text(row) for row in range(len(dataset.items))])
    catalog = Catalog(dataset.items, model.encoder)
    source = BatchSource(dataset.training_histories(), config.model.max_history_items, config.train)
    collator = Collator(catalog, dataset.training_counts(), config, source.examples_per_step)
    return Trainer(model.tower, source, collator, config), catalog
