"""Users ranked by actors of Ray come out as in one process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import (
    Seen,
    tiny_config,
    tiny_dataset,
    tiny_items,
    tiny_model,
    write_model,
    write_prepared,
    write_tokens,
)

from pixrec import cli
from pixrec.artifact import fingerprint
from pixrec.cluster.evaluate import UserRanker, _blocks
from pixrec.config import EvaluateConfig
from pixrec.evaluation import Task
from pixrec.scorers.towers import tower_scorers


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data/ and model/; a picture is missing, an item is cold, histories have several lengths."""
    items = tiny_items(with_pictures=set(range(11)))
    write_prepared(tmp_path / "data", tiny_dataset(items, num_users=23))
    write_model(tmp_path / "model", tiny_model(tiny_config(model={"user_tower": "interleaved"}), items))
    return tmp_path


def evaluate(place: Path, out: str, capfd: pytest.CaptureFixture[str], *settings: str) -> dict:
    options = ["evaluate", "--model", str(place / "model"), "--data", str(place / "data"), "--out", str(place / out)]
    settings = ("bootstrap_samples=20", "batch_size=4", "ks=[1,3,10]", *settings)
    for setting in settings:
        options += ["--set", f"evaluate.{setting}"]
    code = cli.main(options)
    assert code == 0, capfd.readouterr().err
    return json.loads((place / out / "metrics.json").read_text())


def test_actors_give_the_figures_of_one_process(ray_session: None, place: Path, capfd: pytest.CaptureFixture[str]):
    items = tiny_items(with_pictures=set(range(11)))
    write_model(place / "model", tiny_model(tiny_config(model={"modalities": "image"}), items))  # has no knockouts
    here = evaluate(place, "here", capfd)
    there = evaluate(place, "there", capfd, "num_actors=1", "cpus_per_actor=0.5")
    assert {"pixrec", "popularity"} <= set(here["results"])
    assert there.pop("settings") != here.pop("settings")  # num_actors
    assert there == here


def test_stored_picture_tokens_spare_the_vision_part(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Here and in an actor, and never for a picture that was replaced."""
    dataset = tiny_dataset(tiny_items(with_pictures=set(range(11))), num_users=23, uri=str(place / "data"))
    config = tiny_config(model={"user_tower": "interleaved", "freeze_vision": True})
    model, uri = write_model(place / "model", tiny_model(config, dataset.items)), str(place / "model")
    fresh = tower_scorers(uri, model, dataset.items, None, lambda *_: None)[0][0]
    write_tokens(place / "data.tokens", model, dataset.items)
    task = Task(dataset.held_out("test"), dataset.training_counts(), None, EvaluateConfig(ks=(1, 3)))
    actor = UserRanker(fresh.recipe, fresh.vectors, str(place / "data"), task, threads=1)
    theirs = Seen(monkeypatch, dataclasses.replace(model, tower=actor._scorer._embedder.tower))
    actor(next(_blocks(task)))
    assert theirs.pictures == 0

    ours, users = Seen(monkeypatch, model), task.held_out.only(np.arange(5)).users
    scorer = tower_scorers(uri, model, dataset.items, None, lambda *_: None, data=dataset.uri)[0][0]
    assert np.sum(scorer.vectors * fresh.vectors, axis=1) == pytest.approx(1, abs=1e-3)
    assert ours.pictures == 0, "its knockout by text sees none, its knockout by image sees tokens too"
    np.testing.assert_allclose(scorer.scores(users), fresh.scores(users), atol=2e-3)
    tower_scorers(uri, model, dataset.items, None, lambda *_: None, ["pixrec_image_noise"], dataset.uri)
    assert ours.pictures >= len(dataset.items)


def test_blocks_hold_every_user_once(place: Path):
    dataset = tiny_dataset(num_users=23)
    held_out = dataset.held_out("test")
    task = Task(held_out, dataset.training_counts(), None, EvaluateConfig(batch_size=4, num_actors=1))
    blocks = list(_blocks(task))
    assert len(blocks) > 1
    assert all(len(block) % 4 == 0 for block in blocks[:-1])
    assert [n for block in blocks for n in block.column("number").to_pylist()] == list(range(len(held_out.targets)))
    histories = [h for block in blocks for h in block.column("history").to_pylist()]
    assert histories == [h.tolist() for h in held_out.histories]


def test_an_actor_without_ray_is_told_the_time(place: Path):
    dataset = tiny_dataset(tiny_items(with_pictures=set(range(11))), num_users=23)
    moments = np.random.default_rng(0).integers(0, 10**9, len(dataset.events.rows)).cumsum()
    dataset = dataclasses.replace(dataset, events=dataclasses.replace(dataset.events, timestamps=moments))
    model = tiny_model(tiny_config(model={"user_tower": "compact", "compact": {"time": "gaps"}}), dataset.items)
    with torch.no_grad():
        model.tower.compact.user.gap.weight.normal_()
    model = write_model(place / "timed", dataclasses.replace(model, info={"fingerprint": fingerprint(model)}))
    scorer = tower_scorers(str(place / "timed"), model, dataset.items, None, lambda *_: None)[0][0]
    held_out = dataset.held_out("test")
    task, blind = (
        Task(users, dataset.training_counts(), None, EvaluateConfig(ks=(1, 3)))
        for users in (held_out, held_out._replace(timestamps=None))
    )
    actor = UserRanker(scorer.recipe, scorer.vectors, str(place / "data"), task, threads=1)
    found = [actor(next(_blocks(each))).column("allowed").to_numpy() for each in (task, blind)]
    assert (found[0] != found[1]).any()
    for ranks, each in zip(found, (task, blind), strict=True):
        np.testing.assert_array_equal(ranks, each.rank(scorer, each.held_out).allowed)


def test_an_actor_without_ray_ranks_as_the_task_does(place: Path):
    dataset = tiny_dataset(tiny_items(with_pictures=set(range(11))), num_users=23)
    model = tiny_model(tiny_config(model={"user_tower": "interleaved"}), dataset.items)
    uri = str(place / "model")
    scorer = tower_scorers(uri, model, dataset.items, None, lambda *_: None)[0][2]
    task = Task(dataset.held_out("test"), dataset.training_counts(), None, EvaluateConfig(ks=(1, 3)))
    actor = UserRanker(scorer.recipe, scorer.vectors, str(place / "data"), task, threads=1)
    table = actor(next(_blocks(task)))
    expected = task.rank(scorer, task.held_out)
    for name, values in zip(("allowed", "filtered", "ties"), expected[:3], strict=True):
        np.testing.assert_array_equal(table.column(name).to_numpy(), values)
    np.testing.assert_array_equal(np.array(table.column("top").to_pylist()), expected.top)
