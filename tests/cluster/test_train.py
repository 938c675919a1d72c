"""Runs that are disturbed end where one undisturbed process does: killed workers, errors, --resume; and stages.

Training is set to be sharded (FSDP2): what it leaves is a whole model like any other.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from fakes import TINY, tiny_dataset, tiny_items, write_prepared, write_tokens
from processes import die_once, disturbed

from pixrec import cli
from pixrec.artifact import Model, load_model, new_model
from pixrec.cluster import train as module
from pixrec.cluster.train import train
from pixrec.config import Config, StageConfig, dump_config
from pixrec.console import Console
from pixrec.data.items import ItemTable, load_texts
from pixrec.data.joined import join_datasets
from pixrec.data.sequences import Dataset, load_dataset
from pixrec.errors import InputError
from pixrec.model.catalog import Catalog
from pixrec.model.vision import find_tokens
from pixrec.training import stages
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.reading import Collator
from pixrec.training.stages import check_ready
from pixrec.training.tracking import read_log
from pixrec.training.windows import ShiftedWindows

STEPS = 8
CONFIG = dataclasses.replace(
    TINY,
    train=dataclasses.replace(
        TINY.train,
        num_workers=2,
        parallel="fsdp2",
        epochs=10,
        max_steps=STEPS,
        validate_every_steps=2,
        max_failures=2,
        modality_dropout=0.3,
        feed="ray_data",
    ),
)


def sabotaged(notes: Path) -> Callable[[dict[str, Any]], None]:
    """The work of a worker that notes its steps and does what a file `<fault>-<step>-<rank>` of `notes` asks, once.

    `kill` ends the process as a lost machine would, `nan` spoils the weights.
    """

    def disturb(trainer: Any) -> None:
        with open(notes / f"steps-{trainer.rank}", "a") as file:
            file.write(f"{trainer.step}\n")
        kill, spoilt = (notes / f"{fault}-{trainer.step}-{trainer.rank}" for fault in ("kill", "nan"))
        die_once(kill)
        if spoilt.exists():
            spoilt.unlink()
            trainer.tower.item_proj.weight.data.fill_(float("nan"))

    return disturbed(module, "InterleavedTrainer", "train_step", disturb)


def in_words(code: int, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr of a run that failed by a fault of the user, the summary of one that did not."""
    captured = capfd.readouterr()
    assert (code, bool(captured.out)) in ((0, True), (2, False)), captured.err
    return [captured.out] if code == 0 else captured.err.splitlines()


