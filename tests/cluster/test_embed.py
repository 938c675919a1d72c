"""Batch embedding on Ray: only what changed is computed, whatever dies on the way, and every item is there once."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
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

from pixrec import cli, storage
from pixrec.artifact import Index, list_versions, load_index
from pixrec.artifact.unfinished import Unfinished
from pixrec.cluster import embed as embedding
from pixrec.cluster.embed import embed
from pixrec.config import Config, EmbedConfig, dump_config
from pixrec.data.items import ItemTable
from pixrec.model.vision import open_store
from pixrec.schema import IMAGE

MANY = 600
SMALL_PARTS = EmbedConfig(batch_size=4, max_part_items=4, threads_per_actor=1)


def quiet(*news: Any) -> None:
    pass


class Place:
    """A model and a catalog in a folder, and the index to be made there."""

    def __init__(self, folder: Path, num_items: int = 12, *, seed: int = 0) -> None:
        self.folder = folder
        self.items = tiny_items(num_items, with_pictures=range(0, num_items, 2))
        config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, seed=seed))
        self.model = write_model(folder / "model", tiny_model(config, self.items))
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


def embedding_contents(items: ItemTable, rows: list[int], size: int) -> list[Any]:
    from pixrec.data.images import decode_image
    from pixrec.model.encoding import Content

    pictures = [items.image(row) for row in rows]
    pixels = [None if picture is None else decode_image(picture, size) for picture in pictures]
    return [Content(items.text(row), picture) for row, picture in zip(rows, pixels, strict=True)]


@pytest.fixture
def place(tmp_path: Path, ray_session: None) -> Place:
    return Place(tmp_path)


def counts(manifest: dict[str, Any]) -> tuple[int, ...]:
    return tuple(manifest[name] for name in ("rows", "reused", "computed", "resumed", "redone"))


def changed(items: ItemTable, rows: list[int], *, removed: tuple[int, ...] = (), title: str = "New") -> ItemTable:
    table = items._table
    titles = [title if row in rows else text for row, text in enumerate(table.column("title").to_pylist())]
    table = table.set_column(table.column_names.index("title"), "title", pa.array(titles, pa.string()))
    return ItemTable(table.take([row for row in range(len(table)) if row not in removed]))


def test_only_what_changed_is_computed(place: Place):
    assert counts(place.embed()) == (12, 0, 12, 0, 0)
    place.check()
    first = place.index

    more = changed(place.items, [1, 4], removed=(7, 8))
    new = tiny_items(13)._table.slice(12)
    place.write(ItemTable(pa.concat_tables([more._table, new])))
    manifest = place.embed()
    assert counts(manifest) == (11, 8, 3, 0, 0)
    assert (manifest["with_image"], manifest["text_alone"]) == (6, 5)
    place.check()
    assert (first.item_ids[0], len(first.item_ids)) == ("i00", 12)
    kept = storage.read_table(str(place.folder / "index" / "versions" / first.version))
    assert kept.column("item_id").to_pylist() == first.item_ids, "the old version stays readable"

    assert counts(place.embed()) == (11, 11, 0, 0, 0)
    assert counts(place.embed(dtype="int8")) == (11, 11, 0, 0, 0)
    assert counts(place.embed()) == (11, 0, 11, 0, 0), "what int8 lost must be computed anew"
    place.check()
    assert len(list_versions(str(place.folder / "index"))) == 5


def test_another_model_embeds_everything_anew(place: Place):
    place.embed()
    before = place.index
    place.model = write_model(place.folder / "model", tiny_model(with_seed(1), place.items))
    assert place.model.fingerprint != before.manifest["model_fingerprint"]
    assert counts(place.embed()) == (12, 0, 12, 0, 0)
    place.check()


def with_seed(seed: int) -> Config:
    return dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, seed=seed))


def test_an_unreadable_picture_costs_no_item(place: Place):
    table = place.items._table
    pictures = [b"text" if row == 2 else data for row, data in enumerate(table.column(IMAGE).to_pylist())]
    place.write(ItemTable(table.set_column(table.column_names.index(IMAGE), IMAGE, pa.array(pictures, pa.binary()))))
    manifest = place.embed()
    assert (manifest["rows"], manifest["with_image"], manifest["text_alone"]) == (12, 5, 7)
    assert manifest["pictures_rejected"] == 1


def test_decoding_and_the_model_are_stages_of_their_own(place: Place):
    facts = embedding._model_facts(str(place.folder / "model"))
    files = storage.table_files(str(place.folder / "data" / "items"))
    settings = dataclasses.replace(SMALL_PARTS, cpus_per_decode=SMALL_PARTS.cpus_per_actor)
    done = embedding.pipeline(embedding._whole(files), facts, settings, place.work).materialize()
    operators = [line for line in done.stats().splitlines() if line.startswith("Operator")]
    assert len([line for line in operators if "decode_items" in line and "ItemEmbedder" not in line]) == 1
    assert len([line for line in operators if "ItemEmbedder" in line and "decode_items" not in line]) == 1


def frozen(seed: int = 0) -> Config:
    return tiny_config(model={"freeze_vision": True}, train={"seed": seed})


def test_stored_picture_tokens_are_used_where_they_fit(place: Place):
    """Not those of other weights, not for a changed picture, and not where the config says no."""
    place.model = write_model(place.folder / "model", tiny_model(frozen(), place.items))
    write_tokens(place.folder / "data.tokens", tiny_model(frozen(1)), place.items)
    assert place.embed(picture_tokens=None)["pictures_from_tokens"] == 0
    fresh = place.index
    storage.remove(str(place.folder / "index"))
    assert place.embed()["pictures_from_tokens"] == 0, "they are of other weights"
    storage.remove(str(place.folder / "index"))

    write_tokens(place.folder / "data.tokens", place.model, place.items)
    manifest = place.embed()
    assert (manifest["pictures_from_tokens"], manifest["with_image"]) == (6, 6)
    index, rows = place.index, [fresh.item_ids.index(item) for item in place.index.item_ids]
    assert np.sum(index.vectors * fresh.vectors[rows], axis=1) == pytest.approx(1, abs=1e-3)
    assert np.abs(index.vectors - fresh.vectors[rows]).max() > 0, "they were not used at all"

    pictures = [square(0.77) if row == 2 else place.items.image(row) for row in range(12)]
    table, at = place.items._table, place.items._table.column_names.index(IMAGE)
    place.write(ItemTable(table.set_column(at, IMAGE, pa.array(pictures, pa.binary()))))
    manifest = place.embed()
    assert (manifest["computed"], manifest["pictures_from_tokens"]) == (1, 0)
    content = embedding_contents(place.items, [2], place.model.encoder.image_size_px)
    vector = place.index.vectors[place.index.item_ids.index("i02")]
    np.testing.assert_allclose(vector, place.model.embedder().contents(content)[0], atol=1e-6)


def test_picture_tokens_on_s3(place: Place, bucket: str):
    place.model = write_model(place.folder / "model", tiny_model(frozen(), place.items))
    folder = write_tokens(f"{bucket}/embed.tokens", place.model, place.items)
    manifest = place.embed(picture_tokens=f"{bucket}/embed.tokens")
    assert manifest["pictures_from_tokens"] == 6
    tokens = open_store(f"{bucket}/embed.tokens", place.model.tower.backbone)
    storage.remove(folder)
    assert tokens is not None
    assert tokens.hold(place.items), "they stay while they are in use"


class Killed(BaseException):
    """In place of a signal: nothing of ours catches it."""


def test_what_a_killed_driver_had_is_not_done_again(tmp_path: Path, ray_session: None):
    place = Place(tmp_path, MANY)

    def die(stage: str, done: int, total: int, note: str) -> None:
        if done >= MANY // 3:
            raise Killed

    with pytest.raises(Killed):
        place.embed(die)
    assert not (tmp_path / "index" / "CURRENT").exists()
    stored = len([file for file in place.work.files() if file.endswith(".parquet")])
    assert stored >= MANY // 3 // SMALL_PARTS.max_part_items
    manifest = place.embed()
    assert manifest["rows"] == manifest["computed"] == MANY
    assert manifest["resumed"] >= MANY // 3
    place.check()


def test_a_killed_worker_is_replaced(tmp_path: Path, ray_session: None):
    place, killed = Place(tmp_path, MANY), []

    def kill(stage: str, done: int, total: int, note: str) -> None:
        if done and not killed:
            killed.extend(workers("ItemEmbedder"))
            for process in killed:
                os.kill(process, signal.SIGKILL)

    manifest = place.embed(kill)
    assert len(killed) == 1
    assert counts(manifest)[:4] == (MANY, 0, MANY, 0)
    place.check()


def workers(name: str) -> list[int]:
    """Processes below this one whose command line holds `name`."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if name in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except (ValueError, OSError):
            continue

    def is_ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_ours(parents[process]))

    return [process for process in found if is_ours(process)]


