"""What the command promises to those who call it: exit codes, one line on stderr, one JSON object on stdout.

Ray is never reached here: whatever would start it fails the test.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from fakes import tiny_dataset, write_index, write_model, write_prepared
from ray.train import WorkerGroupError

from pixrec import cli, storage, verbs
from pixrec.artifact import Model
from pixrec.data.sequences import Dataset
from pixrec.errors import InputError
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import Event


class Ran(NamedTuple):
    code: int
    out: list[str]
    err: list[str]


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process, as on a machine without Ray."""
    for name in ("ray", "pixrec.cluster.session"):
        monkeypatch.setitem(sys.modules, name, None)

    def run(*arguments: object) -> Ran:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out.splitlines(), captured.err.splitlines())

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Model, dataset: Dataset) -> Path:
    """A folder with data/, model/ and index/."""
    folder = tmp_path_factory.mktemp("made")
    data, saved = write_prepared(folder / "data", dataset), write_model(folder / "model", model)
    write_index(folder / "index", saved, data)
    return folder


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A folder with items.parquet and interactions.parquet."""
    write_items(tmp_path)
    write_events(tmp_path)
    return tmp_path


def write_items(folder: Path, **columns: object) -> None:
    table = {"item_id": ["a", "b"], "title": ["A", "B"], "image": pa.array([b"x", None], pa.binary()), **columns}
    kept = {name: values for name, values in table.items() if values is not None}
    storage.write_table(str(folder / "items.parquet"), pa.table(kept))


def write_events(folder: Path, **columns: object) -> None:
    table = {"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [1, 2], **columns}
    kept = {name: values for name, values in table.items() if values is not None}
    storage.write_table(str(folder / "interactions.parquet"), pa.table(kept))


def refused(ran: Ran, *words: str) -> None:
    assert ran.code == 2
    assert ran.out == []
    assert len(ran.err) == 1, ran.err
    for word in words:
        assert word in ran.err[0]


def prepare(run: Run, folder: Path, *more: object) -> Ran:
    tables = ("--items", folder / "items.parquet", "--interactions", folder / "interactions.parquet")
    return run("prepare", *tables, "--out", folder / "out", *more)


@pytest.mark.parametrize(
    ("items", "events", "words"),
    [
        ({"title": None}, {}, ["items.parquet", "no column 'title'"]),
        ({"item_id": None, "itemid": ["a", "b"]}, {}, ["items.parquet", "no column 'item_id'", "'itemid'"]),
        ({"title": [1, 2]}, {}, ["items.parquet", "'title' is int64, must be string", "cast"]),
        ({"item_id": ["a", "a"]}, {}, ["items.parquet", "'a' occurs 2 times", "keep one"]),
        ({"item_id": pa.array([], pa.string()), "title": pa.array([], pa.string()), "image": None}, {}, ["is empty"]),
        ({}, {"timestamp": None}, ["interactions.parquet", "'timestamp'"]),
        ({}, {"timestamp": ["now", "then"]}, ["interactions.parquet", "'timestamp' is string, must be int64"]),
        ({}, {"item_id": ["x", "y"]}, ["interactions.parquet", "none of its 2 events", "item_id"]),
    ],
)
def test_tables_that_cannot_be_meant(run: Run, tables: Path, items: dict, events: dict, words: list[str]):
    write_items(tables, **items)
    write_events(tables, **events)
    refused(prepare(run, tables), "pixrec prepare: ", *words)
    assert sorted(path.name for path in tables.iterdir()) == ["interactions.parquet", "items.parquet"]


def test_an_empty_interactions_table(run: Run, tables: Path):
    write_events(tables, user_id=pa.array([], pa.string()), item_id=pa.array([], pa.string()), timestamp=[])
    storage.write_table(
        str(tables / "interactions.parquet"),
        pa.table({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]}).slice(1),
    )
    refused(prepare(run, tables), "interactions.parquet", "the interactions table is empty")


def test_raw_amazon_reviews(run: Run, tmp_path: Path):
    line = {"user_id": "u", "parent_asin": "B1", "timestamp": 5, "rating": 4.0, "title": "Nice"}
    rows = [line, line, {**line, "parent_asin": "B2", "timestamp": 6}]
    (tmp_path / "Kitchen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "half a li\n")
    reviews = ["--interactions", tmp_path / "Kitchen.jsonl", "--out", tmp_path / "out"]
    ran = run("prepare", *reviews, "--source", "amazon2023")
    assert ran.code == 0
    summary = json.loads(ran.out[-1])
    assert summary["items"] == {"read": 2, "kept": 2, "rejected": 0}
    assert summary["interactions"]["rejected"] == summary["interactions"]["filtered_repeats"] == 1
    refused(run("prepare", *reviews), "pixrec prepare: ", "Kitchen.jsonl", "cannot be read")
    items = ["--items", tmp_path / "meta_Kitchen.jsonl"]
    refused(run("prepare", *reviews, *items, "--source", "amazon2023"), "meta_Kitchen.jsonl", "no such file or folder")


@pytest.mark.parametrize("name", ["items.parquet", "interactions.parquet"])
def test_a_table_that_is_not_there_or_is_no_table(run: Run, tables: Path, name: str):
    (tables / name).write_bytes(b"PAR1 but no more")
    refused(prepare(run, tables), name, "cannot be read")
    (tables / name).unlink()
    refused(prepare(run, tables), name, "no such file or folder")
    assert not (tables / "out").exists()


def test_thresholds_that_leave_nobody(run: Run, tables: Path):
    refused(prepare(run, tables, "--set", "prepare.min_user_events=3"), "prepare.min_user_events 3", "lower")


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("prepare", ["--interactions", "interactions.parquet"]),
        ("evaluate", ["--model", "model", "--data", "data"]),
    ],
)
def test_places_that_cannot_be_written(run: Run, tables: Path, verb: str, options: list[str]):
    options = [str(tables / o) if not o.startswith("--") else o for o in options]
    refused(run(verb, *options, "--out", tables / "items.parquet"), "items.parquet is a file")
    refused(run(verb, *options, "--out", tables / "items.parquet" / "below"), "below cannot be written", "--out")
    (tables / "full").mkdir()
    (tables / "full" / "letter.txt").write_text("dear")
    refused(run(verb, *options, "--out", tables / "full"), "is not empty", "choose another --out")
    assert [path.name for path in (tables / "full").iterdir()] == ["letter.txt"]


def test_demo_looks_at_all_its_places_before_it_draws(run: Run, tmp_path: Path):
    (tmp_path / "file").write_text("")
    refused(run("demo", "--out", tmp_path / "file"), "file/data cannot be written")
    for name in ("data", "model", "index", "report"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "letter.txt").write_text("dear")
        refused(run("demo", "--out", tmp_path / name), f"{name}/{name} is not empty")
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "prepare.min_user_event=1"], ["'prepare.min_user_event'", "did you mean 'prepare.min_user_events'"]),
        (["--set", "prepare.min_user_events=few"], ["'prepare.min_user_events' is 'few'", "int"]),
        (["--set", "prepare"], ["--set 'prepare'", "section.key=value"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--source", "csv"], ["--source", "csv"]),
        (["--items"], ["--items", "expected one argument"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_arguments_that_make_no_sense(run: Run, tables: Path, options: list[str], words: list[str]):
    refused(prepare(run, tables, *options), *words)
    assert not (tables / "out").exists()


@pytest.mark.parametrize("content", [b"train: [", b"\xff\xfe\x00t", b"just words", b"train: {lerning_rate: 1}"])
def test_a_config_file_that_is_none(run: Run, tables: Path, content: bytes):
    (tables / "config.yaml").write_bytes(content)
    refused(prepare(run, tables, "--config", tables / "config.yaml"), str(tables / "config.yaml"))


@pytest.mark.parametrize("arguments", [[], ["dance"], ["train"], ["recommend", "--model", "m", "-k", "ten"]])
def test_a_command_line_that_is_none(run: Run, arguments: list[str]):
    refused(run(*arguments), "pixrec", "--help")


def recommend(run: Run, made: Path, *more: object) -> Ran:
    return run("recommend", "--model", made / "model", "--index", made / "index", *more)


def test_recommend_ends_with_one_json_object(run: Run, made: Path):
    ran = recommend(run, made, "--history", "i01,i02,nobody", "-k", 3)
    assert (ran.code, len(ran.out)) == (0, 1)
    summary = json.loads(ran.out[0])
    assert set(summary) == {"items", "score_kind", "model_version", "index_version", "unknown_items", "fallback"}
    assert summary["score_kind"] == "cosine"
    assert len(summary["items"]) == 3
    assert {"i01", "i02"}.isdisjoint(item["item_id"] for item in summary["items"])
    assert all(isinstance(item["score"], float) for item in summary["items"])
    assert (summary["unknown_items"], summary["fallback"]) == (["nobody"], False)
    again = recommend(run, made, "--history", "i01", "-k", 12, "--include-history")
    assert "i01" in {item["item_id"] for item in json.loads(again.out[-1])["items"]}


def test_text_that_is_no_text_does_not_break_the_json(run: Run, made: Path):
    ran = recommend(run, made, "--history", "Käse,\udcff", "-k", 1)
    assert json.loads(ran.out[-1])["unknown_items"] == ["Käse", "\udcff"]
    assert ran.out[-1].isascii()


@pytest.mark.parametrize("k", [0, -1])
def test_recommend_wants_at_least_one(run: Run, made: Path, k: int):
    refused(recommend(run, made, "--history", "i01", "-k", k), f"k is {k}", "at least 1")


def test_recommend_takes_the_moments_of_the_history(run: Run, made: Path):
    history = ("--history", "i01,i03", "-k", 3)
    told = recommend(run, made, *history, "--timestamps", "0,1700000000000")
    assert json.loads(told.out[-1])["items"] == json.loads(recommend(run, made, *history).out[-1])["items"]
    refused(recommend(run, made, *history, "--timestamps", "5"), "timestamps holds 1 values for 2 items")
    refused(recommend(run, made, *history, "--timestamps", "5,4"), "oldest first")
    refused(recommend(run, made, *history, "--timestamps", "now,5"), "--timestamps", "whole milliseconds")


def test_parts_that_are_not_there(run: Run, made: Path, tmp_path: Path):
    history = ("--history", "i01")
    refused(
        run("recommend", "--model", made / "nowhere", "--index", made / "index", *history), "nowhere", "pixrec train"
    )
    refused(run("recommend", "--model", made / "model", "--index", made / "data", *history), "data", "pixrec embed")
    refused(recommend(run, made, *history, "--data", tmp_path), str(tmp_path), "pixrec prepare")
    data = ("--data", made / "data", "--out", tmp_path / "out")
    refused(run("evaluate", "--model", made / "nowhere", *data), "nowhere", "pixrec train")
    assert list(tmp_path.iterdir()) == []


def test_a_defect_is_no_fault_of_the_user(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        print("said by a library")
        raise RuntimeError("it broke")

    monkeypatch.setattr(verbs, "recommend", broken)
    ran = recommend(run, made, "--history", "i01")
    assert (ran.code, ran.out) == (1, [])
    assert ran.err[0] == "said by a library"
    assert ran.err[1].startswith("Traceback")
    assert ran.err[-1] == "RuntimeError: it broke"


def test_a_fault_of_the_user_is_seen_through_the_workers(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch):
    class WorkerError(Exception):
        """As Ray wraps an exception of a task."""

        cause = InputError("items.parquet:\n  cannot be read")

    def chained() -> Exception:
        error = RuntimeError("outer")
        error.__cause__ = InputError("items.parquet: cannot be read")
        return error

    for error in (WorkerError(), WorkerGroupError("as Ray Train says it", {0: WorkerError()}), chained()):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(verbs, "recommend", fails)
        ran = recommend(run, made, "--history", "i01")
        refused(ran)
        assert ran.err == ["pixrec recommend: items.parquet: cannot be read"]


def test_what_people_interrupt_ends_quietly(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "recommend", interrupted)
    ran = recommend(run, made, "--history", "i01")
    assert (ran.code, ran.out, ran.err) == (130, [], ["interrupted"])


def test_evaluate_writes_metrics_and_sums_up(run: Run, made: Path, tmp_path: Path):
    options = ("--model", made / "model", "--data", made / "data", "--index", made / "index")
    ran = run("evaluate", *options, "--out", tmp_path / "report", "--set", "evaluate.bootstrap_samples=10")
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out[-1])
    assert summary["users"] == 10
    assert {"pixrec", "pixrec_text_only", "pixrec_image_only", "popularity"} <= set(summary["results"])
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["results"] == summary["results"]
    assert set(metrics["knockouts"].values()) == {"scored"}
    assert metrics["settings"]["evaluate"]["bootstrap_samples"] == 10


@pytest.fixture
def predictions(made: Path, tmp_path: Path) -> Path:
    """Every test user's own target and an unknown item; one user is left out, and a stranger is in."""
    held_out, ids = tiny_dataset().held_out("test"), tiny_dataset().items.item_ids
    lists = [[ids[target], "nowhere"] for target in held_out.targets]
    table = pa.table({"user_id": [*held_out.user_ids[1:], "stranger"], "item_ids": [*lists[1:], ["i00"]]})
    storage.write_table(str(tmp_path / "theirs.parquet"), table)
    return tmp_path / "theirs.parquet"