def test_a_disturbed_run_ends_where_one_process_does(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    data, out, hidden = tmp_path / "data", tmp_path / "model", tmp_path / ".model.training"
    dataset = write_prepared(data, tiny_dataset(num_users=20))
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))

    def run(*more: str) -> list[str]:
        options = ("--data", str(data), "--out", str(out), "--config", str(tmp_path / "config.yaml"), *more)
        return in_words(cli.main(["train", *options]), capfd)

    # One worker is killed, which the run survives; then the loss is no number any more, which would come again.
    notes = tmp_path / "notes"
    notes.mkdir()
    for fault in ("kill-5-1", "nan-7-0", "nan-7-1"):
        (notes / fault).touch()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_worker", sabotaged(notes))
        message = run()[-1]
        assert re.match(r"pixrec train: the loss is nan at step 8.*learning_rate.*is kept at", message)
        assert sorted(os.listdir(notes)) == ["steps-0", "steps-1"], "all faults have struck"
        steps = [int(line) for line in (notes / "steps-1").read_text().split()]
        again = steps[6]
        assert steps == [*range(6), *range(again, STEPS)], "it is not tried again"
        assert again in (2, 4), "the run went on from a checkpoint"
        assert sorted(os.listdir(tmp_path)) == [".model.training", "config.yaml", "data", "notes"]
        kept = json.loads(Path(message.rsplit(" ", 1)[1]).read_text())
        assert kept["step"] == STEPS
        assert kept["histories"]
        assert {item for history in kept["histories"] for item in history} <= set(dataset.items.item_ids)

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

    monkeypatch.setattr("ray.train.torch.TorchTrainer", None)  # nothing is trained any more
    summary = json.loads(run("--resume")[0])
    assert not hidden.exists()
    model, rows = load_model(str(out)), read_log(str(out))
    assert summary["fingerprint"] == model.fingerprint

    alone, _ = plain_trainer(dataset, CONFIG)
    losses, scores, weights = [], {}, {}
    for step in range(1, STEPS + 1):
        losses.append(alone.train_step()["loss"])
        if step % CONFIG.train.validate_every_steps == 0:
            scores[step] = alone.validate(dataset.held_out("valid"))["valid_ndcg@10"]
            weights[step] = copy.deepcopy(alone.tower.state_dict())
    assert losses_of(rows, "both") == pytest.approx(losses, rel=1e-3)
    assert {row["step"]: row["valid_ndcg@10"] for row in rows if "valid_ndcg@10" in row} == pytest.approx(scores)
    assert summary["step"] == max(scores, key=lambda step: (scores[step], step)), "the best is published"
    for name, weight in weights[summary["step"]].items():
        torch.testing.assert_close(model.tower.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def plain_trainer(
    dataset: Dataset, config: Config, model: Model | None = None, *more: Dataset
) -> tuple[InterleavedTrainer, Catalog]:
    data = join_datasets([dataset, *more])
    model = model or new_model(config, [dataset.items.text(row) for row in range(len(dataset.items))])
    catalog = Catalog(data.items, model.encoder)
    source = ShiftedWindows(data.histories, config.model.max_history_items, config.train)
    collator = Collator(catalog, data.counts, config, source.examples_per_step)
    return InterleavedTrainer(model.tower, source, collator, config), catalog


JOINT_STEPS = 2


@pytest.fixture
def two_sets(tmp_path: Path) -> tuple[Dataset, Dataset]:
    """The target and a second, smaller set with other titles under the same item ids."""
    table = tiny_items(8)._table
    circles = ItemTable(table.set_column(1, "title", pa.array([f"Circle {row}" for row in range(len(table))])))
    target = write_prepared(tmp_path / "target", tiny_dataset(num_users=20))
    return target, write_prepared(tmp_path / "circles", tiny_dataset(circles, num_users=6, num_events=5))


def staged(target: Dataset, other: Dataset, **settings: Any) -> Config:
    """A joint stage at a rate of its own, then the target; trained by the driver."""
    joint = StageConfig(name="joint", data=(target.uri, other.uri), max_steps=JOINT_STEPS, learning_rate=5e-3)
    train = dataclasses.replace(CONFIG.train, num_workers=0, parallel="ddp", max_steps=4, stages=(joint,), **settings)
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, freeze_vision=True), train=train)


def losses_of(rows: list[dict[str, Any]], part: str) -> list[float]:
    return [row["loss"] for row in rows if row["part"] == part and "loss" in row]


