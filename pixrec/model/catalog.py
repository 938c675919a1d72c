"""The items of a prepared data set, ready to be encoded, and the one function that turns contents into vectors.

Training, batch embedding, evaluation and serving all embed through `Embedder`. Knows no Ray and no HTTP.

Shapes: U distinct items · B histories · N items of the catalog · D width of the shared space · S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from pixrec.config import Modalities
from pixrec.data.images import decode_image
from pixrec.data.items import ItemTable
from pixrec.model.encoding import Content, Histories, ItemEncoder, Items
from pixrec.model.towers import DualTower
from pixrec.model.vision import PictureTokens


class Catalog:
    """Items by row, tokenised once and decoded at first use; decoded pictures are kept up to `cache_bytes`.

    Where `tokens` hold every picture they are read in place of the pictures.
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
        self.tokens = tokens if tokens is not None and tokens.hold(table) else None
        self._text_ids: dict[int, np.ndarray] = {}
        self._pixels: dict[int, np.ndarray | None] = {}
        self._room = max(1, cache_bytes // (3 * encoder.image_size_px**2))

    def __len__(self) -> int:
        return len(self.table)

    def items(self, rows: np.ndarray, modalities: Modalities | Sequence[Modalities] = "both") -> Items:
        """Encode the items at `rows` (U,)."""
        new = [int(r) for r in rows if int(r) not in self._text_ids]
        for row, ids in zip(new, self.encoder.tokenize([self.table.text(r) for r in new]), strict=True):
            self._text_ids[row] = ids
        if modalities == "text":
            pixels: list[np.ndarray | None] = [None] * len(rows)
        else:
            pixels = [self._picture(int(r)) for r in rows]
        return self.encoder.items_from_tokens([self._text_ids[int(r)] for r in rows], pixels, modalities)

    def histories(
        self, histories: Sequence[np.ndarray], modalities: Modalities = "both"
    ) -> tuple[np.ndarray, Items, Histories]:
        """Encode histories of rows: the distinct rows (U,), their items, and the sequences over them."""
        distinct, local = distinct_rows(histories)
        items = self.items(distinct, modalities)
        return distinct, items, self.encoder.histories(items, local)

    def _picture(self, row: int) -> np.ndarray | None:
        if self.tokens is not None:
            stored = self.table.image(row)
            return None if stored is None else self.tokens.of(stored)
        if row not in self._pixels:
            data = self.table.image(row)
            pixels = None if data is None else decode_image(data, self.encoder.image_size_px)
            if len(self._pixels) >= self._room:
                self._pixels.pop(next(iter(self._pixels)))
            self._pixels[row] = pixels
        return self._pixels[row]


def distinct_rows(histories: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Distinct rows (U,) of all histories, and each history as indices into them."""
    distinct, inverse = np.unique(np.concatenate(histories), return_inverse=True)
    return distinct, np.split(inverse, np.cumsum([len(h) for h in histories])[:-1])


class Embedder:
    """A model in use: contents or rows in, unit vectors out as float32 arrays on the CPU.

    `identities` are the items with a learned vector of their own, in its order; only a compact tower has any.
    """

    def __init__(
        self,
        tower: DualTower,
        encoder: ItemEncoder,
        modalities: Modalities,
        max_history_items: int,
        identities: Sequence[str] = (),
    ) -> None:
        self.tower = tower.eval()
        self.encoder = encoder
        self.modalities = modalities
        self.compact = tower.compact
        self.max_history_items = self.compact.user.max_history_items if self.compact else max_history_items
        self.device = tower.log_temperature.device
        self._identity = {item_id: row for row, item_id in enumerate(identities)}

    @property
    def reads_item_vectors(self) -> bool:
        """Whether the user tower is content with the item vectors of the history."""
        return self.compact is not None

    def contents(self, contents: Sequence[Content], item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Item vectors (U, D) of contents given directly; `item_ids` where they are items of the catalog."""
        return self._items(self.encoder.items(contents, self.modalities), item_ids)

    def items(
        self,
        catalog: Catalog,
        rows: np.ndarray,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Item vectors (U, D) of the items at `rows`."""
        parts = []
        for batch in _batches(rows, batch_size):
            item_ids = [catalog.table.item_ids[row] for row in batch]
            parts.append(self._items(catalog.items(batch, self.modalities), item_ids))
            if progress:
                progress(sum(map(len, parts)), len(rows))
        return np.concatenate(parts)

    def users(self, catalog: Catalog, histories: Sequence[np.ndarray], item_vectors: np.ndarray | None) -> np.ndarray:
        """User vectors (B, D) of histories of rows, oldest first; only the last `max_history_items` are read.

        `item_vectors` (N, D) spare a compact tower the backbone; an interleaved one does not look at them.
        """
        recent = [np.asarray(h)[-self.max_history_items :] for h in histories]
        if self.compact is not None:
            if item_vectors is not None:
                return self.users_of_vectors([item_vectors[h] for h in recent])
            distinct, local = distinct_rows(recent)
            vectors = self.items(catalog, distinct)
            return self.users_of_vectors([vectors[h] for h in local])
        _, items, sequences = catalog.histories(recent, self.modalities)
        with torch.no_grad():
            return self.tower.user_vectors(items.to(self.device), sequences.to(self.device)).float().cpu().numpy()

    def users_of_vectors(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """User vectors (B, D) of a compact tower from the item vectors (L, D) of each history."""
        assert self.compact is not None
        lengths = torch.tensor([len(h) for h in histories])
        vectors = torch.zeros(len(histories), int(lengths.max()), histories[0].shape[1])
        for i, history in enumerate(histories):
            vectors[i, : len(history)] = torch.from_numpy(history.astype(np.float32))
        with torch.no_grad():
            last = (lengths - 1).to(self.device)
            return self.compact.user_vectors_at(vectors.to(self.device), last).float().cpu().numpy()

    def _items(self, items: Items, item_ids: Sequence[str] | None) -> np.ndarray:
        with torch.no_grad():
            vectors = self.tower.item_vectors(items.to(self.device))
            if self.compact is not None:
                known = [self._identity.get(i, -1) for i in item_ids] if item_ids else [-1] * len(vectors)
                vectors = self.compact.item_vectors(vectors, torch.tensor(known, device=self.device))
            return vectors.float().cpu().numpy()


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
