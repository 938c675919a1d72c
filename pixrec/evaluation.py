"""The protocol: every held-out target is ranked among the whole catalog, by every scorer, and the ranks are summed up.

Knows scorers, held-out events and the shape of metrics.json (DESIGN §6, §8). Does not know what a scorer is made of,
nor where the numbers are written.

Shapes: B users of a batch · N items. "Seen" items are those of the user's own history: `allowed` leaves them among the
candidates, `filtered` takes them out (the target always stays in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from pixrec.config import EvaluateConfig
from pixrec.data.sequences import HeldOut, sample_users
from pixrec.errors import InputError
from pixrec.metrics import (
    bootstrap_ci,
    count_ties,
    paired_difference_ci,
    random_tie_recall,
    target_ranks,
    user_metrics,
)

Seen = Literal["allowed", "filtered"]
SEEN: tuple[Seen, Seen] = ("allowed", "filtered")
ALWAYS_REPORTED_KS = (1, 10)
DIFFERENCE_METRICS = ("recall@1", "recall@10", "ndcg@10", "mrr")


class Scorer(Protocol):
    """Anything that can rank: a model, a knockout of it, a baseline."""

    name: str

    def scores(self, histories: list[np.ndarray]) -> torch.Tensor:
        """Scores (B, N) float32 of all items for each history of rows, oldest first; higher is better."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What one scorer did, user by user."""

    ranks: dict[Seen, np.ndarray]
    """Pessimistic ranks (users,) int64 with seen items allowed and filtered."""
    ties: np.ndarray
    """How many other items had the target's score (users,) int64."""


@dataclass(frozen=True)
class Evaluation:
    held_out: HeldOut
    """The users that were ranked, in the order of every array here."""
    outcomes: dict[str, Outcome]
    """Scorer name -> outcome, in the order the scorers were given."""
    cold: np.ndarray
    """Items that occur in no training history (N,) bool."""
    with_image: np.ndarray
    """Items whose picture can be seen (N,) bool."""
    config: EvaluateConfig

    def metrics_json(self, protocol_split: str) -> dict[str, Any]:
        """The content of metrics.json; every number a plain int or float.

        `results` is the setting `config.seen`, `results_other_seen` the other one. `differences` compares the first
        scorer with each other one, user by user.
        """
        seen = self.config.seen
        other = SEEN[1 - SEEN.index(seen)]
        return {
            "protocol": {"split": protocol_split, "candidates": "all", "ties": "pessimistic", "seen": seen},
            "users": len(self.held_out.targets),
            "items": len(self.cold),
            "results": self._results(seen),
            "results_other_seen": {"seen": other, "results": self._results(other)},
            "differences": self._differences(seen),
            "buckets": self._buckets(seen),
            "guards": self._guards(seen),
        }

    def _user_metrics(self, scorer: str, seen: Seen) -> dict[str, np.ndarray]:
        ks = sorted({*self.config.ks, *ALWAYS_REPORTED_KS})
        return user_metrics(self.outcomes[scorer].ranks[seen], ks)

    def _summary(self, values: dict[str, np.ndarray]) -> dict[str, Any]:
        means = {metric: float(v.mean()) for metric, v in values.items()}
        return {**means, "ci95": {metric: list(self._interval(v)) for metric, v in values.items()}}

    def _interval(self, values: np.ndarray) -> tuple[float, float]:
        return bootstrap_ci(values, self.config.bootstrap_samples, self.config.seed)

    def _results(self, seen: Seen) -> dict[str, Any]:
        return {scorer: self._summary(self._user_metrics(scorer, seen)) for scorer in self.outcomes}

    def _differences(self, seen: Seen) -> dict[str, Any]:
        """Mean difference of the first scorer to each other one, with intervals over the same users."""
        first, *others = self.outcomes
        mine, result = self._user_metrics(first, seen), {}
        for scorer in others:
            theirs = self._user_metrics(scorer, seen)
            result[scorer] = {
                **{m: float(mine[m].mean() - theirs[m].mean()) for m in DIFFERENCE_METRICS},
                "ci95": {
                    m: list(paired_difference_ci(mine[m], theirs[m], self.config.bootstrap_samples, self.config.seed))
                    for m in DIFFERENCE_METRICS
                },
            }
        return {"of": first, "minus": result}

    def _buckets(self, seen: Seen) -> dict[str, Any]:
        """Users by what their target and their history are like: how many, and recall@10 of each scorer."""
        targets = self.held_out.targets
        lengths = np.array([len(h) for h in self.held_out.histories])
        middle = int(np.median(lengths))
        members = {
            "target_warm": ("target occurs in training histories", ~self.cold[targets]),
            "target_cold": ("target occurs in no training history", self.cold[targets]),
            "target_with_picture": ("target has a picture", self.with_image[targets]),
            "target_without_picture": ("target has no picture", ~self.with_image[targets]),
            "history_short": (f"history of at most {middle} items", lengths <= middle),
            "history_long": (f"history of more than {middle} items", lengths > middle),
        }
        recalls = {scorer: self._user_metrics(scorer, seen)["recall@10"] for scorer in self.outcomes}
        return {
            bucket: {
                "meaning": meaning,
                "users": int(mask.sum()),
                "results": {s: self._summary({"recall@10": r[mask]}) for s, r in recalls.items()} if mask.any() else {},
            }
            for bucket, (meaning, mask) in members.items()
        }

    def _guards(self, seen: Seen) -> dict[str, Any]:
        """Figures that expose a flattering evaluation: repeats, ties, and what needs no model at all."""
        histories, targets = self.held_out.histories, self.held_out.targets
        repeats = [target in history for target, history in zip(targets, histories, strict=True)]
        recalls = {s: float(self._user_metrics(s, seen)["recall@10"].mean()) for s in self.outcomes}
        floor = recalls.get("popularity")
        return {
            "repeat_share": float(np.mean(repeats)),
            "tie_share": {scorer: float((outcome.ties > 0).mean()) for scorer, outcome in self.outcomes.items()},
            "random_ties": {
                scorer: random_tie_recall(outcome.ranks["allowed"], outcome.ties, ALWAYS_REPORTED_KS)
                for scorer, outcome in self.outcomes.items()
            },
            "chance_recall@10": min(1.0, 10 / len(self.cold)),
            "popularity_recall@10": floor,
            "below_popularity": [] if floor is None else [s for s, recall in recalls.items() if recall < floor],
        }


