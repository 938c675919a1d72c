"""Batch embedding on Ray: only what changed is computed, whatever dies on the way, and every item is there once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from fakes import (
    TINY,
    square,
    tiny_config,
    tiny_dataset,
    tiny_items,
    tiny_model,
    write_model,
    write_prepared,
    write_tokens,
)
from processes import die_once, wait_for_the_end_of

from pixrec import cli, storage
from pixrec.artifact import Index, index_version, list_versions, load_index
from pixrec.artifact.approximate import add_structure
from pixrec.artifact.unfinished import Unfinished
from pixrec.cluster import embed as embedding
from pixrec.cluster.embed import embed
from pixrec.config import EmbedConfig, dump_config
from pixrec.data.images import decode_image
from pixrec.data.items import ItemTable
from pixrec.errors import InputError, UnreadableImage
from pixrec.live.sqlite import SqliteStore
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import Content
from pixrec.query import NewItem
from pixrec.recommender import load_recommender
from pixrec.schema import IMAGE

MANY = 180
SMALL_PARTS = EmbedConfig(batch_size=4, max_part_items=4, threads_per_actor=1)


def quiet(*news: Any) -> None:
    pass


class Place:
    """A model and a catalog in a folder, and the index to be made there."""

    def __init__(self, folder: Path, num_items: int = 12) -> None:
        self.folder = folder
        self.items = tiny_items(num_items, with_pictures=range(0, num_items, 2))
        self.model = write_model(folder / "model", tiny_model(items=self.items))
        self.write(self.items)

    def write(self, items: ItemTable) -> None:
        """Put these items into the data set."""
        self.items = items
        write_prepared(self.folder / "data", tiny_dataset(items))

    def embed(self, progress: Callable[..., None] = quiet, **settings: Any) -> dict[str, Any]:
        config = dataclasses.replace(TINY, embed=dataclasses.replace(SMALL_PARTS, **settings))
        places = [str(self.folder / name) for name in ("model", "data", "index")]
        return embed(*places, config, progress=progress)

    @property
    def index(self) -> Index:
        return load_index(str(self.folder / "index"), self.model.fingerprint)

    @property
    def work(self) -> Unfinished:
        return Unfinished(str(self.folder / "index"), self.model.fingerprint)

    def check(self) -> None:
        """Every item is there once, with the vector that the model gives it alone, and nothing hidden is left."""
        index, embedder = self.index, self.model.embedder()
        assert sorted(index.item_ids) == sorted(self.items.item_ids)
        rows = [self.items.row_of[item] for item in index.item_ids]
        contents = embedding_contents(self.items, rows, embedder.encoder.image_size_px)
        np.testing.assert_allclose(index.vectors, embedder.contents(contents), atol=1e-6)
        assert not [name for name in os.listdir(self.folder / "index" / "versions") if name.startswith(".")]


def embedding_contents(items: ItemTable, rows: list[int], size: int) -> list[Content]:
    def seen(row: int) -> np.ndarray | None:
        picture = items.image(row)
        try:
            return None if picture is None else decode_image(picture, size)
        except UnreadableImage:
            return None

    return [Content(items.text(row), seen(row)) for row in rows]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def here(without_ray: Callable[[ModuleType], None]) -> None:
    """`embed` does its stages one after the other in this process."""
    without_ray(embedding)


def counts(manifest: dict[str, Any]) -> tuple[int, ...]:
    return tuple(manifest[name] for name in ("rows", "reused", "computed", "resumed", "redone"))


def changed(items: ItemTable, rows: list[int], *, removed: tuple[int, ...], broken: int) -> ItemTable:
    """New titles for `rows`, none of `removed`, and a picture that is none for `broken`."""
    table = items._table
    titles = ["New" if row in rows else text for row, text in enumerate(table.column("title").to_pylist())]
    pictures = [b"text" if row == broken else data for row, data in enumerate(table.column(IMAGE).to_pylist())]
    for name, values in (("title", pa.array(titles, pa.string())), (IMAGE, pa.array(pictures, pa.binary()))):
        table = table.set_column(table.column_names.index(name), name, values)
    return ItemTable(table.take([row for row in range(len(table)) if row not in removed]))


def test_only_what_changed_is_computed(here: None, place: Place):
    assert counts(place.embed()) == (12, 0, 12, 0, 0)
    place.check()
    first = place.index

    more = changed(place.items, [1, 4], removed=(7, 8), broken=2)
    new = tiny_items(13)._table.slice(12)
    place.write(ItemTable(pa.concat_tables([more._table, new])))
    manifest = place.embed()
    assert counts(manifest) == (11, 7, 4, 0, 0)
    assert (manifest["with_image"], manifest["text_alone"]) == (5, 6)
    assert manifest["pictures_rejected"] == 1, "an unreadable picture costs no item"
    place.check()
    assert (first.item_ids[0], len(first.item_ids)) == ("i00", 12)
    kept = storage.read_table(str(place.folder / "index" / "versions" / first.version))
    assert kept.column("item_id").to_pylist() == first.item_ids, "the old version stays readable"

    assert counts(place.embed()) == (11, 11, 0, 0, 0)
    assert counts(place.embed(dtype="int8")) == (11, 11, 0, 0, 0)
    assert len(list_versions(str(place.folder / "index"))) == 4


def test_a_version_gets_its_structure_for_approximate_search(here: None, tmp_path: Path):
    place = Place(tmp_path, num_items=70)
    assert "approximate" not in place.embed()
    manifest = place.embed(approximate_above=69, approximate_recall=1.0)
    assert manifest["approximate"]["structure"] == "IVF32,SQ8"
    assert manifest["approximate"]["recall@10"] == 1
    structure = place.index.structure()
    assert len(structure) == 70
    own = (structure.candidates(place.index.vectors, 10) == np.arange(70)[:, None]).any(1)
    assert own.mean() > 0.5, "by chance it would be a seventh of them"


def test_a_structure_on_s3_is_copied_to_the_node(bucket: str):
    vectors = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    with index_version(f"{bucket}/structured", "0123456789", 4, "float32", {}) as writer:
        writer.add([f"i{row}" for row in range(40)], vectors, ["hash"] * 40)
        writer.flush()
        config = EmbedConfig(approximate_recall=0.01, threads_per_actor=1)
        writer.facts["approximate"] = add_structure(writer.folder, 40, 4, "float32", config)
    for _ in range(2):  # copied, and found copied
        structure = load_index(f"{bucket}/structured").structure()
        assert (structure.candidates(vectors[:5], 10) == np.arange(5)[:, None]).any(1).all()


def test_stored_picture_tokens_are_used_and_not_for_a_changed_picture(here: None, place: Place, bucket: str):
    place.model = write_model(place.folder / "model", tiny_model(tiny_config(model={"freeze_vision": True})))
    tokens, rows = f"{bucket}/embed.tokens", np.arange(12)
    write_tokens(tokens, place.model, place.items)
    pictures = [square(0.77) if row == 2 else place.items.image(row) for row in rows]
    table, at = place.items._table, place.items._table.column_names.index(IMAGE)
    place.write(ItemTable(table.set_column(at, IMAGE, pa.array(pictures, pa.binary()))))
    manifest = place.embed(picture_tokens=tokens)
    assert (manifest["pictures_from_tokens"], manifest["with_image"]) == (5, 6)
    index, fresh = place.index, place.model.embedder().items(Catalog(place.items, place.model.encoder), rows)
    apart = np.abs(index.vectors - fresh[[place.items.row_of[item] for item in index.item_ids]]).max(axis=1)
    assert apart.max() < 0.01
    assert apart[index.item_ids.index("i00")] > 1e-6, "they were not used at all"
    assert apart[index.item_ids.index("i02")] < 1e-6

    facts, data = embedding.model_facts(str(place.folder / "model")), str(place.folder / "data")
    assert embedding._store(facts, data, EmbedConfig(picture_tokens=None)) is None


def test_a_killed_worker_is_replaced_and_its_half_part_cleared_up(
    ray_session: None, place: Place, monkeypatch: pytest.MonkeyPatch
):
    note = place.folder / "note"
    note.touch()

    class Mortal(embedding.ItemEmbedder):
        """Dies as it writes its second part."""

        def _stored(self, block: pa.Table) -> dict[str, object]:
            if note.exists() and self._unfinished.files():
                part = self._unfinished.start(len(block))
                storage.write_bytes(f"{self._unfinished.uri}/{part}.parquet.partial-0a1b2c3d", b"half")
                die_once(note)
            return super()._stored(block)

    monkeypatch.setattr(embedding, "ItemEmbedder", Mortal)
    manifest = place.embed()
    assert not note.exists()
    assert counts(manifest) == (12, 0, 12, 0, 4)
    place.check()


def test_what_a_killed_driver_had_is_not_done_again(
    ray_session: None, tmp_path: Path, without_ray: Callable[[ModuleType], None]
):
    """Killed by a signal: nothing of ours catches it."""
    place = Place(tmp_path, MANY)
    (tmp_path / "config.yaml").write_text(dump_config(dataclasses.replace(TINY, embed=SMALL_PARTS)))
    options = [f"--{name}={tmp_path / folder}" for name, folder in (("model", "model"), ("data", "data"))]
    options += [f"--out={tmp_path / 'index'}", f"--config={tmp_path / 'config.yaml'}"]
    code = "import sys; from pixrec.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    wanted = MANY // 3 // SMALL_PARTS.max_part_items
    with subprocess.Popen(
        [sys.executable, "-c", code, "embed", *options], stderr=subprocess.PIPE, text=True, env=environment
    ) as run:
        while len(place.work.files()) < 2 * wanted and run.poll() is None:  # a marker and a part each
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(0.05)
        run.kill()
        said = run.communicate()[1]
    assert run.returncode == -signal.SIGKILL, said
    wait_for_the_end_of("ItemEmbedder")  # Ray ends the workers of a driver that is gone
    assert not (tmp_path / "index" / "CURRENT").exists()
    without_ray(embedding)
    manifest = place.embed()
    assert manifest["rows"] == manifest["computed"] == MANY
    assert manifest["resumed"] >= (wanted - 1) * SMALL_PARTS.max_part_items
    place.check()


def test_a_second_run_at_the_same_time_does_no_harm(here: None, tmp_path: Path):
    place, second = Place(tmp_path, 60), []

    def begin_another(stage: str, done: int, total: int, note: str) -> None:
        if done >= 20 and not second:
            second.append({})
            second[0] = place.embed()  # takes what the first has stored, publishes it and clears up

    first = place.embed(begin_another)
    assert counts(second[0])[:3] == (60, 0, 60)
    assert second[0]["resumed"] >= 20
    assert first["version"] > second[0]["version"]
    assert first["rows"] == first["reused"] + first["computed"] == 60
    place.check()


def test_a_damaged_model_is_the_users_to_cure(here: None, place: Place, capfd: pytest.CaptureFixture[str]):
    heads = place.folder / "model" / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-40])
    arguments = [f"--{name}={place.folder / folder}" for name, folder in (("model", "model"), ("data", "data"))]
    code = cli.main(["embed", *arguments, f"--out={place.folder / 'index'}"])
    assert code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"pixrec embed: {place.folder / 'model'} is damaged")
    (place.folder / "model" / "config.yaml").unlink()
    assert cli.main(["embed", *arguments, f"--out={place.folder / 'index'}"]) == 2
    assert "config.yaml" in capfd.readouterr().err.splitlines()[-1]


def test_an_index_names_its_data_set_from_where_it_lies():
    assert embedding._relative("/shop/data", "/shop/index") == "../data"
    assert embedding._relative("s3://shop/a/data", "s3://shop/index") == "../a/data"
    assert embedding._relative("s3://shop/data", "s3://other/index") is None
    assert embedding._relative("s3://shop/data", "/shop/index") is None


def test_live_items_become_part_of_a_version_and_never_twice(here: None, place: Place) -> None:
    """What a server was sent, embedded with the rest; once the data set has an item, its row there is the only one."""
    places = [str(place.folder / name) for name in ("model", "index", "data")]
    assert place.embed()["rows"] == 12
    store, shop = SqliteStore(str(place.folder / "index" / "live.sqlite"), 10), load_recommender(*places)
    shop.live.follow(store)
    square_lamp = NewItem({"title": "Lamp", "brand": "Cyn"}, square(0.1))
    store.put(shop.model_version, *shop.embed_new({"n/1": square_lamp, "i03": square_lamp}), 100)
    added, made = shop.embed_new({"n/2": NewItem({"title": "Patch"}), "n/3": square_lamp})
    store.put("an older model", added, made, 100)
    store.change("n/3", {}, hidden=True)
    store.change("i04", {"price": 3.0})
    expected = shop.recommend(["i00", "i01"], 50)

    manifest = place.embed()
    assert (manifest["rows"], manifest["computed"], manifest["live_items"], manifest["live_computed"]) == (12, 0, 3, 0)
    place.check()
    alone = load_recommender(*places)  # as a server that never had the store
    assert {item for item, _ in alone.recommend(["i00"], 50)} >= {"n/1", "n/2"}
    assert alone.fields("n/1")["title"] == "Lamp"
    for made_anew in (False, True):
        if made_anew:
            place.embed()
        again = load_recommender(*places)
        again.live.follow(store)
        found = again.recommend(["i00", "i01"], 50)
        assert [item for item, _ in found] == [item for item, _ in expected]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], atol=1e-6)

    patch = {"item_id": "n/2", "title": "Patch", "image_status": "missing"}
    whole = pa.concat_tables([place.items._table, pa.Table.from_pylist([patch], place.items.schema)])
    place.write(ItemTable(whole))
    manifest = place.embed()
    assert (manifest["rows"], manifest["live_items"]) == (13, 2)
    place.check()
    again = load_recommender(*places)
    again.live.follow(store)
    assert sorted(item for item, _ in again.recommend(["i00", "i01"], 50)) == sorted(item for item, _ in expected)


def test_a_store_that_is_not_there_is_the_users_to_cure(here: None, place: Place) -> None:
    with pytest.raises(InputError, match=r"embed\.live_items is .*nowhere: there is no such store"):
        place.embed(live_items=str(place.folder / "nowhere"))
