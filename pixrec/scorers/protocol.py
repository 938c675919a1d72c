"""What a scorer is: anything that gives every item of the catalog a score for every user.

Shapes: B users · N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch


class Scorer(Protocol):
    """Anything that can rank: a model, a knockout of it, a baseline."""

    name: str

    def scores(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """Scores (B, N) float32 of all items for each history of rows, oldest first; higher is better, -inf: never."""
        ...


@runtime_checkable
class UserScorer(Protocol):
    """A scorer that must know who the users are, such as rankings read from a file."""

    name: str

    def scores_of(self, user_ids: Sequence[str]) -> torch.Tensor:
        """Scores (B, N) as `Scorer.scores`."""
        ...


AnyScorer = Scorer | UserScorer
