"""What the workers of batch embedding do, without Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import (
    Seen,
    square,
    tiny_config,
    tiny_dataset,
    tiny_items,
    tiny_model,
    write_model,
    write_prepared,
    write_tokens,
)

from pixrec.artifact import Model, decoding
from pixrec.artifact.decoding import DECODED, decode_items, hash_items
from pixrec.artifact.embedding import ItemEmbedder, find_store
from pixrec.artifact.stored import item_keys, to_vectors
from pixrec.artifact.unfinished import Unfinished, read_part
from pixrec.config import EmbedConfig
from pixrec.data.images import decode_image
from pixrec.data.items import ItemTable
from pixrec.errors import ArtifactError, InputError, raise_fault
from pixrec.model.catalog import Catalog
from pixrec.schema import IMAGE

SHOWN = {0, 1, 2, 5, 7, 11}


@pytest.fixture
def table() -> ItemTable:
    return tiny_items(with_pictures=SHOWN)


@pytest.fixture
def file(tmp_path: Path, table: ItemTable) -> str:
    write_prepared(tmp_path / "data", tiny_dataset(table))
    return str(tmp_path / "data" / "items" / "part-000000.parquet")


def decoded(file: str, rows: list[int] | None = None, modalities: str = "both", tokens: str | None = None) -> pa.Table:
    piece = {"file": file, "start": 0, "rows": None if rows is None else np.array(rows, np.int32).tobytes()}
    parts = decode_items(pa.Table.from_pylist([piece]), picture_size=32, modalities=modalities, tokens=tokens)
    return pa.concat_tables([DECODED.empty_table(), *parts])


@pytest.mark.parametrize("rows_read", [5, 128])
def test_items_are_decoded_as_everywhere(file: str, table: ItemTable, rows_read: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "_ROWS_READ", rows_read)
    found = decoded(file)
    assert found.column("item_id").to_pylist() == table.item_ids
    for row, item in enumerate(found.to_pylist()):
        assert (item["text"], item["content_hash"]) == (table.text(row), table.content_hash(row))
        assert (item["pixels"] is not None) == (row in SHOWN)
        if row in SHOWN:
            assert item["pixels"] == decode_image(table.image(row), 32).tobytes()
    assert not any(found.column("rejected_picture").to_pylist())


@pytest.mark.parametrize("rows", [[0], [4, 5], [3, 9, 11], []])
def test_only_the_rows_that_are_asked_for(
    file: str, table: ItemTable, rows: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decoding, "_ROWS_READ", 5)
    assert decoded(file, rows).column("item_id").to_pylist() == [table.item_ids[row] for row in rows]


def test_a_model_of_text_alone_is_shown_no_picture(file: str):
    assert decoded(file, modalities="text").column("pixels").null_count == 12


def test_an_unreadable_picture_leaves_the_text(tmp_path: Path, table: ItemTable):
    raw = table._table
    pictures = raw.column(IMAGE).to_pylist()
    pictures[1] = b"not a picture"
    broken = raw.set_column(raw.column_names.index(IMAGE), IMAGE, pa.array(pictures, pa.binary()))
    write_prepared(tmp_path / "data", tiny_dataset(ItemTable(broken)))
    found = decoded(str(tmp_path / "data" / "items" / "part-000000.parquet"))
    assert [row for row, bad in enumerate(found.column("rejected_picture").to_pylist()) if bad] == [1]
    assert found.column("pixels")[1].as_py() is None
    assert len(found) == 12


def test_keys_of_a_file(file: str, table: ItemTable):
    (found,) = hash_items(pa.table({"file": [file], "start": [0]}))
    expected = item_keys(table.item_ids, [table.content_hash(row) for row in range(len(table))])
    assert found.to_pylist() == [{"file": file, "keys": b"".join(expected.to_pylist()), "fault": None}]


@pytest.fixture
def actor(tmp_path: Path) -> tuple[ItemEmbedder, Model]:
    model = write_model(tmp_path / "model", tiny_model())
    unfinished = Unfinished(str(tmp_path / "index"), model.fingerprint)
    return ItemEmbedder(str(tmp_path / "model"), EmbedConfig(batch_size=5, threads_per_actor=1), unfinished), model


def test_an_actor_stores_vectors_and_sends_a_receipt(file: str, table: ItemTable, actor: tuple[ItemEmbedder, Model]):
    embedder, model = actor
    (receipt,) = embedder(decoded(file)).to_pylist()
    part = read_part(receipt["part"])
    assert part.column("item_id").to_pylist() == table.item_ids
    assert part.column("has_image").to_pylist() == [row in SHOWN for row in range(12)]
    one_by_one = [model.embedder().items(Catalog(table, model.encoder), np.array([row]))[0] for row in range(12)]
    np.testing.assert_allclose(to_vectors(part), one_by_one, atol=1e-5)
    hashes = part.column("content_hash").to_pylist()
    assert receipt["keys"] == b"".join(item_keys(table.item_ids, hashes).to_pylist())
    assert (receipt["pictures"], receipt["rejected"]) == (len(SHOWN), 0)
    assert embedder._unfinished.lost_rows(embedder._unfinished.files()) == 0


def test_an_actor_that_dies_leaves_a_trace(
    file: str, actor: tuple[ItemEmbedder, Model], monkeypatch: pytest.MonkeyPatch
):
    embedder, _ = actor

    def die(block: pa.Table) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(embedder, "vectors", die)
    with pytest.raises(MemoryError):
        embedder(decoded(file))
    assert embedder._unfinished.lost_rows(embedder._unfinished.files()) == 12


def test_items_of_like_length_share_a_forward_pass(
    file: str, actor: tuple[ItemEmbedder, Model], monkeypatch: pytest.MonkeyPatch
):
    embedder, _ = actor
    passes = []
    encode = embedder._embedder.encoder.items

    def recorded(batch, *more):
        passes.append([(content.pixels is not None, len(content.text)) for content in batch])
        return encode(batch, *more)

    monkeypatch.setattr(embedder._embedder.encoder, "items", recorded)
    embedder.vectors(decoded(file))
    assert [len(batch) for batch in passes] == [5, 5, 2]
    in_order = [shape for batch in passes for shape in batch]
    assert in_order == sorted(in_order)


def test_stored_tokens_do_for_the_pictures(
    tmp_path: Path, file: str, table: ItemTable, monkeypatch: pytest.MonkeyPatch
):
    """The vision part sees the picture that changed since, and none that is stored."""
    model = write_model(tmp_path / "model", tiny_model(tiny_config(model={"freeze_vision": True})))
    uri, place = str(tmp_path / "model"), str(tmp_path / "tokens")
    assert find_store(uri, place) == {"store": None, "fault": None}
    folder = write_tokens(place, model, table)
    assert find_store(uri, place) == {"store": folder, "fault": None}
    pictures = [square(0.99) if row == 5 else table.image(row) for row in range(12)]
    column = table._table.column_names.index(IMAGE)
    changed = ItemTable(table._table.set_column(column, IMAGE, pa.array(pictures, pa.binary())))
    write_prepared(tmp_path / "data", tiny_dataset(changed))
    block = decoded(file, tokens=folder)
    assert {row for row in range(12) if block.column("tokens_of")[row].is_valid} == SHOWN - {5}
    assert [row for row in range(12) if block.column("pixels")[row].is_valid] == [5]

    unfinished = Unfinished(str(tmp_path / "index"), model.fingerprint)
    embedder = ItemEmbedder(uri, EmbedConfig(batch_size=5, threads_per_actor=1), unfinished, folder)
    loaded = dataclasses.replace(model, tower=embedder._embedder.tower)
    seen = Seen(monkeypatch, loaded)
    (receipt,) = embedder(block).to_pylist()
    assert seen.pictures == 1
    assert (receipt["pictures"], receipt["stored"], receipt["fault"]) == (len(SHOWN), len(SHOWN) - 1, None)
    part = read_part(receipt["part"])
    assert part.column("has_image").to_pylist() == [row in SHOWN for row in range(12)]
    expected = model.embedder().items(Catalog(changed, model.encoder), np.arange(12))
    assert np.sum(to_vectors(part) * expected, axis=1) == pytest.approx(1, abs=1e-3)


def test_tokens_of_other_weights_are_refused_where_they_are_used(tmp_path: Path, file: str, table: ItemTable):
    """The model was replaced between the choice of the store and the work."""
    config = tiny_config(model={"freeze_vision": True})
    folder = write_tokens(tmp_path / "tokens", tiny_model(config), table)
    other = write_model(tmp_path / "model", tiny_model(tiny_config(model={"freeze_vision": True}, train={"seed": 3})))
    assert find_store(str(tmp_path / "model"), str(tmp_path / "tokens"))["store"] is None
    unfinished = Unfinished(str(tmp_path / "index"), other.fingerprint)
    embedder = ItemEmbedder(str(tmp_path / "model"), EmbedConfig(threads_per_actor=1), unfinished, folder)
    (receipt,) = embedder(decoded(file, tokens=folder)).to_pylist()
    with pytest.raises(ArtifactError, match="went while they were in use; run it again"):
        raise_fault(receipt["fault"])


def test_an_error_of_ours_travels_as_text(tmp_path: Path, file: str, actor: tuple[ItemEmbedder, Model]):
    gone = str(tmp_path / "gone.parquet")
    (keys,) = hash_items(pa.table({"file": [gone], "start": [0]})).__next__().to_pylist()
    with pytest.raises(InputError, match=r"gone.parquet: no such file"):
        raise_fault(keys["fault"])
    (receipt,) = actor[0](pa.concat_tables([decoded(file), decoded(gone)])).to_pylist()
    with pytest.raises(InputError, match=r"gone.parquet: no such file"):
        raise_fault(receipt["fault"])

    found = find_store(str(tmp_path / "absent"), str(tmp_path / "tokens"))
    with pytest.raises(ArtifactError, match="absent holds no complete model"):
        raise_fault(found["fault"])
    absent = ItemEmbedder(str(tmp_path / "absent"), EmbedConfig(), Unfinished(str(tmp_path / "index"), "m"))
    (receipt,) = absent(decoded(file)).to_pylist()
    with pytest.raises(ArtifactError, match="absent holds no complete model"):
        raise_fault(receipt["fault"])
