"""What a scorer is: anything that gives every item of the catalog a score for every user.

Shapes: B users · N items.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import torch

from pixrec.data.sequences import Users

Need = Literal["model", "events"]
"""What a scorer may be made of: a trained model (with its published index, where one is given), or the training events
of the data set."""


class Scorer(Protocol):
    """Anything that can rank: a model, a knockout of it, a baseline, somebody else's lists."""

    name: str
    needs: ClassVar[tuple[Need, ...]] = ()
    """What it cannot be made without; empty: nothing."""

    def scores(self, users: Users) -> torch.Tensor:
        """Scores (B, N) float32 of all items for each user; higher is better, -inf: never."""
        ...
