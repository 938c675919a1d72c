"""The work folder: what was begun, what was finished, what goes when."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pixrec import storage
from pixrec.artifact import check_index_writable, index_version, list_versions
from pixrec.artifact.unfinished import Unfinished, Vanished, read_part, sweep
from pixrec.errors import InputError

TABLE = pa.table({"item_id": ["a", "b"]})


def test_what_was_begun_and_not_finished_is_lost(tmp_path: Path):
    work = Unfinished(str(tmp_path), "m" * 32)
    assert work.files() == []
    part = work.finish(work.start(2), TABLE)
    work.start(7)
    work.start(5)
    assert read_part(part).equals(TABLE)
    assert [file for file in work.files() if file.endswith(".parquet")] == [part]
    assert work.lost_rows(work.files()) == 12
    check_index_writable(str(tmp_path))  # a run that was killed before its first version can be run again


def test_models_do_not_mix(tmp_path: Path):
    one, other = Unfinished(str(tmp_path), "1" * 32), Unfinished(str(tmp_path), "2" * 32)
    one.finish(one.start(2), TABLE)
    assert len(one.files()) == 2
    assert other.files() == []


def half_written(work: Unfinished, rows: int) -> str:
    """What a worker of the run leaves that dies as it writes a part."""
    part = storage.join(work.uri, f"{work.start(rows)}.parquet.partial-0a1b2c3d")
    storage.write_bytes(part, b"half")
    return part


def test_clearing_spares_what_another_run_is_writing(tmp_path: Path):
    other, mine = (Unfinished(str(tmp_path), "m") for _ in range(2))
    half_written(other, 4)
    left_behind = mine.files()
    mine.finish(mine.start(2), TABLE)
    half_written(copy.copy(mine), 5)  # as a worker has it
    being_written = half_written(other, 3)
    mine.clear(left_behind)
    assert mine.files() == [being_written]
    mine.clear(mine.files())
    assert not Path(mine.uri).exists()


def test_a_run_clears_up_what_its_own_killed_worker_was_writing(tmp_path: Path):
    work = Unfinished(str(tmp_path), "m")
    left_behind = work.files()
    half_written(work, 3)
    work.clear(left_behind)
    assert not Path(work.uri).exists()


def test_a_part_that_is_gone_is_told_from_one_that_is_damaged(tmp_path: Path):
    with pytest.raises(Vanished):
        read_part(str(tmp_path / "gone.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"no Parquet")
    with pytest.raises(InputError, match="cannot be read"):
        read_part(str(tmp_path / "bad.parquet"))


def test_what_nobody_came_back_for_is_swept_after_a_week(tmp_path: Path):
    with index_version(str(tmp_path), "m" * 32, 2, "float32", {}) as writer:
        writer.add(["a"], np.ones((1, 2)), ["hash"])
    versions = tmp_path / "versions"
    old, new = "20200101T000000000000", "29990101T000000000000"
    for name in (
        f".{old}-mmmmmmmm.partial-1234/part-00000.parquet",
        f".{new}-mmmmmmmm.partial-1234/part-00000.parquet",
        f".unfinished-old/{old}-run-1.parquet",
        f".unfinished-new/{old}-run-1.parquet",
        f".unfinished-new/{new}-run-2.started-5",
    ):
        storage.write_bytes(str(versions / name), b"")
    sweep(str(tmp_path))
    left = {path.name for path in versions.iterdir() if path.name.startswith(".")}
    assert left == {f".{new}-mmmmmmmm.partial-1234", ".unfinished-new"}
    assert len(list_versions(str(tmp_path))) == 1
