"""What is like the last items of a history by the vectors of frozen encoders, which no purchase has shaped: nothing is
trained, and an item that nobody has bought is as near as any other. Knows vectors and rows; knows no files.

Shapes: B users · N items · C width of content vectors, text and picture side by side · S parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pixrec.data.sequences import Users
from pixrec.index import ROW_MULTIPLE, shared_tensor
from pixrec.scorers.protocol import Scorer

TEMPERATURES = (0.05, 0.1)
"""Of the softmax over cosines: near, and less near. Chosen on validation, as the next two (benchmarks/LOG.md)."""
DECAY, LAST_ITEMS = 0.7, 5
"""The weight of an item beside the one after it; how many items of a history count."""
_ITEMS_AT_A_TIME = 8_192  # whose vectors stay in a cache
_MAX_CHANCES = 2**24  # of the history's items of a pass: 64 MB
_LEAST = 1e-30

Moved = tuple[np.ndarray, np.ndarray]
"""Columns (E,) and the content vectors (E, C) that stand there in place of the catalog's; from N on, further items."""


class ContentNeighbours(Scorer):
    """The neighbours of each of a history's last items are a softmax over the cosines of its text, or of its picture,
    with those of all others; a user's are the mean of these, the later items weighing more."""

    name = "content_neighbours"
    needs = ("model",)

    def __init__(self, content: np.ndarray) -> None:
        """content: (N, C), unit vectors of the texts and then of the pictures; zeros for what an item has not."""
        self._total, half = len(content), content.shape[1] // 2
        sides = {"text": slice(0, half), "picture": slice(half, content.shape[1])}
        self._sides = {name: side for name, side in sides.items() if content[:, side].any()}
        self._lacking = [torch.from_numpy(~content[:, side].any(1)) for side in self._sides.values()]
        self._vectors = shared_tensor(content)
        self.parts = [f"alike in {name} at {at:g}" for name in self._sides for at in TEMPERATURES]
        """What the S distributions are of."""

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32: the logarithm of each item's chance to be next, the mean of all parts."""
        return self.chances(users.histories).mean(0).clamp_(min=_LEAST).log_()

    @torch.no_grad()
    def chances(self, histories: Sequence[np.ndarray], moved: Moved | None = None) -> torch.Tensor:
        """(S, B, N) float32 that sum to 1, or are 0 where nothing is known of the history's items; with further columns
        for items that `moved` adds."""
        total = max(self._total, 0 if moved is None else int(moved[0].max(initial=-1)) + 1)
        last = [np.asarray(history[-LAST_ITEMS:], dtype=np.int64) for history in histories]
        rows = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *last]))
        users = torch.from_numpy(np.repeat(np.arange(len(last)), [len(one) for one in last]))
        ages = np.concatenate([np.zeros(0), *(np.arange(len(one) - 1, -1, -1) for one in last)])
        weights = torch.from_numpy(DECAY**ages).float().unsqueeze(1)
        found = torch.zeros(len(self._sides), len(TEMPERATURES), len(last), total)
        for some in torch.arange(len(rows)).split(max(1, _MAX_CHANCES // max(1, total))):
            for parts, cosines in zip(found, self._cosines(rows[some], total, moved), strict=True):
                for part, temperature in zip(parts, TEMPERATURES, strict=True):
                    near = (cosines / temperature).softmax(1).nan_to_num_(0.0)  # of an item without content, nothing
                    part.index_add_(0, users[some], near.mul_(weights[some]))
        found = found.flatten(0, 1)
        return found.div_(found.sum(2, keepdim=True).clamp(min=_LEAST))

    def _cosines(self, rows: torch.Tensor, total: int, moved: Moved | None) -> torch.Tensor:
        """By text, by picture (M, total) of items by their rows (M,) with all others; minus infinity for themselves and
        what lacks a text or a picture, everywhere where they lack it."""
        sides, cosines = list(self._sides.values()), torch.full((len(self._sides), len(rows), total), -torch.inf)
        given = self._vectors[rows].float()
        room = torch.zeros(min(_ITEMS_AT_A_TIME, self._total + -self._total % ROW_MULTIPLE), given.shape[1])
        for start in range(0, self._total, _ITEMS_AT_A_TIME):
            block = self._vectors[start : start + _ITEMS_AT_A_TIME]
            room[: len(block)] = block  # into memory that is there: to ask for new takes longer than to convert
            whole = room[: len(block) + -len(block) % ROW_MULTIPLE]  # or equal items differ in the last bit
            for found, side in zip(cosines, sides, strict=True):
                found[:, start : start + len(block)] = (given[:, side] @ whole[:, side].T)[:, : len(block)]
        for found, side, lacking in zip(cosines, sides, self._lacking, strict=True):
            found[:, : self._total].masked_fill_(lacking, -torch.inf)
            if moved is not None:
                columns, vectors = moved[0], torch.from_numpy(np.asarray(moved[1][:, side], np.float32))
                found[:, columns] = (given[:, side] @ vectors.T).masked_fill_(~vectors.any(1), -torch.inf)
            found[torch.arange(len(rows)), rows] = -torch.inf
            found.masked_fill_(lacking[rows].unsqueeze(1), -torch.inf)
        return cosines