def test_evaluate_scores_predictions_without_a_model(run: Run, made: Path, tmp_path: Path, predictions: Path):
    options = ("--data", made / "data", "--predictions", predictions, "--set", "evaluate.bootstrap_samples=10")
    ran = run("evaluate", *options, "--out", tmp_path / "report")
    assert ran.code == 0, ran.err
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert list(metrics["results"])[:2] == ["theirs", "popularity"]
    assert metrics["results"]["theirs"]["recall@1"] == 0.9  # of 10 users one is missing
    assert metrics["predictions"] == {
        "scorer": "theirs",
        "users": 9,
        "users_missing": 1,
        "users_unknown": 1,
        "items_unknown": 9,
        "items_repeated": 0,
    }
    assert metrics["provenance"]["model_fingerprint"] is None
    assert metrics["guards"]["audit"]["leaks"] == 0
    assert "theirs: read from a file" in (tmp_path / "report" / "index.html").read_text()


def test_evaluate_puts_predictions_beside_a_model(run: Run, made: Path, tmp_path: Path, predictions: Path):
    options = ("--model", made / "model", "--data", made / "data", "--predictions", predictions)
    options = (*options, "--set", "evaluate.bootstrap_samples=10", "--set", "evaluate.scorers=[popularity]")
    ran = run("evaluate", *options, "--out", tmp_path / "report")
    assert ran.code == 0, ran.err
    names = list(json.loads(ran.out[-1])["results"])
    assert names == ["pixrec", "pixrec_text_only", "pixrec_image_only", "theirs", "popularity"]


