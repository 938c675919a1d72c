"""What the ranks amount to: the content of metrics.json. Knows ranks and users; knows no scorer.

Shapes: N items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from pixrec.config import EvaluateConfig
from pixrec.data.sequences import HeldOut, Histories
from pixrec.evaluation.significance import bootstrap_ci, holm, paired_difference_ci, randomisation_p
from pixrec.metrics import user_metrics, user_random_tie_metrics

Seen = Literal["allowed", "filtered"]
SEEN: tuple[Seen, Seen] = ("allowed", "filtered")
ALWAYS_REPORTED_KS = (1, 10)
DIFFERENCE_METRICS = ("recall@1", "recall@10", "ndcg@10", "mrr")
BUCKET_METRICS = ("recall@10", "ndcg@10")
COLD, TAIL = "target_cold", "target_tail"
"""The buckets whose scorers are also compared user by user."""
BLEND = "blend"
"""The scorer that stands for what a model with `serve.blend` answers."""
HEAD_SHARE = 0.2
"""Head items are this share of the items with training events, the most frequent ones (and what ties with them)."""


def reported_ks(config: EvaluateConfig) -> list[int]:
    return sorted({*config.ks, *ALWAYS_REPORTED_KS})


@dataclass(frozen=True)
class Outcome:
    """What one scorer did, user by user."""

    ranks: dict[Seen, np.ndarray]
    """Pessimistic ranks (users,) int64 with seen items allowed and filtered."""
    ties: np.ndarray
    """How many other candidates had the target's score (users,) int64, with seen items as the config has it."""
    lists: dict[str, float]
    """`coverage@k` and `novelty@k` of the lists with seen items as the config has it."""


