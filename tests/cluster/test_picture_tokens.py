"""The store of picture tokens on Ray: only what it lacks is computed, whoever began it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest
from fakes import small_encoders, tiny_config, tiny_dataset, tiny_items, write_prepared, write_tokens

from pixrec import storage
from pixrec.artifact import save_model, untrained_model
from pixrec.cluster import vision
from pixrec.cluster.vision import PictureEncoder, TextEncoder, frozen_once
from pixrec.config import dump_config
from pixrec.data.items import load_items
from pixrec.data.tokens import index_parts, stored_pictures
from pixrec.model.texts import text_fingerprint, text_schema
from pixrec.model.vision import find_tokens, fitting_store, token_schema
from pixrec.schema import IMAGE
from pixrec.training.phases import begin

CONFIG = tiny_config(model={"freeze_vision": True}, embed={"batch_size": 4, "threads_per_actor": 1})


def test_an_actor_passes_over_what_is_stored(tmp_path: Path):
    write_prepared(tmp_path / "data", tiny_dataset())
    data, folder = str(tmp_path / "data"), str(tmp_path / "store")
    encoder = PictureEncoder(dump_config(CONFIG), [data], folder)
    pictures = [load_items(data).image(row) for row in range(3)]
    new = encoder(pa.table({IMAGE: [*pictures, None, pictures[0]]}))
    assert new.column("pictures").to_pylist() == [3]
    assert index_parts(folder, token_schema(encoder._backbone)) == 3
    again = PictureEncoder(dump_config(CONFIG), [data], folder)
    files = storage.list_files(folder)
    assert again(pa.table({IMAGE: pa.array([*pictures, None], pa.binary())})).column("pictures").to_pylist() == [0]
    assert storage.list_files(folder) == files
    assert "_backbone" not in vars(again), "no model is built for nothing"
    more = load_items(data).image(7)
    assert again(pa.table({IMAGE: [*pictures, more]})).column("pictures").to_pylist() == [1]


def test_an_actor_passes_over_texts_that_are_stored(tmp_path: Path):
    data, folder = str(tmp_path / "data"), str(tmp_path / "store")
    write_prepared(data, tiny_dataset())
    config = tiny_config(model=small_encoders(tmp_path / "encoders"), embed={"batch_size": 4, "threads_per_actor": 1})
    files = pa.table({"file": [str(file) for file in storage.table_files(storage.join(data, "items"))]})
    items = load_items(data)
    texts = {items.text(row) for row in range(len(items))}
    encoder = TextEncoder(dump_config(config), [data], folder)
    assert encoder(files).column("texts").to_pylist() == [len(texts)]
    assert index_parts(folder, text_schema(encoder._model.tower.backbone)) == len(texts)
    again = TextEncoder(dump_config(config), [data], folder)
    assert again(files).column("texts").to_pylist() == [0]


def test_texts_are_stored_as_the_encoder_reads_them_that_training_begins_with(tmp_path: Path):
    data, folder, start = (str(tmp_path / name) for name in ("data", "store", "start"))
    write_prepared(data, tiny_dataset())
    config = tiny_config(model=small_encoders(tmp_path / "encoders"), train={"joint": {"epochs": 1}})
    save_model(str(tmp_path / "frozen"), begin("compact", [data], config, "cpu").model, {})
    tuned = begin("joint", [data], config, "cpu", start=str(tmp_path / "frozen"))
    tuned.trainer.train_epoch()
    save_model(start, tuned.model, {})
    further = tiny_config(model=small_encoders(tmp_path / "encoders"), train={"start": start})
    encoder = TextEncoder(dump_config(further), [data], folder)
    encoder(pa.table({"file": [str(file) for file in storage.table_files(storage.join(data, "items"))]}))
    wanted = text_fingerprint(tuned.model.tower.backbone)
    assert text_fingerprint(encoder._model.tower.backbone) == wanted
    assert text_fingerprint(untrained_model(further, [data]).tower.backbone) != wanted


def test_a_store_grows(
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_ray: Callable[[ModuleType], None],
):
    """The pictures of a second data set that shares the place are added to what is there."""
    first, second, place = (str(tmp_path / name) for name in ("first", "second", "tokens"))
    write_prepared(first, tiny_dataset())
    write_prepared(second, tiny_dataset(tiny_items(5)))
    config = tiny_config(
        model={"freeze_vision": True}, train={"picture_tokens": place}, embed={"batch_size": 4, "threads_per_actor": 1}
    )
    model = untrained_model(config, [first])
    folder, backbone = write_tokens(place, model, load_items(first)), model.tower.backbone
    files = storage.list_files(folder, ".lance")
    storage.remove(storage.join(folder, "tokens.json"))  # as a killed run leaves it
    frozen_once(second, config, [first])
    assert fitting_store(place, backbone) == folder
    assert set(files) <= set(storage.list_files(folder))
    assert len(stored_pictures(folder)) == 12 + 4  # a picture of the second set is one of the first's
    files = storage.list_files(folder, ".lance")
    without_ray(vision)
    frozen_once(first, config, [first])
    assert storage.list_files(folder, ".lance") == files, "what is there is not computed again"
    monkeypatch.setattr(vision, "PictureEncoder", None)
    for data in (first, second):
        tokens = find_tokens(data, config, backbone)
        assert tokens is not None
        assert tokens.hold(load_items(data))
        frozen_once(data, config, [first])  # nothing left to do, and nothing is read to see it
