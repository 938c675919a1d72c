"""What a recommender must beat: scorers without a model. Know rows and counts; know no pictures and no text.

Shapes: B users · N items.
"""

from __future__ import annotations

import numpy as np
import torch


class Popularity:
    """Every user gets the items with the most training events; equally popular items tie."""

    name = "popularity"

    def __init__(self, training_counts: np.ndarray) -> None:
        """training_counts (N,): events of each item that training may see."""
        # dense ranks in [0, 1) rather than counts: float32 would merge neighbouring counts above 2**24
        distinct, level = np.unique(np.asarray(training_counts), return_inverse=True)
        self._popularity_N = torch.from_numpy((level / max(len(distinct), 1)).astype(np.float32))

    def scores(self, histories: list[np.ndarray]) -> torch.Tensor:
        """(B, N) float32, higher is better, in [0, 1)."""
        return self._popularity_N.expand(len(histories), -1)


class RepeatLast(Popularity):
    """The user's own items again, most recent first, then the most popular ones."""

    name = "repeat_last"

    def scores(self, histories: list[np.ndarray]) -> torch.Tensor:
        """(B, N) float32, higher is better; the history's items have 1 and more."""
        scores_BN = super().scores(histories).numpy().copy()
        for scores, history in zip(scores_BN, histories, strict=True):
            scores[history] = np.arange(1, len(history) + 1)  # of a repeated item the last, most recent place holds
        return torch.from_numpy(scores_BN)