@dataclass(frozen=True)
class Evaluation:
    held_out: HeldOut
    """The users that were ranked, in the order of every array here."""
    outcomes: dict[str, Outcome]
    """Scorer name -> outcome, in the order the scorers were given."""
    training_counts: np.ndarray
    """Events of each item that training may see (N,) int64; cold items have none."""
    with_image: np.ndarray
    """Items whose picture can be seen (N,) bool."""
    config: EvaluateConfig

    def metrics_json(self, protocol_split: str, knockouts: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The content of metrics.json; every number a plain int or float.

        `results` is the setting `config.seen`, `results_other_seen` the other one. `differences` compares the first
        scorer with each other one, user by user, `differences_of_blend` the blend, which is what a model with one
        serves. `knockouts`: how each knockout of the model was made, as `build_scorers` tells it.
        """
        seen = self.config.seen
        other = SEEN[1 - SEEN.index(seen)]
        results = self._results(seen)
        for scorer, outcome in self.outcomes.items():
            results[scorer] |= outcome.lists
        return {
            "protocol": {"split": protocol_split, "candidates": "all", "ties": "pessimistic", "seen": seen},
            "users": len(self.held_out.targets),
            "items": len(self.training_counts),
            "results": results,
            "results_other_seen": {"seen": other, "results": self._results(other)},
            **self._compared(),
            "buckets": self._buckets(),
            "guards": self._guards(knockouts or {}),
            "knockouts": dict(knockouts or {}),
        }

    @cached_property
    def cold(self) -> np.ndarray:
        """Items that occur in no training history (N,) bool."""
        return self.training_counts == 0

    def _user_metrics(self, scorer: str, seen: Seen) -> dict[str, np.ndarray]:
        return user_metrics(self.outcomes[scorer].ranks[seen], reported_ks(self.config))

    @cached_property
    def _values(self) -> dict[str, dict[str, np.ndarray]]:
        """Scorer -> metric -> (users,), in the setting `config.seen`."""
        return {scorer: self._user_metrics(scorer, self.config.seen) for scorer in self.outcomes}

    def _summary(self, values: dict[str, np.ndarray]) -> dict[str, Any]:
        means = {metric: float(v.mean()) for metric, v in values.items()}
        once = {id(v): list(bootstrap_ci(v, *self._resampling)) for v in values.values()}  # map@k is mrr@k
        return {**means, "ci95": {metric: once[id(v)] for metric, v in values.items()}}

    @property
    def _resampling(self) -> tuple[int, int]:
        return self.config.bootstrap_samples, self.config.seed

    def _results(self, seen: Seen) -> dict[str, Any]:
        if seen == self.config.seen:
            return {scorer: self._summary(values) for scorer, values in self._values.items()}
        return {scorer: self._summary(self._user_metrics(scorer, seen)) for scorer in self.outcomes}

    def _compared(
        self, metrics: tuple[str, ...] = DIFFERENCE_METRICS, users: np.ndarray | slice = slice(None)
    ) -> dict[str, Any]:
        """What is evaluated, and the blend where there is one, beside each other scorer."""
        first = next(iter(self.outcomes))
        compared = {"differences": self._differences(first, metrics, users)}
        if first != BLEND and BLEND in self.outcomes:
            compared["differences_of_blend"] = self._differences(BLEND, metrics, users)
        return compared

    def _differences(self, of: str, metrics: tuple[str, ...], users: np.ndarray | slice) -> dict[str, Any]:
        """Mean difference of one scorer to each other one over the same users, its interval and p-value.

        `p` is that of a paired randomisation test, `p_holm` the same adjusted for the number of scorers.
        """
        others = [scorer for scorer in self.outcomes if scorer != of]
        mine, result = self._values[of], dict[str, dict[str, Any]]()
        for scorer in others:
            pairs = {m: (mine[m][users], self._values[scorer][m][users]) for m in metrics}
            result[scorer] = {
                **{m: float(a.mean() - b.mean()) for m, (a, b) in pairs.items()},
                "ci95": {m: list(paired_difference_ci(a, b, *self._resampling)) for m, (a, b) in pairs.items()},
                "p": {m: randomisation_p(a, b, *self._resampling) for m, (a, b) in pairs.items()},
            }
        adjusted = {m: holm([result[s]["p"][m] for s in others]) for m in metrics}
        for i, scorer in enumerate(others):
            result[scorer]["p_holm"] = {m: values[i] for m, values in adjusted.items()}
        return {"of": of, "minus": result}

    def _buckets(self) -> dict[str, Any]:
        """Users by what their target and their history are like: how many, and how well each scorer serves them."""
        return {
            bucket: {
                "meaning": meaning,
                "users": int(mask.sum()),
                "results": {
                    scorer: self._summary({metric: values[metric][mask] for metric in BUCKET_METRICS})
                    for scorer, values in self._values.items()
                }
                if mask.any()
                else {},
                **(self._compared(BUCKET_METRICS, mask) if bucket in (COLD, TAIL) and mask.any() else {}),
            }
            for bucket, (meaning, mask) in self._members().items()
        }

    def _members(self) -> dict[str, tuple[str, np.ndarray]]:
        """Bucket -> what it means, and which users are in it."""
        targets = self.held_out.targets
        lengths = Histories.of(self.held_out.histories).lengths
        middle, counts = int(np.median(lengths)), self.training_counts
        known = np.sort(counts[counts > 0])[::-1]
        least = int(known[max(0, round(HEAD_SHARE * len(known)) - 1)]) if len(known) else 1
        tail = (counts < least) & ~self.cold
        up_to = f"{middle:,} item" + "s" * (middle != 1)
        head = f"target is a head item ({least:,} training events or more)"
        return {
            "target_warm": ("target occurs in training histories", ~self.cold[targets]),
            COLD: ("target occurs in no training history", self.cold[targets]),
            "target_head": (head, counts[targets] >= least),
            TAIL: ("target is a tail item (fewer, but at least one)", tail[targets]),
            "target_with_picture": ("target has a picture", self.with_image[targets]),
            "target_without_picture": ("target has no picture", ~self.with_image[targets]),
            "history_short": (f"history of at most {up_to}", lengths <= middle),
            "history_long": (f"history of more than {up_to}", lengths > middle),
        }  # fmt: skip

    def _guards(self, knockouts: Mapping[str, str]) -> dict[str, Any]:
        """Figures that expose a flattering evaluation: repeats, ties, and what needs no model at all.

        `below_popularity` is an alarm about the first scorer, which is what is evaluated, and about the knockouts that
        were trained beside it. A baseline may well be below popularity, and so may a model whose input is damaged.
        """
        histories, targets = self.held_out.histories, self.held_out.targets
        repeats = [target in history for target, history in zip(targets, histories, strict=True)]
        recalls = {s: float(values["recall@10"].mean()) for s, values in self._values.items()}
        floor = recalls.get("popularity", 0.0)
        trained = [next(iter(self.outcomes)), *(scorer for scorer, how in knockouts.items() if how == "trained")]
        return {
            "repeat_share": float(np.mean(repeats)),
            "tie_share": {scorer: float((outcome.ties > 0).mean()) for scorer, outcome in self.outcomes.items()},
            "random_ties": {
                scorer: self._summary(
                    user_random_tie_metrics(outcome.ranks[self.config.seen], outcome.ties, ALWAYS_REPORTED_KS)
                )
                for scorer, outcome in self.outcomes.items()
            },
            "chance_recall@10": min(1.0, 10 / len(self.cold)),
            "popularity_recall@10": recalls.get("popularity"),
            "below_popularity": [scorer for scorer in trained if recalls[scorer] < floor],
        }