def test_evaluate_sums_up_several_seeds(run: Run, made: Path, tmp_path: Path):
    options = ("--data", made / "data", "--set", "evaluate.bootstrap_samples=10")
    assert run("evaluate", *options, "--out", tmp_path / "one").code == 0
    other = tmp_path / "one" / "metrics.json"
    assert run("evaluate", *options, "--also", other, "--out", tmp_path / "two").code == 0
    seeds = json.loads((tmp_path / "two" / "metrics.json").read_text())["seeds"]
    assert seeds["runs"] == ["this run", str(other)]
    recall = seeds["results"]["popularity"]["recall@10"]
    assert (recall["sd"], len(recall["values"])) == (0, 2)


def test_evaluate_refuses(run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = ("--data", made / "data", "--out", tmp_path / "report")
    refused(run("evaluate", *options, "--set", "evaluate.scorers=[]"), "nothing to evaluate", "--model")
    refused(run("evaluate", *options, "--index", made / "index"), "--index", "--model")
    refused(run("evaluate", *options, "--predictions", tmp_path / "none.parquet"), "none.parquet", "no such file")
    refused(run("evaluate", *options, "--also", tmp_path / "none.json"), "none.json", "no such file")
    (tmp_path / "list.json").write_text("[]")
    refused(run("evaluate", *options, "--also", tmp_path / "list.json"), "list.json", "nothing of results")
    refused(run("evaluate", *options, "--set", "evaluate.scorers=[populrity]"), "'populrity'", "'popularity'")

    def leaking(self: Dataset) -> list[np.ndarray]:
        return np.split(self.events.rows, self.events.offsets[1:-1])

    monkeypatch.setattr(Dataset, "training_histories", leaking)
    refused(run("evaluate", *options), "leak: 10 events held out are visible too early", "prepare")
    assert not (tmp_path / "report").exists()


def test_stored_events_are_exported(tmp_path, capsys):
    SqliteStore(str(tmp_path / "events"), 9).add([Event("u", "a", 1)])
    out = str(tmp_path / "out.parquet")
    assert cli.main(["events", "export", "--events", str(tmp_path / "events"), "--out", out]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": out, "events": 1}
    assert cli.main(["events", "export", "--events", str(tmp_path / "ghost"), "--out", out]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_version(run: Run):
    ran = run("--version")
    assert (ran.code, ran.out) == (0, [f"pixrec {cli.__version__}"])


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_somebody_says_otherwise(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: str
):
    """On processors that others want as well, threads that turn in circles make a training many times as long."""
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    monkeypatch.setattr(os, "environ", others | given)
    run("--version")
    assert os.environ["OMP_WAIT_POLICY"] == found
