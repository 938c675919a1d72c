"""A model's ranking blended with what counting tells: what followed an item, what all take, what a shopper had before.

Each part is a distribution over the catalog, and the blend is their mixture. Its weights are those that make the
validation targets most likely (EM for the weights of a mixture, Dempster et al., 1977), so that a part which tells
nothing gets next to none. What a shopper has met before and what is new to him are told apart, as in RepeatNet (Ren et
al., AAAI 2019): each part counts once for either, so that the share of repeats is learned too. Counting knows nothing
of items without an event, so the model ranks these once more among themselves, for their share of what is bought.
Knows scores and rows; knows no files.

Shapes: B users · N items · S parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pixrec.data.sequences import Dataset, HeldOut, Users, sample_users
from pixrec.scorers.baselines import ItemTransition
from pixrec.scorers.protocol import Scorer

PARTS = ("model", "transition", "popularity", "model again", "transition again", "most recent again", "model cold")
"""What the weights belong to: `again` are items of the history, the others those that are not in it; `cold` are items
without a training event."""
USERS_FITTED = 2000
"""Validation users that the weights are taken from."""
_MAX_PROBABILITIES = 2**25  # of one part and the users of a pass: 128 MB
_STEPS, _PRIOR_USERS = 200, 1.0
_LEAST = 1e-30


class Mixture:
    """The parts, their weights, and how scores of a model become one of them."""

    def __init__(self, histories: Sequence[np.ndarray], counts: np.ndarray, temperature: float) -> None:
        """histories: the training histories; counts (N,): events of each item in them; temperature: what the model's
        scores are divided by to be logits."""
        self._transition = ItemTransition(histories, len(counts))
        self._warm = torch.from_numpy(np.asarray(counts) > 0)
        self._popularity = torch.from_numpy((counts + 1e-3) / (counts.sum() + 1e-3 * len(counts))).float()
        self._temperature = temperature
        self.weights = torch.full((len(PARTS),), 1 / len(PARTS))

    def probabilities(self, scores: torch.Tensor, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """(B, N) by the model's scores (B, N) and the histories of rows; for an empty one model and popularity.

        Further columns of scores are items of which nothing was counted.
        """
        mixed = torch.zeros_like(scores, dtype=torch.float32, device="cpu")
        for weight, part in zip(self.weights, self._parts(scores, histories), strict=True):
            mixed += weight * part
        return mixed

    @torch.no_grad()
    def fit(self, held_out: HeldOut, scores: Callable[[Users], torch.Tensor]) -> dict[str, float]:
        """Take the weights that suit these users best, by the model's `scores` (B, N); returns them by name. Without
        users they are equal."""
        found = [torch.zeros(0, len(PARTS))]
        batch_size = max(1, min(64, _MAX_PROBABILITIES // len(self._popularity)))
        for start in range(0, len(held_out.targets), batch_size):
            block = held_out.only(np.arange(start, min(start + batch_size, len(held_out.targets))))
            at = torch.from_numpy(np.asarray(block.targets, dtype=np.int64)).unsqueeze(1)
            parts = self._parts(scores(block.users), block.histories)
            found.append(torch.cat([part.gather(1, at) for part in parts], dim=1))
        self.weights = fit_weights(torch.cat(found))
        return dict(zip(PARTS, self.weights.tolist(), strict=True))

    def _parts(self, scores: torch.Tensor, histories: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Seven distributions (B, N), in the order of PARTS; one without any item to give is 0 everywhere."""
        model = (scores.float().cpu() / self._temperature).softmax(1)
        uncounted = (0, model.shape[1] - len(self._popularity))
        popularity = F.pad(self._popularity, uncounted).expand_as(model)
        transition, recent = popularity.clone(), torch.zeros_like(model)
        if known := [user for user, history in enumerate(histories) if len(history)]:
            users = Users([""] * len(known), [histories[user] for user in known])
            transition[known] = F.pad(self._transition.scores(users).exp(), uncounted)
        for row, history in zip(recent, histories, strict=True):  # of a repeated item its last place counts
            row[np.asarray(history, dtype=np.int64)] = torch.from_numpy(1 / np.arange(len(history), 0, -1.0)).float()
        again = recent > 0
        return [
            *(_scaled(part.masked_fill(again, 0)) for part in (model, transition, popularity)),
            *(_scaled(part.masked_fill(~again, 0)) for part in (model, transition)),
            _scaled(recent),
            _scaled(model.masked_fill(again | F.pad(self._warm, uncounted), 0)),
        ]


def fit_weights(likelihoods: torch.Tensor) -> torch.Tensor:
    """Weights (S,) of the mixture that makes what happened most likely, from the probability (B, S) that each part gave
    it; one more user than there are, who is content with all alike, keeps every weight above 0."""
    likelihoods = likelihoods.double()
    parts = likelihoods.shape[1]
    weights = torch.full((parts,), 1 / parts, dtype=torch.float64)
    for _ in range(_STEPS):
        share = likelihoods * weights
        share = share / share.sum(1, keepdim=True).clamp(min=_LEAST)
        weights = share.sum(0) + _PRIOR_USERS / parts
        weights = weights / weights.sum()
    return weights.float()


def fitted_mixture(dataset: Dataset, temperature: float, scores: Callable[[Users], torch.Tensor]) -> Mixture:
    """The mixture for a model's `scores` on a data set: counts of its training events, weights of its validation."""
    mixture = Mixture(dataset.training_histories(), dataset.training_counts(), temperature)
    mixture.fit(sample_users(dataset.held_out("valid"), USERS_FITTED, 0), scores)
    return mixture


class Blend(Scorer):
    """A model's scorer and the counts, mixed."""

    name = "blend"
    needs = ("model", "events")

    def __init__(self, scorer: Scorer, mixture: Mixture) -> None:
        self._scorer, self.mixture = scorer, mixture

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32: the logarithm of each item's chance to be next."""
        probabilities = self.mixture.probabilities(self._scorer.scores(users), users.histories)
        return probabilities.clamp(min=_LEAST).log()


def _scaled(part: torch.Tensor) -> torch.Tensor:
    return part / part.sum(1, keepdim=True).clamp(min=_LEAST)
