"""Ranks, top-k lists and the metrics made of them. Knows scores and rows; knows no scorer and no data set.

One relevant item a user, so recall@k is the hit rate, NDCG@k is 1 / log2(1 + rank) within the first k, and the
average precision at k is 1 / rank within the first k: map@k equals mrr@k and is reported under both names.
Shapes: B users · N items · K places of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pixrec.index import stable_top

# Scores nearer to each other than this share of the user's largest score are the same score: equal items come out of
# a float32 matrix product up to a few last bits apart (6e-8 seen), and that noise must not break a tie in favour of the
# model.
TIE_TOLERANCE = 2.0**-22

FAMILIES = ("recall@", "ndcg@", "mrr@", "map@")
LOGGED = ("recall@", "ndcg@")
"""What a training run follows; `mrr` comes with them."""


class Ranked(NamedTuple):
    """The ranks of the targets of B users, each field (B,) int64."""

    allowed: np.ndarray
    """pessimistic rank among all items, 1 the best"""
    filtered: np.ndarray
    """the same without the user's seen items; the target stays"""
    ties: np.ndarray
    """how many other items tie with the target"""
    filtered_ties: np.ndarray
    """how many of these are not among the user's seen items"""


def rank_targets(scores: Any, targets: Any, seen: Sequence[np.ndarray] | None = None) -> Ranked:
    """Ranks of each user's target among all items, with its seen items and without them.

    scores (B, N), higher is better; targets (B,) rows; seen: per user the rows taken out in `filtered` (repeats
    allowed; the target itself stays). Ties are ranked pessimistically: a candidate that ties with the target counts as
    better. A score that is NaN counts as -inf, so a NaN target ranks last. Raises ValueError on shapes or rows that do
    not fit.
    """
    scores_BN, targets_B, low_B, high_B = _checked(scores, targets)
    allowed = _count(scores_BN >= low_B[:, None])  # the target itself is the one that makes ranks start at 1
    better = _count(scores_BN > high_B[:, None])
    ties = allowed - better - 1
    if seen is None:
        return Ranked(allowed, allowed, ties, ties)
    users, rows = _seen_but_target(seen, targets_B.cpu().numpy(), scores_BN.shape[1])
    at = torch.from_numpy(users).to(scores_BN.device)
    theirs = scores_BN[at, torch.from_numpy(rows).to(at.device)]
    ahead, above = (users[found.cpu().numpy()] for found in (theirs >= low_B[at], theirs > high_B[at]))
    filtered = allowed - np.bincount(ahead, minlength=len(allowed))
    still_better = better - np.bincount(above, minlength=len(allowed))
    return Ranked(allowed, filtered, ties, filtered - still_better - 1)