def test_a_driver_killed_by_signal(tmp_path: Path, ray_session: None):
    place = Place(tmp_path, MANY)
    (tmp_path / "config.yaml").write_text(dump_config(dataclasses.replace(TINY, embed=SMALL_PARTS)))
    options = [f"--{name}={tmp_path / folder}" for name, folder in (("model", "model"), ("data", "data"))]
    options += [f"--out={tmp_path / 'index'}", f"--config={tmp_path / 'config.yaml'}"]
    code = "import sys; from pixrec.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", code, "embed", *options], stderr=subprocess.PIPE, text=True, env=environment
    ) as run:
        while not place.work.files() and run.poll() is None:
            try:
                run.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        run.kill()
        run.communicate()
    manifest = place.embed()
    assert manifest["rows"] == manifest["computed"] + manifest["reused"] == MANY
    assert (run.returncode, manifest["reused"]) in ((-signal.SIGKILL, 0), (0, MANY))
    place.check()


def test_a_second_run_at_the_same_time_does_no_harm(tmp_path: Path, ray_session: None):
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


def test_a_damaged_model_is_the_users_to_cure(place: Place, capfd: pytest.CaptureFixture[str]):
    heads = place.folder / "model" / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-40])
    arguments = [f"--{name}={place.folder / folder}" for name, folder in (("model", "model"), ("data", "data"))]
    code = cli.main(["embed", *arguments, f"--out={place.folder / 'index'}"])
    assert code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"pixrec embed: {place.folder / 'model'} is damaged")
    (place.folder / "model" / "config.yaml").unlink()
    assert cli.main(["embed", *arguments, f"--out={place.folder / 'index'}"]) == 2
    assert "config.yaml" in capfd.readouterr().err.splitlines()[-1]
