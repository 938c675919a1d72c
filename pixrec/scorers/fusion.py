"""Several scorers merged into one by their ranks, which need no common scale. Knows scorers; knows no model.

Shapes: B users · N items.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pixrec.data.sequences import Users
from pixrec.scorers.protocol import Scorer


class ReciprocalRankFusion(Scorer):
    """The sum over scorers of 1 / (60 + rank) (Cormack et al., SIGIR 2009)."""

    def __init__(self, name: str, scorers: Sequence[Scorer], constant: float = 60.0) -> None:
        self.name, self._scorers, self._constant = name, scorers, constant

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32: the logarithm of that sum, which keeps far places apart."""
        ranks = [pessimistic_ranks(scorer.scores(users)) for scorer in self._scorers]
        return torch.stack([1 / (self._constant + r) for r in ranks]).sum(0).log().float()


class RoundRobin(Scorer):
    """The scorers take turns, the first one first, each giving its next best item: the quasi-round-robin of CALRec
    (Li et al., RecSys 2024). An item stands where the scorer that ranks it highest would put it."""

    def __init__(self, name: str, scorers: Sequence[Scorer]) -> None:
        self.name, self._scorers = name, scorers

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32: minus the turn at which an item is first given."""
        return take_turns([scorer.scores(users) for scorer in self._scorers])


def take_turns(rankings: Sequence[torch.Tensor]) -> torch.Tensor:
    """Minus the turn (B, N) float32 at which each item is given when rankings, scores (B, N) each, take turns."""
    turns = [(pessimistic_ranks(scores) - 1) * len(rankings) + place for place, scores in enumerate(rankings)]
    return -torch.stack(turns).amin(0).float()


def pessimistic_ranks(scores: torch.Tensor) -> torch.Tensor:
    """The rank (B, N) float64 of every item by scores (B, N), 1 the best; of tied items all have the worst place."""
    scores = torch.nan_to_num(scores.double(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ascending = scores.sort(dim=1).values.contiguous()
    return (scores.shape[1] - torch.searchsorted(ascending, scores.contiguous())).double()
