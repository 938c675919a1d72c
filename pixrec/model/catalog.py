"""The items of a prepared data set, ready to be encoded, and the one class that turns contents into vectors.

Training, batch embedding, evaluation and serving all embed through `Embedder`. Knows no Ray and no HTTP.

Shapes: U distinct items · B histories · N items of the catalog · D width of the shared space · K tokens of a
picture · X numbers of a picture token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from pixrec.config import Modalities
from pixrec.data.ids import IdIndex
from pixrec.data.images import middle
from pixrec.data.items import ItemTable
from pixrec.data.pictures import picture_hash
from pixrec.data.tokens import PictureTokens
from pixrec.model.compact import UNKNOWN_TIME
from pixrec.model.encoding import Content, Histories, ItemEncoder, Items
from pixrec.model.towers import DualTower

TEXTS_KEPT = 200_000
"""Tokenised texts that a catalog keeps."""

MIDDLE = 0.65
"""Share of each side of a picture searched by that is looked at once more: a photograph shows its product among other
things, mostly in the middle."""

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


class Catalog:
    """Items by row, tokenised once and decoded at first use; decoded pictures are kept up to `cache_bytes`, of which 0
    keeps no text either. May be asked by several threads, which wait for each other.

    A picture whose `tokens` are stored is neither decoded nor shown to the vision part.
    """

    def __init__(
        self,
        table: ItemTable,
        encoder: ItemEncoder,
        cache_bytes: int = 2_000_000_000,
        tokens: PictureTokens | None = None,
    ) -> None:
        self.table = table
        self.encoder = encoder
        self.tokens = tokens
        self._text_ids: dict[int, np.ndarray] = {}
        self._pixels: dict[int, np.ndarray | None] = {}
        self._keeps = cache_bytes > 0
        self._room = max(1, cache_bytes // (3 * encoder.image_size_px**2))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.table)

    def items(self, rows: np.ndarray, modalities: Modalities | Sequence[Modalities] = "both") -> Items:
        """Encode the items at `rows` (U,)."""
        with self._lock:
            text_ids = self._texts(rows)
            pixels = [None] * len(rows) if modalities == "text" else self._pictures(rows)
        return self.encoder.items_from_tokens(text_ids, pixels, modalities)

    def histories(
        self, histories: Sequence[np.ndarray], modalities: Modalities = "both"
    ) -> tuple[np.ndarray, Items, Histories]:
        """Encode histories of rows: the distinct rows (U,), their items, and the sequences over them."""
        distinct, local = distinct_rows(histories)
        items = self.items(distinct, modalities)
        return distinct, items, self.encoder.histories(items, local)

    def _texts(self, rows: np.ndarray) -> list[np.ndarray]:
        """Text tokens of each row."""
        new = [int(row) for row in rows if int(row) not in self._text_ids]
        self._text_ids |= zip(new, self.encoder.tokenize([self.table.text(row) for row in new]), strict=True)
        found = [self._text_ids[int(row)] for row in rows]
        if not self._keeps or len(self._text_ids) > TEXTS_KEPT:
            self._text_ids.clear()
        return found

    def _pictures(self, rows: np.ndarray) -> list[np.ndarray | None]:
        """Of each row pixels (height, width, 3) uint8 or stored tokens (K, X) float16; None without a picture."""
        wanted = rows.tolist()
        found = {row: self._pixels[row] for row in wanted if row in self._pixels}
        unknown = [row for row in dict.fromkeys(wanted) if row not in found]
        data = self.table.images(unknown)
        stored: Sequence[np.ndarray | None] = [None] * len(unknown)
        if self.tokens is not None:
            stored = self.tokens.of_hashes([None if picture is None else picture_hash(picture) for picture in data])
        for row, picture, tokens in zip(unknown, data, stored, strict=True):
            found[row] = self._decoded(row, picture) if tokens is None else tokens
        return [found[row] for row in wanted]

    def _decoded(self, row: int, picture: bytes | None) -> np.ndarray | None:
        """The pixels of a picture, which are kept under its row; the oldest go where there is no room."""
        if len(self._pixels) >= self._room:
            self._pixels.pop(next(iter(self._pixels)))
        self._pixels[row] = None if picture is None else self.encoder.decode(picture)
        return self._pixels[row]


def distinct_rows(histories: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Distinct rows (U,) of all histories, and each history as indices into them."""
    distinct, inverse = np.unique(np.concatenate(histories), return_inverse=True)
    return distinct, np.split(inverse, np.cumsum([len(h) for h in histories])[:-1])


