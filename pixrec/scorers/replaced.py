"""A catalog with its pictures or its texts replaced, for a trained model to be scored on.

What a model loses when all items look alike, or like nothing, is what it takes from looks. Knows items and pictures;
knows no model.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from pixrec.data.ids import sorted_order
from pixrec.data.items import ItemTable

Replaced = Literal["image_constant", "image_noise", "text_constant", "text_noise"]
REPLACED: tuple[Replaced, ...] = ("image_constant", "image_noise", "text_constant", "text_noise")
MEANINGS: dict[str, str] = {
    "image_constant": "the same grey picture for every item",
    "image_noise": "a picture of noise for every item",
    "text_constant": "the same text for every item",
    "text_noise": "every item under the text of another one",
}

GREY, CONSTANT_TEXT = 128, "item"


class ReplacedItems(ItemTable):
    """The items with one modality replaced; every item has it then, the other modality and all fields stay.

    Noise is a function of `seed` and the item's place among all ids, wherever it lies in the table. Pictures are
    `size_px` wide and high.
    """

    def __init__(self, items: ItemTable, how: Replaced, size_px: int, seed: int = 0) -> None:
        self.__dict__.update(items.__dict__)  # the table, its columns and rows are shared
        self.__dict__.pop("with_image", None)
        self._items, self._how, self._size, self._seed = items, how, size_px, seed
        by_id = sorted_order(items.item_ids)
        self._place = np.argsort(by_id)
        self._other = by_id[_derangement(len(items), seed)[self._place]] if how == "text_noise" else None
        self._grey = _png(np.full((size_px, size_px, 3), GREY, np.uint8))

    def text(self, row: int) -> str:
        if self._how == "text_constant":
            return CONSTANT_TEXT
        return self._items.text(row if self._other is None else int(self._other[row]))

    def images(self, rows: Sequence[int]) -> list[bytes | None]:
        if self._how == "image_constant":
            return [self._grey for _ in rows]
        if self._how == "image_noise":
            return [self._noise(row) for row in rows]
        return self._items.images(rows)

    def _noise(self, row: int) -> bytes:
        rng = np.random.default_rng([self._seed, int(self._place[row])])
        return _png(rng.integers(0, 256, (self._size, self._size, 3), dtype=np.uint8))

    @cached_property
    def with_image(self) -> np.ndarray:
        """bool (N,): all of them where pictures are replaced."""
        return np.ones(len(self), dtype=bool) if self._how.startswith("image") else self._items.with_image


def _derangement(n: int, seed: int) -> np.ndarray:
    """For each of n items another one: a random cycle through all of them."""
    cycle = np.random.default_rng([seed, n]).permutation(n)
    other = np.empty(n, dtype=np.int64)
    other[cycle] = np.roll(cycle, 1)
    return other


def _png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=1)
    return sink.getvalue()
