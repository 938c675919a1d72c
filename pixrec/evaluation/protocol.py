"""The protocol: every held-out target is ranked among the whole catalog, by every scorer.

Knows scorers and held-out events. Does not know what a scorer is made of, nor how ranks are summed up (`results`).

Shapes: B users of a block · N items. "Seen" items are those of the user's own history: `allowed` leaves them among the
candidates, `filtered` takes them out (the target always stays in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pixrec.config import EvaluateConfig
from pixrec.console import Progress
from pixrec.data.ids import sorted_order
from pixrec.data.sequences import HeldOut, sample_users
from pixrec.errors import InputError
from pixrec.evaluation.results import Evaluation, Outcome, reported_ks
from pixrec.metrics import ListStatistics, rank_targets, top_rows
from pixrec.scorers import Scorer

MAX_SCORES = 2**25
"""Scores of one block (128 MB as float32). A block has at least one user, so this bounds the memory of a catalog of up
to so many items; with masks and copies a block takes up to four times as much."""


class Block(NamedTuple):
    """What became of B users: ranks (B,) int64 as `Ranked`; ties (B,) int64 and lists (B, K) of rows as `top_rows`
    gives them, both with seen items as the config has it."""

    allowed: np.ndarray
    filtered: np.ndarray
    ties: np.ndarray
    top: np.ndarray


@dataclass(frozen=True)
class Task:
    """What every scorer is ranked on."""

    held_out: HeldOut
    training_counts: np.ndarray
    """(N,) events of each item that training may see"""
    tie_order: np.ndarray | None
    """(N,) rows in the order of their ids, where that is not the order they lie in"""
    config: EvaluateConfig

    @property
    def num_items(self) -> int:
        return len(self.training_counts)

    @property
    def users_per_block(self) -> int:
        return max(1, min(self.config.batch_size, MAX_SCORES // max(1, self.num_items)))

    def rank(self, scorer: Scorer, block: HeldOut) -> Block:
        """Score and rank a block of users. Raises ValueError where the scores are not (B, N)."""
        scores = scorer.scores(block.users)
        if scores.shape != (len(block.targets), self.num_items):
            raise ValueError(
                f"scorer {scorer.name!r} gave scores {tuple(scores.shape)} for {len(block.targets)} users "
                f"and {self.num_items} items"
            )
        order = None if self.tie_order is None else torch.from_numpy(self.tie_order)
        filtered, longest = self.config.seen == "filtered", max(reported_ks(self.config))
        ranked = rank_targets(scores, block.targets, block.histories)
        lists = top_rows(scores, longest, order, block.histories if filtered else None)
        return Block(ranked.allowed, ranked.filtered, ranked.filtered_ties if filtered else ranked.ties, lists)


class Collector:
    """Puts blocks of users together, in whatever order they come, to the outcome of one scorer."""

    def __init__(self, task: Task) -> None:
        users = len(task.held_out.targets)
        self._columns = [np.zeros(users, dtype=np.int64) for _ in range(3)]
        self._lists = ListStatistics(reported_ks(task.config), task.training_counts)
        self.done = 0

    def add(self, users: Sequence[int] | np.ndarray, block: Block) -> None:
        """`users` (B,): which of the task's users the block holds."""
        for column, values in zip(self._columns, block[:3], strict=True):
            column[users] = values
        self._lists.add(block.top)
        self.done += len(users)

    def outcome(self) -> Outcome:
        allowed, filtered, ties = self._columns
        return Outcome({"allowed": allowed, "filtered": filtered}, ties, self._lists.results())


Ranker = Callable[[Scorer, Task, Progress], Outcome]


@torch.no_grad()
def rank_here(scorer: Scorer, task: Task, progress: Progress) -> Outcome:
    """Rank all users of the task in this process, a block after the other."""
    collector, total = Collector(task), len(task.held_out.targets)
    for first in range(0, total, task.users_per_block):
        users = np.arange(first, min(first + task.users_per_block, total))
        collector.add(users, task.rank(scorer, task.held_out.only(users)))
        progress(scorer.name, collector.done, total)
    return collector.outcome()


def evaluate_scorers(
    scorers: Sequence[Scorer],
    held_out: HeldOut,
    config: EvaluateConfig,
    *,
    training_counts: np.ndarray,
    with_image: np.ndarray,
    item_ids: Sequence[str] | None = None,
    rank: Ranker = rank_here,
    progress: Progress | None = None,
) -> Evaluation:
    """Rank every held-out target among all N items by every scorer.

    training_counts, with_image (N,) by item row. item_ids break ties within lists, so that coverage and novelty do
    not depend on the catalog's order. progress(scorer name, users done, users in total) is called after each block.
    Raises InputError when there is nobody to rank, ValueError on scorers of one name or of another width.
    """
    names = [scorer.name for scorer in scorers]
    if not scorers or len(set(names)) < len(names):
        raise ValueError(f"scorers {names}: at least one is needed, each with a name of its own")
    if len(with_image) != len(training_counts):
        raise ValueError(f"with_image must have one entry for each of {len(training_counts)} items")
    if not len(held_out.targets):
        raise InputError("the data set holds out no event to evaluate on; users with two events or more are needed")
    held_out = sample_users(held_out, config.max_users, config.seed)
    task = Task(held_out, np.asarray(training_counts), _tie_order(item_ids), config)
    outcomes = {scorer.name: rank(scorer, task, progress or (lambda *_: None)) for scorer in scorers}
    return Evaluation(held_out, outcomes, task.training_counts, np.asarray(with_image, bool), config)


def _tie_order(item_ids: Sequence[str] | None) -> np.ndarray | None:
    if item_ids is None:
        return None
    order = sorted_order(item_ids)
    return None if np.array_equal(order, np.arange(len(order))) else order
