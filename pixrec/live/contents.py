"""Items of a catalog and live ones as an interleaved user tower reads them: text and picture, by one number for each.

Numbers below N are rows of the catalog; a live item has one above, which its content keeps as long as it does not
change. Knows items; knows no model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pixrec.data.items import ItemTable
from pixrec.live.overlay import Overlay, View
from pixrec.live.store import AddedItem, StoreAway

_KEPT = 1000
"""Contents of live items that are kept; the one not asked for the longest goes first."""


class LiveContents(ItemTable):
    """The table of a catalog, and the contents of the live items that `number` was asked for."""

    def __init__(self, items: ItemTable, live: Overlay) -> None:
        self._items, self._live = items, live
        self._contents: OrderedDict[int, AddedItem] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def number(self, view: View, item_id: str) -> int | None:
        """The number of an item of the catalog or of the view; None: unknown, or the store did not give its content."""
        at = view.row_of.get(item_id)
        if at is None or not view.has_content[at]:
            return self._items.row_of.get(item_id)
        number = len(self._items) + view.first_number + at
        if number not in self._contents:
            try:
                content = self._live.content_of(item_id)
            except StoreAway:
                content = None
            if content is None:
                return None
            self._contents[number] = content
        self._contents.move_to_end(number)
        while len(self._contents) > _KEPT:
            self._contents.popitem(last=False)
        return number

    def text(self, row: int) -> str:
        return self._contents[row].text if row >= len(self) else self._items.text(row)

    def images(self, rows: Sequence[int]) -> list[bytes | None]:
        of_catalog = [row for row in rows if row < len(self)]
        found = dict(zip(of_catalog, self._items.images(of_catalog), strict=True)) if of_catalog else {}
        return [self._contents[row].image if row >= len(self) else found[row] for row in rows]
