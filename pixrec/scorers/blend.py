"""A model's ranking blended with what counting tells: what followed an item, what all take, what a shopper had before.

Each part is a distribution over the catalog, and the blend is their mixture. Its weights are those that make the
validation targets most likely (EM for the weights of a mixture, Dempster et al., 1977), so that a part which tells
nothing gets next to none. What a shopper has met before and what is new to him are told apart, as in RepeatNet (Ren et
al., AAAI 2019): each part counts once for either, so that the share of repeats is learned too. Counting knows nothing
of items without an event, so the model ranks these once more among themselves, for their share of what is bought. Where
frozen encoders have read the items, what is like the history by them is a part too: it has learned nothing from
purchases, and so treats a new item as any other.
Knows scores and rows; knows no files.

Shapes: B users · N items · S parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from pixrec.data.sequences import Dataset, HeldOut, Users, sample_users
from pixrec.scorers.baselines import ItemTransition
from pixrec.scorers.neighbours import ContentNeighbours, Moved
from pixrec.scorers.protocol import Scorer

PARTS = ("model", "transition", "popularity", "model again", "transition again", "most recent again", "model cold")
"""What the weights belong to: `again` are items of the history, the others those that are not in it; `cold` are items
without a training event. What is alike, where items have content vectors, follows: items not in the history."""
USERS_FITTED, SCORES_FITTED = 2000, 10**8
"""Validation users that the weights are taken from, and the most scores of theirs: a server fits when it starts."""
_MAX_PROBABILITIES = 2**25  # of one part and the users of a pass: 128 MB
_STEPS, _PRIOR_USERS = 200, 1.0
_LEAST = 1e-30


class Mixture:
    """The parts, their weights, and how scores of a model become one of them."""

    def __init__(
        self,
        histories: Sequence[np.ndarray],
        counts: np.ndarray,
        temperature: float,
        content: np.ndarray | None = None,
    ) -> None:
        """histories: the training histories; counts (N,): events of each item in them; temperature: what the model's
        scores are divided by to be logits; content (N, C): as `ContentNeighbours` takes it."""
        self._transition = ItemTransition(histories, len(counts))
        self._cold = torch.from_numpy(np.flatnonzero(np.asarray(counts) == 0))
        self._popularity = torch.from_numpy((counts + 1e-3) / (counts.sum() + 1e-3 * len(counts))).float()
        self._temperature = temperature
        self._neighbours = None if content is None else ContentNeighbours(content)
        self.parts = (*PARTS, *([] if self._neighbours is None else self._neighbours.parts))
        self.weights = torch.full((len(self.parts),), 1 / len(self.parts))
        self.new_item_share: float | None = None
        """What items without a training event get together, of 1; None: what the parts give them."""

    def probabilities(
        self, scores: torch.Tensor, histories: Sequence[np.ndarray], moved: Moved | None = None
    ) -> torch.Tensor:
        """(B, N) by the model's scores (B, N) and the histories of rows; for an empty one model and popularity.

        Further columns of scores are items of which nothing was counted; `moved` has the content of these, and of items
        whose content is no longer that of the catalog.
        """
        mixed = self._mixed(self._bases(scores, histories, moved), self.weights)
        if self.new_item_share is not None:
            new = self._new(mixed.shape[1])
            of_new = mixed[:, new]
            total = of_new.sum(1, keepdim=True)
            share = self.new_item_share * (total > 0)  # nothing where there is nothing to give it to
            mixed *= _scale(1 - share, mixed.sum(1, keepdim=True) - total)
            mixed[:, new] = of_new * _scale(share, total)
        return mixed

    @torch.no_grad()
    def fit(self, held_out: HeldOut, scores: Callable[[Users], torch.Tensor]) -> dict[str, float]:
        """Take the weights that suit these users best, by the model's `scores` (B, N); returns them by name. Without
        users they are equal."""
        found = [torch.zeros(0, len(self.parts))]
        batch_size = max(1, min(64, _MAX_PROBABILITIES // len(self._popularity)))
        for start in range(0, len(held_out.targets), batch_size):
            block = held_out.only(np.arange(start, min(start + batch_size, len(held_out.targets))))
            at = torch.from_numpy(np.asarray(block.targets, dtype=np.int64)).unsqueeze(1)
            bases = self._bases(scores(block.users), block.histories)
            parts = [self._mixed(bases, alone).gather(1, at) for alone in torch.eye(len(self.parts))]
            found.append(torch.cat(parts, dim=1))
        self.weights = fit_weights(torch.cat(found))
        return dict(zip(self.parts, self.weights.tolist(), strict=True))

    def _bases(self, scores: torch.Tensor, histories: Sequence[np.ndarray], moved: Moved | None = None) -> _Bases:
        logits = scores.float().cpu() / self._temperature
        model = logits.sub_(logits.max(1, keepdim=True).values).exp_()
        transition = F.pad(self._popularity, (0, model.shape[1] - len(self._popularity))).repeat(len(model), 1)
        if known := [user for user, history in enumerate(histories) if len(history)]:
            users = Users([""] * len(known), [histories[user] for user in known])
            transition[known, : len(self._popularity)] = torch.from_numpy(self._transition.chances(users))
        rows, columns, ages = _last_places(histories, model.shape[1])
        again = torch.stack([model[rows, columns], transition[rows, columns], 1 / ages])
        new = [model, transition]
        if self._neighbours is not None:
            alike = self._neighbours.chances(histories, moved)
            new.extend(F.pad(alike, (0, model.shape[1] - alike.shape[2])))
        for part in new:
            part[rows, columns] = 0
        return _Bases(new, rows, columns, again)

    def _mixed(self, bases: _Bases, weights: torch.Tensor) -> torch.Tensor:
        """The mixture (B, N) of the parts, each scaled to a distribution; one without an item to give is 0."""
        new, rows, columns, again = bases
        by_model, by_transition, by_popularity, *of_again, of_cold = weights[: len(PARTS)].tolist()
        model, users, mixed = new[0], len(new[0]), torch.zeros_like(new[0])
        for weight, part in zip((by_model, by_transition, *weights[len(PARTS) :].tolist()), new, strict=True):
            if weight:
                mixed.addcmul_(part, _scale(weight, part.sum(1)).unsqueeze(1))
        if by_popularity:
            popularity = F.pad(self._popularity, (0, model.shape[1] - len(self._popularity)))
            own = torch.zeros(users, dtype=torch.float64).index_add_(0, rows, popularity[columns].double())
            rest = popularity.double().sum() - own
            mixed.addcmul_(popularity, _scale(by_popularity, rest).float().unsqueeze(1))
        if of_cold:
            cold = self._new(model.shape[1])
            part = model[:, cold]
            mixed[:, cold] += part * _scale(of_cold, part.sum(1)).unsqueeze(1)
        totals = torch.zeros(len(again), users).index_add_(1, rows, again)
        scales = _scale(torch.tensor(of_again).unsqueeze(1), totals)
        mixed[rows, columns] = (again * scales[:, rows]).sum(0)
        return mixed

    def _new(self, total: int) -> torch.Tensor:
        """Rows of the items without a training event, those that are not of the catalog among them."""
        return torch.cat([self._cold, torch.arange(len(self._popularity), total)])


class _Bases(NamedTuple):
    """What the parts are made of: M items of histories, each once for its user, and the rest."""

    new: list[torch.Tensor]
    """(B, N) each, 0 for items of the history, scaled to nothing: by the model, the transitions, and what is alike"""
    rows: torch.Tensor
    columns: torch.Tensor
    """(M,) each: the user and the item"""
    again: torch.Tensor
    """(3, M): what the model, the transitions and the place in the history give it"""


def _last_places(histories: Sequence[np.ndarray], num_items: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each item of a history once, (M,) each: user, item, and the places from its last one to the end, from 1 on."""
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    keys = np.repeat(np.arange(len(lengths)) * num_items, lengths)
    keys = (keys + np.concatenate([np.zeros(0, np.int64), *histories]).astype(np.int64))[::-1]
    ages = np.concatenate([np.zeros(0, np.int64), *(np.arange(length, 0, -1) for length in lengths)])[::-1]
    found, first = np.unique(keys, return_index=True)
    rows, columns = np.divmod(found, num_items)
    return torch.from_numpy(rows), torch.from_numpy(columns), torch.from_numpy(ages[first].astype(np.float32))


def _scale(weight: float | torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return weight / total.clamp(min=_LEAST)


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


def fitted_mixture(
    dataset: Dataset,
    temperature: float,
    scores: Callable[[Users], torch.Tensor],
    content: np.ndarray | None = None,
    new_item_share: float | None = None,
) -> Mixture:
    """The mixture for a model's `scores` on a data set: counts of its training events, weights of its validation;
    `content` (N, C): of its items, as `ContentNeighbours` takes it; `new_item_share`: as `serve.new_item_share`."""
    mixture = Mixture(dataset.training_histories(), dataset.training_counts(), temperature, content)
    mixture.new_item_share = new_item_share
    users = min(USERS_FITTED, SCORES_FITTED // max(1, len(dataset.items)))
    mixture.fit(sample_users(dataset.held_out("valid"), users, 0), scores)
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
