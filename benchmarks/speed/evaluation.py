"""The whole evaluation of given vectors beside a plain script that sorts every user's scores; and a large catalog.

The plain script is what a notebook does: the scores of all users at once, `argsort`, the place of the target. It has
no ties, no filtered setting, no intervals, no coverage and no novelty.
"""

from __future__ import annotations

import functools
import resource
import time

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.timing import Row, seconds_each
from pixrec.config import EvaluateConfig
from pixrec.data.sequences import HeldOut
from pixrec.evaluation import Collector, Task, evaluate_scorers
from pixrec.evaluation.protocol import MAX_SCORES
from pixrec.scorers import Scorer, Users

WIDTH = 128
USERS, ITEMS = 6_040, 3_416  # MovieLens-1M
LARGE_ITEMS, LARGE_USERS = 100_000, 2_000  # a slice of 100,000 users
PLAIN_BLOCK = 64  # users that the plain script can afford at a time on the large catalog
PAPER = 1_000_000  # users and items of the extrapolation


class Given(Scorer):
    """Inner products of given vectors; users are numbered."""

    name = "given"

    def __init__(self, users: torch.Tensor, items: torch.Tensor) -> None:
        self.users, self.items = users, items

    def scores(self, users: Users) -> torch.Tensor:
        return self.users[[int(user_id) for user_id in users.user_ids]] @ self.items.T


def problem(num_users: int, num_items: int) -> tuple[Given, HeldOut, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    users, items = (F.normalize(torch.randn(n, WIDTH, generator=generator), dim=-1) for n in (num_users, num_items))
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, num_items, 20) for _ in range(num_users)]
    held_out = HeldOut([str(u) for u in range(num_users)], histories, rng.integers(0, num_items, num_users))
    return Given(users, items), held_out, rng.zipf(1.3, num_items).clip(max=50_000)


def plain(scorer: Given, held_out: HeldOut, block: int) -> float:
    """Mean reciprocal rank by sorting."""
    total = 0.0
    for first in range(0, len(held_out.targets), block):
        order = (scorer.users[first : first + block] @ scorer.items.T).argsort(dim=1, descending=True)
        targets = torch.from_numpy(held_out.targets[first : first + block])
        total += float((1 / (1 + (order == targets[:, None]).float().argmax(dim=1))).sum())
    return total / len(held_out.targets)


def whole(scorer: Given, held_out: HeldOut, counts: np.ndarray, config: EvaluateConfig) -> dict:
    """Both settings, all metrics, ties, coverage, novelty, buckets and 1,000 resamples for each interval."""
    with_image = np.ones(len(counts), bool)
    evaluation = evaluate_scorers([scorer], held_out, config, training_counts=counts, with_image=with_image)
    return evaluation.metrics_json("leave_one_out")


def run() -> list[Row]:
    return [*_movielens(), *_large()]


def _movielens() -> list[Row]:
    scorer, held_out, counts = problem(USERS, ITEMS)
    ours = functools.partial(whole, scorer, held_out, counts, EvaluateConfig())
    theirs = functools.partial(plain, scorer, held_out, USERS)
    taken = seconds_each({"ours": ours, "plain": theirs}, rounds=3)
    assert abs(ours()["results"]["given"]["mrr"] - theirs()) < 1e-4, "both rank alike"
    return [
        Row(
            what=f"evaluation of {USERS:,} users x {ITEMS:,} items x {WIDTH}, all metrics and intervals",
            ours=USERS / taken["ours"],
            alternative="argsort and MRR alone",
            theirs=USERS / taken["plain"],
            unit="users/s",
            note=f"{taken['ours']:.2f} s, wanted 5 s",
        )
    ]


def _large() -> list[Row]:
    scorer, held_out, counts = problem(LARGE_USERS, LARGE_ITEMS)
    task = Task(held_out, counts, None, EvaluateConfig())
    ours = functools.partial(_rank, scorer, task)
    some = held_out.only(np.arange(4 * PLAIN_BLOCK))
    taken = seconds_each({"ours": ours, "plain": functools.partial(plain, scorer, some, PLAIN_BLOCK)}, rounds=3)
    per_user = taken["ours"] / LARGE_USERS
    hours = per_user * PAPER * (PAPER / LARGE_ITEMS) / 3600
    vectors = 2 * PAPER * WIDTH * 4 / 2**30
    return [
        Row(
            what=f"ranking {LARGE_USERS:,} of 100,000 users x {LARGE_ITEMS:,} items x {WIDTH}, ties and top 50",
            ours=LARGE_USERS / taken["ours"],
            alternative="argsort and MRR alone",
            theirs=len(some.targets) / taken["plain"],
            unit="users/s",
            note=(
                f"so 100,000 users in {per_user * 100_000:.0f} s; on paper 1M x 1M on one core: {hours:.0f} h, "
                f"{vectors:.1f} GB of vectors and at most {4 * MAX_SCORES * 4 / 2**30:.1f} GB for a block, "
                f"peak of this run {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB"
            ),
        )
    ]


@torch.no_grad()
def _rank(scorer: Given, task: Task) -> float:
    collector, started = Collector(task), time.perf_counter()
    for first in range(0, len(task.held_out.targets), task.users_per_block):
        users = np.arange(first, min(first + task.users_per_block, len(task.held_out.targets)))
        collector.add(users, task.rank(scorer, task.held_out.only(users)))
    return time.perf_counter() - started