def test_stages_follow_each_other_and_resume_in_the_right_one(
    ray_session: None,
    tmp_path: Path,
    two_sets: tuple[Dataset, Dataset],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """And a frozen vision part works once for each picture: its stores are asked for before each stage."""
    target, other = two_sets
    config, out, steps = staged(target, other), tmp_path / "model", list[int]()
    (tmp_path / "config.yaml").write_text(dump_config(config))
    model = new_model(config, load_texts(target.uri) + load_texts(other.uri))  # the tokenizer reads both sets
    asked, train_step = list[str](), InterleavedTrainer.train_step

    def noted(trainer: InterleavedTrainer) -> dict[str, float]:
        steps.append(trainer.step)
        return train_step(trainer)

    def store(uri: str, config: Config, vocabulary: list[str]) -> None:
        """What Ray Data does (tests of picture tokens), until the last stage is about to begin."""
        if len(asked) == 2:
            asked.append("")
            raise InputError("the machine is wanted elsewhere")
        asked.append(uri)
        write_tokens(f"{uri}.tokens", model, load_dataset(uri).items)

    def run(*more: str) -> list[str]:
        places = ("--data", target.uri, "--out", str(out), "--config", str(tmp_path / "config.yaml"))
        return in_words(cli.main(["train", *places, *more]), capfd)

    monkeypatch.setattr(module, "frozen_once", store)
    monkeypatch.setattr(InterleavedTrainer, "train_step", noted)
    assert run()[-1] == "pixrec train: the machine is wanted elsewhere"
    info = json.loads(run("--resume")[0])
    assert steps == [0, 1, 0, 1, 2, 3], "the joint stage is not repeated"
    assert asked == [target.uri, other.uri, "", target.uri, other.uri, target.uri]

    assert info["stages"] == [
        {
            "name": "joint",
            "data": [target.uri, other.uri],
            "data_fingerprints": [target.info["fingerprint"], other.info["fingerprint"]],
        }
    ]
    assert info["data"] == target.uri
    assert info["data_fingerprint"] == target.info["fingerprint"]
    assert info["trained_events"] == target.training_counts().sum()

    # The same by hand: one model, two optimisers, no stored pictures.
    rows = read_log(str(out))
    first, catalog = plain_trainer(target, in_stage(config), model, other)
    assert catalog.tokens is None
    assert losses_of(rows, "both_joint") == pytest.approx(
        [first.train_step()["loss"] for _ in range(JOINT_STEPS)], rel=1e-3
    )
    second, _ = plain_trainer(target, config, model)
    assert losses_of(rows, "both") == pytest.approx([second.train_step()["loss"] for _ in range(4)], rel=1e-3)
    validated = [(row["part"], row["step"]) for row in rows if "valid_ndcg@10" in row]
    assert validated == [("both_joint", 2), ("both", 2), ("both", 4)]
    for dataset in two_sets:
        tokens = find_tokens(dataset.uri, config, model.tower.backbone)
        assert tokens is not None
        assert tokens.hold(dataset.items)
    with Console() as console:
        console.training(rows[0] | {"total_steps": 1})
    assert "train both_joint 1/1" in capfd.readouterr().err


def in_stage(config: Config) -> Config:
    return dataclasses.replace(config, train=config.train.of_stage(config.train.stages[0]))


def test_stages_are_checked_before_ray_starts(
    tmp_path: Path, two_sets: tuple[Dataset, Dataset], capfd: pytest.CaptureFixture[str]
):
    target, other = two_sets
    out = str(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    longer = write_prepared(tmp_path / "longer", tiny_dataset(num_users=20, num_events=9))
    twin = write_prepared(tmp_path / "twin", tiny_dataset(num_users=20))
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))

    def refused(stage: dict[str, Any], *more: str) -> str:
        options = [f"train.stages={json.dumps([stage])}", *more]
        overrides = [word for option in options for word in ("--set", option)]
        places = ("--data", target.uri, "--out", out, "--config", str(tmp_path / "config.yaml"))
        code = cli.main(["train", *places, *overrides])
        said = capfd.readouterr()
        assert (code, said.out) == (2, ""), said.err
        return said.err.splitlines()[-1]

    empty, nowhere = str(tmp_path / "empty"), str(tmp_path / "nowhere")
    for place in (empty, nowhere):
        assert f"train.stages a: {place} holds no dataset.json" in refused({"name": "a", "data": [other.uri, place]})
    assert f"{twin.uri} and {target.uri} are the same data set" in refused(
        {"name": "a", "data": [target.uri, twin.uri]}
    )
    leak = refused({"name": "a", "data": [longer.uri]})
    assert leak.startswith(f"pixrec train: train.stages a: 40 training events of {longer.uri} are validation or test")
    elsewhere = ("model.freeze_vision=true", f"train.picture_tokens={tmp_path}/tokens")
    assert "keeps the pictures of one data set" in refused({"name": "a", "data": [other.uri]}, *elsewhere)
    assert "'train.stages[0].epoch'; did you mean 'train.stages[0].epochs'" in refused({"name": "a", "epoch": 1})
    check_ready(target.uri, out, staged(target, other), resume=False)


def test_another_set_in_a_stage_is_no_resumption(tmp_path: Path, two_sets: tuple[Dataset, Dataset]):
    target, other = two_sets
    config, out, hidden = staged(target, other), str(tmp_path / "model"), tmp_path / ".model.training"
    hidden.mkdir()
    (hidden / "config.yaml").write_text(dump_config(config))
    (hidden / "data.json").write_text(json.dumps(stages._data_facts(target, config)))
    check_ready(target.uri, out, config, resume=True)
    write_prepared(tmp_path / "circles", tiny_dataset(num_users=7))
    with pytest.raises(InputError, match=r"the data sets of train\.stages joint are not those of the unfinished run"):
        check_ready(target.uri, out, config, resume=True)


def test_without_workers_the_driver_trains_and_publishes(ray_session: None, tmp_path: Path):
    """Ray Train's local mode (train.num_workers 0): the model of one worker."""
    data = write_prepared(tmp_path / "data", tiny_dataset(num_users=8)).uri
    config = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, num_workers=0, parallel="ddp", max_steps=4)
    )
    rows: list[dict[str, Any]] = []
    info = train(data, str(tmp_path / "model"), config, resume=False, on_row=rows.append)
    assert load_model(str(tmp_path / "model")).fingerprint == info["fingerprint"]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert sorted(os.listdir(tmp_path)) == ["data", "model"]
