"""The best possible scorer of the synthetic shop: the true distribution of the next item, given the history.

It knows the distribution of purchases (`World`) and the history. The shopper's taste is hidden from it as well, and is
inferred exactly, by forward filtering in a hidden Markov model. No scorer that sees the same can do better, so its
recall is the ceiling of the data set.

The text-only ceiling is that of an observer who knows the same distribution but sees only the text of each item: title,
brand, category and price. All looks of a product share these, so the observer knows how often each text is bought and
which looks it may stand for, but not which of them was bought. The ceiling holds for every text-only model, also for
one that has memorised the catalog.

Shapes: B histories · N items of the caller's table · Z tastes · G texts
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pixrec.data.sequences import Users
from pixrec.data.synthetic import World
from pixrec.errors import InputError
from pixrec.scorers.protocol import Scorer


class Oracle(Scorer):
    """A scorer whose scores are the probabilities of the next item.

    `item_ids` is the row order of the caller's item table; it may leave out items of the world (then a row of scores
    sums to less than one), and raises InputError when it names others.
    """

    def __init__(self, world: World, item_ids: Sequence[str], text_only: bool) -> None:
        row_of = {item_id: row for row, item_id in enumerate(world.item_ids)}
        unknown = [item_id for item_id in item_ids if item_id not in row_of]
        if unknown:
            raise InputError(f"item_id {unknown[0]!r} is not of this synthetic world; pass the config it was made with")
        self.name = "oracle_text_only" if text_only else "oracle"
        self._world = world
        rows = np.array([row_of[item_id] for item_id in item_ids], dtype=np.int64)
        group_of, self._emission, size = _groups(world, text_only)
        self._group = group_of[rows]
        self._size = size
        self._department = world.department[rows]
        self._group_department = np.empty(len(size), dtype=np.int64)
        self._group_department[group_of] = world.department

    def tastes(self, history: NDArray[np.integer]) -> NDArray[np.float64]:
        """(Z,) P(taste at the next event | history); `history` holds rows of the caller's table, oldest first."""
        transition = self._world.taste_transition
        belief = np.full(len(transition), 1 / len(transition))
        for group in self._group[history]:
            belief = belief * self._emission[group]
            belief = (belief / belief.sum()) @ transition
        return belief

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32, P(next item | history). Items an observer cannot tell apart have exactly equal scores."""
        belief = np.stack([self.tastes(history) for history in users.histories])
        last = np.array([self._department[history[-1]] for history in users.histories])
        category = self._world.category_transition[last][:, self._group_department]
        by_group = category * (belief @ self._emission.T) / self._size
        return torch.from_numpy(by_group[:, self._group].astype(np.float32))


def _groups(world: World, text_only: bool) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """What the observer can tell apart: group of each item (N,), P(group | its category, taste) (G, Z), sizes (G,)."""
    if not text_only:
        n = len(world.item_ids)
        return np.arange(n), world.emission, np.ones(n, dtype=np.int64)
    number: dict[tuple[str, str, int, float], int] = {}
    texts = zip(world.title, world.brand, world.department.tolist(), world.price.tolist(), strict=True)
    group_of = np.array([number.setdefault(text, len(number)) for text in texts])
    emission = np.zeros((len(number), world.emission.shape[1]))
    np.add.at(emission, group_of, world.emission)
    return group_of, emission, np.bincount(group_of)
