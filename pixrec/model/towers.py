"""The item tower and the interleaved user tower, whose vectors lie in one space. The compact user tower is attached
once the item tower is trained.

Plain torch: knows neither files nor workers. What a tower sees of an item is decided in `encoding`.

Shapes: U distinct items · B histories · L items in a history · T tokens · W width of the language model
· D width of the shared space · P examples (a history and the item that followed it) · M tiles of pictures
· K tokens a tile · X numbers of a picture token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixrec.config import ModelConfig
from pixrec.model.backbone import Backbone
from pixrec.model.compact import CompactTower
from pixrec.model.encoding import Histories, Items

MIN_TEMPERATURE = 0.01
PASS_TOKENS = 256
"""What a pass through the backbone costs beside its tokens, in tokens, where rows are parted by length."""


class HistoryOutputs(NamedTuple):
    """What the objective needs of histories; fields as in `TowerOutputs`."""

    user: Tensor
    target_given_user: Tensor
    text_logits: Tensor | None
    text_ids: Tensor | None


@dataclass(frozen=True)
class TowerOutputs:
    """What the objective needs of one batch; unit vectors."""

    user: Tensor
    """v_U of every prefix that has a next item (P, D)"""
    target_given_user: Tensor
    """v_T|U of that next item (P, D)"""
    item: Tensor
    """v_T of the distinct items (U, D)"""
    target: Tensor
    """row in `item` of each example's next item (P,)"""
    text_logits: Tensor | None
    """scores of the next items' text tokens (text tokens, V); None when not wanted"""
    text_ids: Tensor | None
    """those tokens"""


class InterleavedUserTower(nn.Module):
    """The user tower of the PixRec paper: the history's text and pictures, in time order, through the backbone.

    The language model is causal, so one pass over a history gives v_U of every prefix, and every position is a training
    example.
    """

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.pooling = config.user_pooling
        self.projection = nn.Linear(width, config.embedding_width)

    def forward(self, hidden: Tensor, histories: Histories) -> Tensor:
        """Hidden states (B, T, W) to unit vectors (B, L, D), one for each prefix of the history."""
        if self.pooling == "separator":
            states = _take(hidden, histories.separator_at)
        else:
            content = (histories.is_token & ~histories.is_separator).unsqueeze(-1)
            sums = _take((hidden * content).cumsum(1), histories.separator_at)
            counts = _take(content.float().cumsum(1), histories.separator_at)
            states = sums / counts.clamp(min=1)
        return F.normalize(self.projection(states), dim=-1)


