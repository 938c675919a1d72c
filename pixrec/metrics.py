"""Ranks, the metrics made of them, and how sure they are. Knows scores and rows; knows no scorer and no data set.

One relevant item a user, so recall@k is the hit rate and NDCG@k is 1 / log2(1 + rank) within the first k.
Shapes: B users · N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Scores nearer to each other than this share of the user's largest score are the same score: equal items come out of
# a float32 matrix product up to a few last bits apart (6e-8 seen), and that noise must not break a tie for the model.
TIE_TOLERANCE = 2.0**-22

RESAMPLE_BLOCK = 4_000_000  # counts drawn at a time (32 MB)


def target_ranks(scores: Any, targets: Any, exclude: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """The pessimistic rank of each user's target among all items, 1 the best, (B,) int64.

    scores (B, N), higher is better; targets (B,) rows; exclude: per user the rows taken out of the candidates
    (repeats allowed; the target itself stays). A candidate that ties with the target counts as better. A score that
    is NaN counts as -inf, so a NaN target ranks last. Raises ValueError on shapes or rows that do not fit.
    """
    scores_BN, targets_B = _checked(scores, targets)
    ahead_BN = scores_BN >= _tie_line(scores_BN, targets_B)[:, None]
    if exclude is not None:
        if len(exclude) != len(scores_BN):
            raise ValueError(f"exclude has {len(exclude)} entries for {len(scores_BN)} users")
        users = np.repeat(np.arange(len(exclude)), [len(rows) for rows in exclude])
        rows = np.concatenate([np.asarray(r, dtype=np.int64) for r in exclude]) if len(exclude) else users
        ahead_BN[torch.from_numpy(users).to(ahead_BN.device), torch.from_numpy(rows).to(ahead_BN.device)] = False
    ahead_BN.scatter_(1, targets_B[:, None], False)
    return (1 + ahead_BN.sum(dim=1)).cpu().numpy()


def count_ties(scores: Any, targets: Any) -> np.ndarray:
    """How many other items tie with the user's target, (B,) int64; arguments as in `target_ranks`."""
    scores_BN, targets_B = _checked(scores, targets)
    target_B1 = scores_BN.gather(1, targets_B[:, None])
    near_BN = (scores_BN - target_B1).abs() <= target_B1 - _tie_line(scores_BN, targets_B)[:, None]
    same_BN = near_BN | (scores_BN == target_B1)  # infinite scores are equal but have no distance
    return (same_BN.sum(dim=1) - 1).cpu().numpy()


def random_tie_recall(ranks: np.ndarray, ties: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Mean `recall@k` if ties were broken at random, which is generous where many items share a score.

    ranks (B,) pessimistic, ties (B,) as `count_ties` gives. Of t + 1 equal items behind g better ones, the target is
    among the first k with probability (k - g) / (t + 1), cut to 0 and 1.
    """
    better = ranks - 1 - ties
    return {f"recall@{k}": float(np.clip((k - better) / (ties + 1), 0, 1).mean()) for k in ks}


def _checked(scores: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scores_BN = torch.as_tensor(scores).detach().float()
    targets_B = torch.as_tensor(targets).to(scores_BN.device, torch.int64)
    if scores_BN.ndim != 2 or targets_B.shape != scores_BN.shape[:1]:
        raise ValueError(
            f"scores {tuple(scores_BN.shape)} and targets {tuple(targets_B.shape)} must be (B, N) and (B,)"
        )
    if len(targets_B) and not 0 <= int(targets_B.min()) <= int(targets_B.max()) < scores_BN.shape[1]:
        raise ValueError(f"targets must be rows from 0 to {scores_BN.shape[1] - 1}")
    return torch.where(scores_BN.isnan(), -torch.inf, scores_BN), targets_B


def _tie_line(scores_BN: torch.Tensor, targets_B: torch.Tensor) -> torch.Tensor:
    """The lowest score that still ties with the target, (B,)."""
    largest = torch.where(scores_BN.isfinite(), scores_BN.abs(), 0.0).amax(dim=1)
    return scores_BN.gather(1, targets_B[:, None])[:, 0] - TIE_TOLERANCE * largest


def user_metrics(ranks: Any, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """`recall@k` and `ndcg@k` for each k, and `mrr`, for every user: name -> (B,) float64. Raises as `rank_metrics`."""
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or not len(ranks):
        raise ValueError(f"ranks of shape {ranks.shape}: one rank a user is needed, and at least one user")
    if not np.all(ranks >= 1) or not np.all(ranks == np.floor(ranks)):
        raise ValueError("ranks must be whole numbers from 1 (the best) up")
    if any(k < 1 or k != int(k) for k in ks):
        raise ValueError(f"ks {list(ks)}: cut-offs must be whole numbers from 1 up")
    gains = 1 / np.log2(1 + ranks.astype(np.float64))
    values = {f"recall@{k}": (ranks <= k).astype(np.float64) for k in ks}
    values |= {f"ndcg@{k}": np.where(ranks <= k, gains, 0.0) for k in ks}
    return values | {"mrr": 1 / ranks.astype(np.float64)}


def rank_metrics(ranks: Any, ks: Sequence[int]) -> dict[str, float]:
    """Means of `recall@k`, `ndcg@k` (each k) and `mrr` over users with one relevant item each.

    ranks (B,), whole numbers, 1 the best. Raises ValueError on no users, ranks below 1 or cut-offs below 1.
    """
    return {name: float(values.mean()) for name, values in user_metrics(ranks, ks).items()}


def bootstrap_ci(values: Any, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (B,), by resampling users.

    A resample is drawn as counts of the distinct values, which is the same distribution as drawing users one by one
    and takes two counts instead of B for a recall. Raises ValueError on no values, values that are not finite, or
    samples < 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape}: one finite value a user is needed, and at least one user")
    if samples < 1:
        raise ValueError(f"samples is {samples}: must be at least 1")
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    block = max(1, RESAMPLE_BLOCK // len(distinct))
    sizes = [min(block, samples - first) for first in range(0, samples, block)]
    share = counts / len(values)
    means = np.concatenate([rng.multinomial(len(values), share, size=size) @ distinct for size in sizes]) / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference_ci(a: Any, b: Any, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of mean(a) - mean(b), (B,) each and user by user, so that what users share cancels out."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"values of shapes {a.shape} and {b.shape} are not of the same users")
    return bootstrap_ci(a - b, samples, seed)
