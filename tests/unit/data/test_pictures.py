"""The picture store: what goes in by parts comes out by row, whoever wrote, wherever it lies."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pixrec import storage
from pixrec.data.pictures import complete, open_pictures, picture_hash, write_part
from pixrec.errors import ArtifactError, OutputError

PICTURES = [None if row % 5 == 2 else bytes([row]) * (1 + 300 * row) for row in range(40)]
PART_ROWS = 16


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "pictures")


def write_all(uri):
    starts = range(0, len(PICTURES), PART_ROWS)
    return [write_part(uri, number, PICTURES[start : start + PART_ROWS]) for number, start in enumerate(starts)]


def test_pictures_are_read_by_row_in_any_order(uri):
    parts = write_all(uri)
    assert complete(uri, len(parts)) == len(PICTURES)
    pictures = open_pictures(uri)
    assert len(pictures) == len(PICTURES)
    rows = np.random.default_rng(0).integers(0, len(PICTURES), 100)
    assert pictures.read(rows) == [PICTURES[row] for row in rows]
    assert pictures.read([39, 0, 39, 2]) == [PICTURES[39], PICTURES[0], PICTURES[39], None]
    assert pictures.read([]) == []
    assert pictures.read_range(10, 35) == PICTURES[10:35]
    assert pictures.read_range(7, 7) == []
    assert pictures.present().tolist() == [picture is not None for picture in PICTURES]
    assert pictures.hashes([3, 2]) == [picture_hash(PICTURES[3]), None]


@pytest.mark.parametrize("rows", [[40], [-1], [0, 1000]])
def test_a_row_that_is_none_is_refused(uri, rows):
    complete(uri, len(write_all(uri)))
    with pytest.raises(IndexError, match="has rows 0 to 39"):
        open_pictures(uri).read(rows)


def test_a_store_goes_to_another_process_as_its_place(uri):
    complete(uri, len(write_all(uri)))
    sent = pickle.dumps(open_pictures(uri))
    assert len(sent) < 300
    assert pickle.loads(sent).read([7]) == [PICTURES[7]]


def test_a_store_may_be_moved_and_copied(uri, tmp_path):
    complete(uri, len(write_all(uri)))
    storage.copy_folder(uri, str(tmp_path / "copy"))
    shutil.move(uri, tmp_path / "moved")
    for place in ("copy", "moved"):
        assert open_pictures(str(tmp_path / place)).read_range(0, 40) == PICTURES


def test_parts_are_written_side_by_side_in_any_order(uri):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: write_part(uri, row, PICTURES[row : row + 1]), reversed(range(40))))
    assert complete(uri, 40) == 40
    assert open_pictures(uri).read_range(0, 40) == PICTURES


def test_a_part_written_again_replaces_itself(uri):
    first = write_part(uri, 0, [b"old", b"older"])
    assert write_part(uri, 0, [b"new"]) != first
    write_part(uri, 1, PICTURES)
    write_part(uri, 1, PICTURES)
    assert complete(uri, 2) == 41
    assert open_pictures(uri).read([0, 1]) == [b"new", PICTURES[0]]
    assert len(storage.list_files(f"{uri}/data")) == 2, "what was replaced takes no space"
    assert complete(uri, 2) == 41
    assert open_pictures(uri).read([0, 1]) == [b"new", PICTURES[0]]


def test_the_hash_of_a_part_is_that_of_its_content(tmp_path):
    one = write_all(str(tmp_path / "one"))
    assert write_all(str(tmp_path / "other")) == one
    assert len(set(one)) == len(one)
    contents = ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"abc", None], [None, b"abc"], [b"abc", b""], [])
    assert len({write_part(str(tmp_path / "third"), 0, content) for content in contents}) == len(contents)


def test_a_store_is_read_once_it_is_complete(uri):
    with pytest.raises(ArtifactError, match=r"pictures: .*; run pixrec prepare again"):
        open_pictures(uri)
    write_part(uri, 0, PICTURES)
    write_part(uri, 2, PICTURES)
    with pytest.raises(ArtifactError, match="no complete one"):
        open_pictures(uri)
    with pytest.raises(ArtifactError, match=r"lacks 1 of its 3 parts, the first is 1; run pixrec prepare again"):
        complete(uri, 3)
    assert complete(uri, 1) == 40, "parts of a run that made more of them are left out"
    assert len(open_pictures(uri)) == 40


def test_a_store_may_be_empty_or_have_no_picture(tmp_path):
    nothing, blank = str(tmp_path / "nothing"), str(tmp_path / "blank")
    write_part(nothing, 0, [])
    assert complete(nothing, 1) == 0
    assert open_pictures(nothing).read_range(0, 0) == []
    assert open_pictures(nothing).present().shape == (0,)
    write_part(blank, 0, [None, None])
    assert complete(blank, 1) == 2
    assert open_pictures(blank).read([1, 0]) == [None, None]


def test_a_file_that_went_is_said(uri):
    complete(uri, len(write_all(uri)))
    pictures = open_pictures(uri)
    storage.remove(storage.list_files(f"{uri}/data")[0])
    with pytest.raises(ArtifactError, match=r"damaged: .*; run pixrec prepare again"):
        pictures.read_range(0, 40)
    with pytest.raises(ArtifactError, match="1 of its 3 files are gone"):
        complete(uri, 3)


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot be written: .*; choose another --out"):
        write_part(str(tmp_path / "file"), 0, PICTURES)