class DualTower(nn.Module):
    """Backbone, heads and user tower of one model."""

    unit = True
    """Whether item vectors have length 1."""

    def __init__(self, backbone: Backbone, config: ModelConfig, temperature: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = config.pooling
        self.item_proj = nn.Linear(backbone.width, config.embedding_width)
        self.user_tower = InterleavedUserTower(backbone.width, config)
        self.compact: CompactTower | None = None  # set once the item tower is trained (`artifact.with_compact`)
        self.by_length = True
        """Whether rows of different length may take several passes; not where every pass is a collective (FSDP)."""
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp().clamp(min=MIN_TEMPERATURE)

    def pictures(self, items: Items) -> Tensor:
        """Picture tokens (M·K, X) of all pictures of `items`; the vision part sees those that have none yet."""
        if not items.pixels.shape[0]:
            if not items.ready.shape[0]:
                return torch.zeros(0, self.backbone.family.picture_width, device=items.pixels.device)
            return items.ready.flatten(0, 1)
        made = self.backbone.picture_tokens(items.pixels, items.grid)
        if items.ready.shape[0]:
            made = torch.cat([made, items.ready])
        return made.flatten(0, 1)

    def item_vectors(self, items: Items, pictures: Tensor | None = None) -> Tensor:
        """v_T: each item encoded alone, unit vectors (U, D)."""
        pictures = self.pictures(items) if pictures is None else pictures
        hidden = self.states(items, pictures)
        pooled = _mean(hidden, items.is_token) if self.pooling == "mean" else _last(hidden, items.is_token)
        return F.normalize(self.item_proj(pooled), dim=-1)

    def search_vectors(self, content: Tensor) -> Tensor | None:
        """What a search by text or picture compares in place of item vectors, (U, C), where it has anything better."""
        return None

    def history_states(self, histories: Histories, pictures: Tensor) -> Tensor:
        """Last hidden states (B, T, W) of whole histories."""
        return self.states(histories, pictures)

    def states(self, sequences: Items | Histories, pictures: Tensor) -> Tensor:
        """Last hidden states (B, T, W). Rows go through the backbone parted by length, each group cut to the longest of
        it, so that little of what is computed is padding."""
        read = sequences.token_ids, sequences.is_token, sequences.picture_slot
        lengths = sequences.length.numpy()
        groups = length_groups(lengths) if self.by_length else []
        if len(groups) < 2:
            return self.backbone.hidden_states(*read, pictures)
        parts, longest = [], sequences.token_ids.shape[1]
        for rows in groups:
            length = int(lengths[rows[0]])
            chosen = torch.from_numpy(rows).to(pictures.device, non_blocking=True)
            token_ids, is_token, slots = (tensor[chosen, :length] for tensor in read)
            part = self.backbone.hidden_states(token_ids, is_token, slots, pictures)
            parts.append(F.pad(part, (0, 0, 0, longest - length)))
        place = torch.from_numpy(np.argsort(np.concatenate(groups))).to(pictures.device, non_blocking=True)
        return torch.cat(parts)[place]

    def user_vectors(self, items: Items, histories: Histories) -> Tensor:
        """v_U of whole histories by the interleaved tower, unit vectors (B, D)."""
        last = (histories.item >= 0).sum(1) - 1
        prefixes = self.user_tower(self.history_states(histories, self.pictures(items)), histories)
        return prefixes[torch.arange(len(last), device=last.device), last]

    def read_histories(self, histories: Histories, pictures: Tensor, generate: bool) -> HistoryOutputs:
        """Everything the objective needs of histories whose last item is a target only; `pictures` (M·K, X)."""
        hidden = self.history_states(histories, pictures)
        user = self.user_tower(hidden, histories).flatten(0, 1)[histories.example]
        if self.pooling == "mean":
            of_items = _mean_of_each_item(hidden, histories)
        else:
            of_items = _take(hidden, (histories.separator_at - 1).clamp(min=0))
        conditioned = F.normalize(self.item_proj(of_items.flatten(0, 1)[histories.example + 1]), dim=-1)
        if not generate:
            return HistoryOutputs(user, conditioned, None, None)
        logits = self.backbone.token_logits(hidden.flatten(0, 1)[histories.text - 1])
        return HistoryOutputs(user, conditioned, logits, histories.token_ids.flatten()[histories.text])

    def forward(self, items: Items, histories: Histories, generate: bool) -> TowerOutputs:
        """Everything the objective needs; `generate` asks for the scores of the next items' text."""
        pictures = self.pictures(items)
        vectors = self.item_vectors(items, pictures)
        read = self.read_histories(histories, pictures, generate)
        return TowerOutputs(
            read.user, read.target_given_user, vectors, histories.target, read.text_logits, read.text_ids
        )


def length_groups(lengths: np.ndarray) -> list[np.ndarray]:
    """Numbers of rows (int64) that are computed together, longest first, each group padded to its longest.

    Of all ways to part the rows, sorted by `lengths` (B,) in tokens, the one that computes the fewest tokens, where
    every group costs PASS_TOKENS more.
    """
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    bounds = np.flatnonzero(np.diff(falling, prepend=-1, append=-1))  # where another length begins, and the end
    cost, begins = np.zeros(len(bounds), np.int64), np.zeros(len(bounds), np.int64)
    for end in range(1, len(bounds)):  # of the rows before bounds[end]: by the group that ends there
        starts = bounds[:end]
        costs = cost[:end] + falling[starts] * (bounds[end] - starts) + PASS_TOKENS
        begins[end] = costs.argmin()
        cost[end] = costs[begins[end]]
    cuts, at = [], len(bounds) - 1
    while at := begins[at]:
        cuts.append(bounds[at])
    return np.split(order, cuts[::-1])


def tokens_of(length: Tensor) -> tuple[int, int]:
    """Tokens of rows (B,), and tokens computed for them, padding included."""
    lengths = length.numpy()
    return int(lengths.sum()), sum(len(rows) * int(lengths[rows[0]]) for rows in length_groups(lengths))


def _take(states: Tensor, index: Tensor) -> Tensor:
    """States (B, T, W) at positions (B, L)."""
    return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked tokens, (B, T, W) to (B, W)."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def _last(hidden: Tensor, is_token: Tensor) -> Tensor:
    """State of the last token of each row, (B, T, W) to (B, W)."""
    return _take(hidden, is_token.sum(1, keepdim=True) - 1)[:, 0]


def _mean_of_each_item(hidden: Tensor, histories: Histories) -> Tensor:
    """Mean over the tokens of each item of the histories, separators left out: (B, T, W) to (B, L, W)."""
    batch, items_length = histories.item.shape
    content = (histories.is_token & ~histories.is_separator).unsqueeze(-1).to(hidden.dtype)
    index = histories.position.unsqueeze(-1)
    sums = hidden.new_zeros(batch, items_length, hidden.shape[-1])
    sums = sums.scatter_add(1, index.expand_as(hidden), hidden * content)
    counts = hidden.new_zeros(batch, items_length, 1).scatter_add(1, index, content)
    return sums / counts.clamp(min=1)
