"""How an items table is cut: every row once, in order, in pieces neither tiny nor huge."""

import pytest

from pixrec import storage
from pixrec.data.slices import slices
from pixrec.storage import RowGroup


def cut(monkeypatch: pytest.MonkeyPatch, *groups: RowGroup) -> list[int]:
    """Rows of the slices of one file of these row groups, after a look at their order."""
    monkeypatch.setattr(storage, "row_groups", lambda file: list(groups))
    found = slices(["items.parquet"])
    assert [piece.number for piece in found] == list(range(len(found)))
    rows = [(piece.group, row) for piece in found for row in range(piece.start, piece.stop)]
    assert rows == [(number, row) for number, group in enumerate(groups) for row in range(group.rows)]
    return [piece.stop - piece.start for piece in found]


def test_slices_of_a_group_are_of_like_size(monkeypatch):
    assert cut(monkeypatch, RowGroup(300, 1000), RowGroup(100, 1000)) == [100, 100, 100, 100]


def test_a_large_table_of_small_groups_is_no_swarm_of_files(monkeypatch):
    sizes = cut(monkeypatch, *[RowGroup(2_000, 2_000 * 12_000)] * 500)
    assert len(sizes) == 1500
    assert min(sizes) > 600


def test_a_slice_holds_so_many_bytes_at_most(monkeypatch):
    sizes = cut(monkeypatch, RowGroup(2_000, 2_000 * 1024**2))
    assert max(sizes) <= 64


def test_a_group_without_rows_has_no_slice(monkeypatch):
    assert cut(monkeypatch, RowGroup(0, 0), RowGroup(5, 100)) == [5]
