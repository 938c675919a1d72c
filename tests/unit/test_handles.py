"""What the library's functions return, made here without them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from fakes import tiny_dataset, write_index, write_model, write_prepared

from pixrec import storage
from pixrec.artifact import Model, index_manifest
from pixrec.data.sequences import Dataset
from pixrec.errors import ArtifactError, InputError
from pixrec.handles import Handle, PreparedData, PublishedIndex, Report, TrainedModel, place

METRICS = {
    "users": 10,
    "items": 12,
    "results": {"pixrec": {}, "popularity": {}},
    "provenance": {"model_fingerprint": "m"},
    "settings": {"evaluate": {"seed": 1}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Model, dataset: Dataset) -> Path:
    """A folder with data/, model/, index/ and report/."""
    folder = tmp_path_factory.mktemp("made")
    data, saved = write_prepared(folder / "data", dataset), write_model(folder / "model", model)
    write_index(folder / "index", saved, data)
    storage.write_json(str(folder / "report" / "metrics.json"), METRICS)
    return folder


@pytest.fixture
def handles(made: Path) -> dict[str, Handle]:
    kinds = {"data": PreparedData, "model": TrainedModel, "index": PublishedIndex, "report": Report}
    return {name: kind.load(made / name) for name, kind in kinds.items()}


def test_they_say_what_lies_there(handles: dict[str, Handle], model: Model, dataset: Dataset):
    assert handles["data"].counts == {"items": 12, "pictures": 12, "users": 10, "events": len(dataset.events.rows)}
    assert handles["data"].fingerprint == dataset.info["fingerprint"]
    assert handles["model"].fingerprint == model.fingerprint
    assert handles["index"].counts == {"items": 12, "pictures": 0}
    assert handles["report"].counts == {"users": 10, "items": 12, "scorers": 2}
    assert handles["report"].info == METRICS


def test_they_stand_for_their_place(handles: dict[str, Handle], made: Path):
    for name, handle in handles.items():
        assert handle.uri == str(handle) == os.fspath(handle) == str(made / name)
        assert Path(handle).is_dir()
        assert place(handle) == handle.uri


def test_they_print_well(handles: dict[str, Handle], made: Path):
    short = handles["data"].fingerprint[:12]
    assert repr(dataclasses.replace(handles["data"], uri="out/data")) == (
        f"PreparedData('out/data', items=12, pictures=12, users=10, events=43, fingerprint='{short}')"
    )
    assert f"version='{handles['index'].info['version']}'" in repr(handles["index"])
    shown = dataclasses.replace(handles["data"], uri="<b>", counts={"events": 12345})._repr_html_()
    assert "12,345" in shown
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown


def test_they_are_values(handles: dict[str, Handle], made: Path):
    again = PreparedData.load(made / "data")
    assert again == handles["data"]
    assert {again, handles["data"]} == {again}
    assert dataclasses.replace(again, fingerprint="other") != again
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.uri = "elsewhere"  # type: ignore[misc]


def test_the_fingerprint_of_an_index_names_what_made_it(made: Path):
    manifest = index_manifest(str(made / "index"))
    same = PublishedIndex.of("there", {**manifest, "version": "later"})
    assert same.fingerprint == PublishedIndex.load(made / "index").fingerprint
    for changed in ({"dtype": "int8"}, {"model_fingerprint": "m"}, {"data_fingerprint": "d"}):
        assert PublishedIndex.of("there", {**manifest, **changed}).fingerprint != same.fingerprint
    settings = Report.of("there", {**METRICS, "settings": {}})
    assert settings.fingerprint != Report.of("there", METRICS).fingerprint == Report.of("here", METRICS).fingerprint


def test_an_index_looks_after_its_versions(tmp_path: Path, model: Model):
    data, saved = write_prepared(tmp_path / "data", tiny_dataset()), write_model(tmp_path / "model", model)
    for _ in range(3):
        write_index(tmp_path / "index", saved, data)
    index = PublishedIndex.load(tmp_path / "index")
    first, second, third = (version["version"] for version in index.versions())
    assert index.version == third
    back = index.rollback(second)
    assert (back.version, PublishedIndex.load(tmp_path / "index").version) == (second, second)
    assert index.keep_newest(1) == [first]
    with pytest.raises(InputError, match="no version of"):
        index.rollback(first)


@pytest.mark.parametrize("kind", [PreparedData, TrainedModel, PublishedIndex, Report])
def test_what_is_not_there_is_refused(tmp_path: Path, kind: type[PreparedData]):
    with pytest.raises(ArtifactError, match=rf"{tmp_path} holds no .*pixrec (prepare|train|embed|evaluate)"):
        kind.load(tmp_path)


def test_a_damaged_report_is_refused(tmp_path: Path):
    storage.write_json(str(tmp_path / "metrics.json"), {"results": {}})
    with pytest.raises(ArtifactError, match="says nothing of users"):
        Report.load(tmp_path)


def test_places_that_are_none():
    assert place("s3://bucket/key") == "s3://bucket/key"
    with pytest.raises(InputError, match="s3:/bucket/key: pathlib drops a slash"):
        place(Path("s3://bucket/key"))
    with pytest.raises(InputError, match="list is neither a place"):
        place([])