def evaluate_scorers(
    scorers: list[Scorer],
    held_out: HeldOut,
    item_table_len: int,
    config: EvaluateConfig,
    *,
    cold: np.ndarray,
    with_image: np.ndarray,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Rank every held-out target among all `item_table_len` items by every scorer, `config.batch_size` users at a time.

    cold, with_image (N,) bool by item row. progress(scorer name, users done, users in total) is called after each
    batch. Raises InputError when there is nobody to rank, ValueError on scorers of one name or of another width.
    """
    names = [scorer.name for scorer in scorers]
    if not scorers or len(set(names)) < len(names):
        raise ValueError(f"scorers {names}: at least one is needed, each with a name of its own")
    if len(cold) != item_table_len or len(with_image) != item_table_len:
        raise ValueError(f"cold and with_image must have one entry for each of {item_table_len} items")
    if not len(held_out.targets):
        raise InputError("the data set holds out no event to evaluate on; users with two events or more are needed")
    held_out = sample_users(held_out, config.max_users, config.seed)
    outcomes = {s.name: _rank_all(s, held_out, item_table_len, config.batch_size, progress) for s in scorers}
    return Evaluation(held_out, outcomes, np.asarray(cold, bool), np.asarray(with_image, bool), config)


@torch.no_grad()
def _rank_all(
    scorer: Scorer,
    held_out: HeldOut,
    item_table_len: int,
    batch_size: int,
    progress: Callable[[str, int, int], None] | None,
) -> Outcome:
    users = len(held_out.targets)
    allowed, filtered, ties = [], [], []
    for first in range(0, users, batch_size):
        histories = held_out.histories[first : first + batch_size]
        targets = held_out.targets[first : first + batch_size]
        scores = scorer.scores(histories)
        if scores.shape != (len(histories), item_table_len):
            raise ValueError(
                f"scorer {scorer.name!r} gave scores {tuple(scores.shape)} for {len(histories)} users "
                f"and {item_table_len} items"
            )
        allowed.append(target_ranks(scores, targets))
        filtered.append(target_ranks(scores, targets, histories))
        ties.append(count_ties(scores, targets))
        if progress is not None:
            progress(scorer.name, min(first + batch_size, users), users)
    return Outcome({"allowed": np.concatenate(allowed), "filtered": np.concatenate(filtered)}, np.concatenate(ties))