class Embedder:
    """A model in use: contents or rows in, unit vectors out as float32 arrays on the CPU.

    `embedded_ids` are the items that have a learned vector, each with its row; only a compact tower has any.
    """

    def __init__(
        self,
        tower: DualTower,
        encoder: ItemEncoder,
        modalities: Modalities,
        max_history_items: int,
        embedded_ids: IdIndex | None = None,
        precision: Literal["float32", "bf16"] = "float32",
    ) -> None:
        """precision: `bf16` runs the item tower and an interleaved user tower under autocast."""
        self.precision = precision
        self.tower = tower.eval()
        self.encoder = encoder
        self.modalities = modalities
        self.compact = tower.compact
        self.max_history_items = self.compact.user.max_history_items if self.compact else max_history_items
        self.device = tower.log_temperature.device
        self._id_row = embedded_ids

    @property
    def reads_item_vectors(self) -> bool:
        """Whether the user tower reads the item vectors of a history, instead of pictures and text."""
        return self.compact is not None

    def contents(self, contents: Sequence[Content], item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Item vectors (U, D) of contents given directly; `item_ids` where they are items of the catalog."""
        return self._items(self.encoder.items(contents, self.modalities), item_ids)

    def content_batches(
        self, batches: Sequence[tuple[list[Content], list[str]]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """`contents` of each batch, (contents, item_ids), in turn, and what a search compares (U, C) where that is
        something else."""
        encoded = ahead(lambda batch: self.encoder.items(batch[0], self.modalities), batches)
        for (_, item_ids), items in zip(batches, encoded, strict=True):
            yield self._both(items, item_ids)

    def query(self, content: Content) -> np.ndarray | None:
        """What a search for this content compares with items' search vectors, (C,): the products are the mean cosine
        over the parts that it has, of a picture over the whole and its middle. None where item vectors are compared.
        """
        views = [content]
        if content.pixels is not None:
            views.append(Content(content.text, middle(content.pixels, MIDDLE)))
        _, found = self._both(self.encoder.items(views, self.modalities), None)
        return None if found is None else found.mean(0) / max(1.0, float(np.square(found[0]).sum()))

    def items(
        self,
        catalog: Catalog,
        rows: np.ndarray,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Item vectors (U, D) of the items at `rows`."""
        return self.items_and_search(catalog, rows, batch_size, progress)[0]

    def items_and_search(
        self,
        catalog: Catalog,
        rows: np.ndarray,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """As `items`, and what a search compares (U, C) where that is something else."""
        parts, searched, batches = [], [], list(_batches(rows, batch_size))
        for batch, items in zip(batches, ahead(lambda b: catalog.items(b, self.modalities), batches), strict=True):
            vectors, content = self._both(items, [catalog.table.item_ids[row] for row in batch])
            parts.append(vectors)
            if content is not None:
                searched.append(content)
            if progress:
                progress(sum(map(len, parts)), len(rows))
        return np.concatenate(parts), np.concatenate(searched) if searched else None

    def users(
        self,
        catalog: Catalog,
        histories: Sequence[np.ndarray],
        item_vectors: np.ndarray | None,
        timestamps: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """User vectors (B, D) of histories of rows, oldest first; only the last `max_history_items` are read.

        A compact tower reads `item_vectors` (N, D), which are computed where they are not given, and the `timestamps`
        of the histories' events (milliseconds or UNKNOWN_TIME; None: all unknown). An interleaved tower ignores both.
        """
        recent = [np.asarray(h)[-self.max_history_items :] for h in histories]
        if self.compact is not None:
            if item_vectors is not None:
                return self.users_of_vectors([item_vectors[h] for h in recent], timestamps)
            distinct, local = distinct_rows(recent)
            vectors = self.items(catalog, distinct)
            return self.users_of_vectors([vectors[h] for h in local], timestamps)
        _, items, sequences = catalog.histories(recent, self.modalities)
        with torch.no_grad(), self._autocast():
            users = self.tower.user_vectors(items.to(self.device), sequences.to(self.device))
        return self._whole(users).cpu().numpy()

    def users_of_vectors(
        self, histories: Sequence[np.ndarray], timestamps: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """User vectors (B, D) of a compact tower from the item vectors (L, D) of each history.

        `timestamps`: of each history's events, in milliseconds or UNKNOWN_TIME, the last L of which count.
        """
        assert self.compact is not None
        lengths = torch.tensor([len(h) for h in histories])
        vectors = torch.zeros(len(histories), int(lengths.max()), histories[0].shape[1])
        for i, history in enumerate(histories):
            vectors[i, : len(history)] = torch.from_numpy(history.astype(np.float32))
        padded = None
        if timestamps is not None and self.compact.user.reads_times:
            padded = torch.full(vectors.shape[:2], UNKNOWN_TIME)
            for i, (length, times) in enumerate(zip(lengths.tolist(), timestamps, strict=True)):
                padded[i, :length] = torch.from_numpy(np.asarray(times, dtype=np.int64)[-length:])
            padded = padded.to(self.device)
        with torch.no_grad():
            last = (lengths - 1).to(self.device)
            return self.compact.user_vectors_at(vectors.to(self.device), last, padded).float().cpu().numpy()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _whole(self, vectors: torch.Tensor) -> torch.Tensor:
        """In float32, and where they are unit vectors of length 1 in that too."""
        normalise = self.precision == "bf16" and self.tower.unit
        return F.normalize(vectors.float(), dim=-1) if normalise else vectors.float()

    def _items(self, items: Items, item_ids: Sequence[str] | None) -> np.ndarray:
        return self._both(items, item_ids)[0]

    def _both(self, items: Items, item_ids: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Item vectors (U, D) and search vectors (U, C)."""
        with torch.no_grad():
            with self._autocast():
                vectors = self.tower.item_vectors(items.to(self.device))
            vectors = self._whole(vectors)
            searched = self.tower.search_vectors(vectors)
            if self.compact is not None:
                known = np.full(len(vectors), -1)
                if item_ids and self._id_row is not None:
                    known = self._id_row.rows_of(pa.array(item_ids, pa.large_string())).astype(np.int64)
                vectors = self.compact.item_vectors(vectors, torch.from_numpy(known).to(self.device))
            return vectors.float().cpu().numpy(), None if searched is None else searched.float().cpu().numpy()


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def ahead(prepare: Callable[[_Given], _Made], values: Iterable[_Given]) -> Iterator[_Made]:
    """`prepare` of each value, in order. A thread prepares the next one while the caller works, so that a model does
    not wait for its tokenizer."""
    with ThreadPoolExecutor(1) as thread:
        coming: Future[_Made] | None = None
        for value in values:
            ready, coming = coming, thread.submit(prepare, value)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