def target_ranks(scores: Any, targets: Any, exclude: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """The pessimistic rank of each target (B,) int64, without the rows of `exclude`; as `rank_targets`."""
    return rank_targets(scores, targets, exclude).filtered


def count_ties(scores: Any, targets: Any) -> np.ndarray:
    """How many other items tie with the user's target, (B,) int64; arguments as in `rank_targets`."""
    return rank_targets(scores, targets).ties


def user_random_tie_metrics(ranks: np.ndarray, ties: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """`recall@k` and `ndcg@k` (B,) of each user if ties were broken at random, generous where many items share a score.

    ranks (B,) pessimistic, ties (B,) as `rank_targets` gives. Of t + 1 equal items behind g better ones, each of the
    places g + 1 .. g + t + 1 is the target's with the same probability (McSherry and Najork, ECIR 2008).
    """
    better, last, result = ranks - 1 - ties, int(ranks.max()), {}
    for k in ks:
        gains = np.zeros(last + 1)
        gains[1 : k + 1] = 1 / np.log2(1 + np.arange(1, min(k, last) + 1))
        for name, gain in (("recall", gains > 0), ("ndcg", gains)):
            total = np.cumsum(gain)
            result[f"{name}@{k}"] = (total[ranks] - total[better]) / (ties + 1)
    return result


def random_tie_metrics(ranks: np.ndarray, ties: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Means of `user_random_tie_metrics`."""
    return {name: float(values.mean()) for name, values in user_random_tie_metrics(ranks, ties, ks).items()}


def top_rows(
    scores: Any, k: int, order: torch.Tensor | None = None, seen: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """The rows of the best k items of each user (B, min(k, N)) int32, best first; -1 behind the last one scored.

    scores (B, N); an item of -inf (or NaN) is not recommended. Equal scores: the item that comes first in `order` (N,)
    is first, so that with an order by item id the lists do not depend on how the catalog is laid out. Without one the
    lower row is first, as in `pixrec.index.top_k`. seen: per user rows that are not recommended.
    """
    scores_BN = _without_nan(torch.as_tensor(scores).detach().float())
    if seen is not None:
        users, rows = _seen_but_target(seen, np.full(len(seen), -1), scores_BN.shape[1])
        scores_BN = scores_BN.clone()
        scores_BN[torch.from_numpy(users), torch.from_numpy(rows)] = -torch.inf
    if order is None:
        values, best = stable_top(scores_BN, k)
    else:
        order = order.to(scores_BN.device)
        values, places = stable_top(scores_BN.index_select(1, order), k)
        best = order[places]
    return torch.where(values == -torch.inf, -1, best).to(torch.int32).cpu().numpy()


class ListStatistics:
    """Coverage and novelty of top-k lists, gathered block by block; holds a few numbers an item, none a user.

    coverage@k: share of the catalog that is in at least one user's first k. novelty@k: mean self-information
    -log2(share of the training events) of the items recommended, in bits (Castells et al., Recommender Systems
    Handbook); an item without a training event counts as one event.
    """

    def __init__(self, ks: Sequence[int], training_counts: np.ndarray) -> None:
        """training_counts (N,): events of each item that training may see."""
        counts = np.maximum(np.asarray(training_counts, dtype=np.float64), 1)
        self._information = -np.log2(counts / max(1.0, float(np.sum(training_counts))))
        self._shown = {k: np.zeros(len(counts), dtype=bool) for k in ks}
        self._bits = dict.fromkeys(ks, 0.0)
        self._users = dict.fromkeys(ks, 0)

    @property
    def longest(self) -> int:
        return max(self._shown)

    def add(self, top: np.ndarray) -> None:
        """Lists (B, K) of rows as `top_rows` gives them, K at least `longest` or N."""
        for k, shown in self._shown.items():
            part = top[:, :k]
            listed = part >= 0
            shown[part[listed]] = True
            lengths = listed.sum(axis=1)
            bits = np.where(listed, self._information[part], 0.0).sum(axis=1)
            self._bits[k] += float((bits[lengths > 0] / lengths[lengths > 0]).sum())
            self._users[k] += int((lengths > 0).sum())

    def results(self) -> dict[str, float]:
        """`coverage@k` in 0 .. 1 and `novelty@k` in bits, over the users who were recommended anything."""
        coverage = {f"coverage@{k}": float(shown.mean()) for k, shown in self._shown.items()}
        return coverage | {f"novelty@{k}": bits / max(1, self._users[k]) for k, bits in self._bits.items()}


def user_metrics(ranks: Any, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """`recall@k`, `ndcg@k`, `mrr@k`, `map@k` for each k, and `mrr` over the whole list: name -> (B,) float64.

    Raises as `rank_metrics`.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or not len(ranks):
        raise ValueError(f"ranks of shape {ranks.shape}: one rank a user is needed, and at least one user")
    if not np.all(ranks >= 1) or not np.all(ranks == np.floor(ranks)):
        raise ValueError("ranks must be whole numbers from 1 (the best) up")
    if any(k < 1 or k != int(k) for k in ks):
        raise ValueError(f"ks {list(ks)}: cut-offs must be whole numbers from 1 up")
    places = ranks.astype(np.float64)
    gains, reciprocals = 1 / np.log2(1 + places), 1 / places
    values = {f"recall@{k}": (ranks <= k).astype(np.float64) for k in ks}
    values |= {f"ndcg@{k}": np.where(ranks <= k, gains, 0.0) for k in ks}
    values |= {f"mrr@{k}": np.where(ranks <= k, reciprocals, 0.0) for k in ks}
    return values | {f"map@{k}": values[f"mrr@{k}"] for k in ks} | {"mrr": reciprocals}


def rank_metrics(ranks: Any, ks: Sequence[int], families: Sequence[str] = FAMILIES) -> dict[str, float]:
    """Means of `recall@k`, `ndcg@k`, `mrr@k`, `map@k` (each k) and `mrr` over users with one relevant item each.

    ranks (B,), whole numbers, 1 the best; families: which of `recall@`, `ndcg@`, ... to give. Raises ValueError on no
    users, ranks below 1 or cut-offs below 1.
    """
    values = user_metrics(ranks, ks)
    return {name: float(v.mean()) for name, v in values.items() if name == "mrr" or name.startswith(tuple(families))}


def _checked(scores: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores without NaN, targets, and the lowest and the highest score (B,) that tie with each target."""
    scores_BN = torch.as_tensor(scores).detach().float()
    targets_B = torch.as_tensor(targets).to(scores_BN.device, torch.int64)
    if scores_BN.ndim != 2 or targets_B.shape != scores_BN.shape[:1]:
        raise ValueError(
            f"scores {tuple(scores_BN.shape)} and targets {tuple(targets_B.shape)} must be (B, N) and (B,)"
        )
    if len(targets_B) and not 0 <= int(targets_B.min()) <= int(targets_B.max()) < scores_BN.shape[1]:
        raise ValueError(f"targets must be rows from 0 to {scores_BN.shape[1] - 1}")
    largest_B = scores_BN.abs().amax(dim=1)
    if not bool(largest_B.isfinite().all()):
        scores_BN = _without_nan(scores_BN)
        largest_B = torch.where(scores_BN.isfinite(), scores_BN.abs(), 0.0).amax(dim=1)
    target_B, margin_B = scores_BN.gather(1, targets_B[:, None])[:, 0], TIE_TOLERANCE * largest_B
    return scores_BN, targets_B, target_B - margin_B, target_B + margin_B


def _without_nan(scores_BN: torch.Tensor) -> torch.Tensor:
    return torch.where(scores_BN.isnan(), -torch.inf, scores_BN) if bool(scores_BN.isnan().any()) else scores_BN


def _count(mask_BN: torch.Tensor) -> np.ndarray:
    """True values of each row, int64; on a CPU numpy counts bytes 70 times as fast as torch does."""
    if mask_BN.device.type != "cpu":
        return mask_BN.count_nonzero(dim=1).cpu().numpy()
    return np.array([np.count_nonzero(row) for row in mask_BN.numpy()], dtype=np.int64)


def _seen_but_target(seen: Sequence[np.ndarray], targets: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Users and rows of all seen items, each once, the users' targets left out."""
    if len(seen) != len(targets):
        raise ValueError(f"exclude has {len(seen)} entries for {len(targets)} users")
    users = np.repeat(np.arange(len(seen)), [len(rows) for rows in seen])
    rows = np.concatenate([np.asarray(r, dtype=np.int64) for r in seen]) if len(seen) else users
    users, rows = np.divmod(np.unique(users * num_items + rows), num_items)
    keep = rows != targets[users]
    return users[keep], rows[keep]
