"""The compact user tower: a causal transformer over item vectors, in which every position predicts its next item.

`CompactUserTower` turns the item vectors of a history into user vectors. `CompactTower` adds the item vectors
themselves, made of content, of learned id vectors, or of both. With id vectors alone it is SASRec (Kang & McAuley, ICDM
2018). Plain torch: knows neither files nor workers.

Time. Where the tower reads it, it reads differences of timestamps in buckets, never dates: the gap since the event
before, as a vector added to the input, and the age of each event relative to the newest one read, as a bias of
attention for each head (relative time of TiSASRec, Li et al., WSDM 2020; bias by logarithmic bucket as in HSTU, Zhai
et al., ICML 2024). The time of the next event, or of the request, is never read.

Order. Rotary positions in attention (Su et al., RoFormer, Neurocomputing 2024): queries and keys are rotated by their
position, so that their products depend on how far apart two events are and not on where they are. Or, as in SASRec, a
learned vector for each position is added to the input.

Shapes: B histories · L items in a history · U items · C width of content vectors · D width of the shared space.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixrec.config import CompactConfig

INITIAL_TEMPERATURE, MIN_TEMPERATURE = 0.2, 0.01
ID_EMBEDDING_STD = 0.02
"""Standard deviation of the numbers of a learned vector at the start; whitened content starts with the same."""
WHITENING_RIDGE = 0.1
"""Added to the variance of each direction of the content, as a share of the mean variance: the weakest are noise."""

_WHITENED_AT_A_TIME = 65_536

UNKNOWN_TIME = torch.iinfo(torch.int64).min
"""The timestamp of an event whose time is unknown."""

TIME_BUCKETS = 32
"""Bucket 0 is unknown, 1 is less than a second, 2 is 1 to 2 s, 3 is 3 to 6 s and so on, the last 34 years and more."""


def time_buckets(later: Tensor, earlier: Tensor) -> Tensor:
    """Buckets, int64 0 to TIME_BUCKETS - 1, of the time from `earlier` to `later` (any shapes that broadcast), both in
    milliseconds or UNKNOWN_TIME."""
    seconds = ((later - earlier) // 1000).clamp(min=0)
    bucket = torch.frexp((seconds + 1).double()).exponent.long().clamp(max=TIME_BUCKETS - 1)
    return bucket.masked_fill((later == UNKNOWN_TIME) | (earlier == UNKNOWN_TIME), 0)


def _rotary_angles(places: int, width: int) -> Tensor:
    """Cosine and sine (2, places, width / 2) of the angle by which each pair of numbers is rotated at each place; the
    slowest pair rotates by about one radian over all places."""
    speeds = float(places) ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(places).unsqueeze(1) * speeds
    return torch.stack([angles.cos(), angles.sin()])


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys (..., W) rotated by cosines and sines (2, ..., W / 2)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class _Block(nn.Module):
    """Pre-norm transformer block, causal. Attention itself has no dropout: the fused kernels have none on a CPU."""

    angles: Tensor | None

    def __init__(self, width: int, config: CompactConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        inner = config.feed_forward_multiple * width
        self.feed = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.dropout = nn.Dropout(config.dropout)
        self.age = nn.Embedding(TIME_BUCKETS, config.heads) if config.time in ("ages", "both") else None
        rotary = config.positions == "rotary"
        angles = _rotary_angles(config.max_history_items, width // config.heads) if rotary else None
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x: Tensor, ages: Tensor | None = None) -> Tensor:
        """States (B, L, D) of all positions. `ages` (B, L, L): bucket of each event's age seen from each position."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.angles is not None:
            q, k = _rotated(q, self.angles[:, :length]), _rotated(k, self.angles[:, :length])
        if ages is None:
            return self._feed(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self._feed(x, F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(ages)))

    def at(self, x: Tensor, last: Tensor, ages: Tensor | None = None) -> Tensor:
        """As `forward`, at position `last` (B,) of each history only: states (B, 1, D), for less than half the work."""
        batch, length, width = x.shape
        normed, one = self.attention_norm(x), last.view(-1, 1, 1).expand(-1, 1, width)
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(normed.gather(1, one), weight[:width], bias[:width]).view(batch, self.heads, 1, -1)
        kv = F.linear(normed, weight[width:], bias[width:]).view(batch, length, 2, self.heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)
        if self.angles is not None:
            q, k = _rotated(q, self.angles[:, last, None, None]), _rotated(k, self.angles[:, :length])
        if ages is None:
            mask = (torch.arange(length, device=x.device) <= last.unsqueeze(1)).view(batch, 1, 1, length)
        else:
            mask = self._bias(ages.gather(1, last.view(-1, 1, 1).expand(-1, 1, length)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self._feed(x.gather(1, one), mixed)

    def _bias(self, ages: Tensor) -> Tensor:
        """The bias of attention (B, H, Q, L) for age buckets (B, Q, L); minus infinity for events in the future."""
        assert self.age is not None
        future = torch.full_like(self.age.weight[:1], -torch.inf)
        return F.embedding(ages, torch.cat([self.age.weight, future])).permute(0, 3, 1, 2)

    def _feed(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class CompactUserTower(nn.Module):
    """Item vectors of histories to a user vector for each prefix."""

    def __init__(self, width: int, config: CompactConfig) -> None:
        super().__init__()
        self.max_history_items = config.max_history_items
        self.width, self.scale = width, math.sqrt(width)
        self.position = nn.Embedding(config.max_history_items, width) if config.positions == "learned" else None
        self.gap = nn.Embedding(TIME_BUCKETS, width) if config.time in ("gaps", "both") else None
        self.reads_ages, self.reads_times = config.time in ("ages", "both"), config.time != "none"
        self.time_dropout = config.time_dropout
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(width, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise)

    def forward(self, vectors: Tensor, timestamps: Tensor | None = None) -> Tensor:
        """Item vectors (B, L, D), oldest first, padded on the right by anything, to states (B, L, D).

        State l has read items 0 … l and nothing later, so what stands in the padding reaches no state that counts.
        `timestamps` (B, L): when each event was, in milliseconds, never falling, or UNKNOWN_TIME; None: all unknown.
        """
        timestamps = self._known(timestamps)
        x, ages = self._inputs(vectors, timestamps), self._ages(timestamps)
        for block in self.blocks:
            x = block(x, ages)
        return self.norm(x)

    def at(self, vectors: Tensor, last: Tensor, timestamps: Tensor | None = None) -> Tensor:
        """The states (B, D) at the positions `last` (B,) only, which is what serving needs."""
        timestamps = self._known(timestamps)
        x, ages, (*lower, top) = self._inputs(vectors, timestamps), self._ages(timestamps), self.blocks
        for block in lower:
            x = block(x, ages)
        return self.norm(cast(_Block, top).at(x, last, ages)[:, 0])

    def _known(self, timestamps: Tensor | None) -> Tensor | None:
        """The timestamps that the tower reads, if any; in training, `time_dropout` of the histories lose theirs."""
        if timestamps is None or not self.reads_times:
            return None
        if not self.training or not self.time_dropout:
            return timestamps
        lost = torch.rand(len(timestamps), 1, device=timestamps.device) < self.time_dropout
        return timestamps.masked_fill(lost, UNKNOWN_TIME)

    def _inputs(self, vectors: Tensor, timestamps: Tensor | None) -> Tensor:
        x = vectors * self.scale
        if self.position is not None:
            x = x + self.position.weight[: vectors.shape[1]]
        if self.gap is not None and timestamps is None:
            x = x + self.gap.weight[0]
        elif self.gap is not None and timestamps is not None:
            first = torch.full_like(timestamps[:, :1], UNKNOWN_TIME)
            x = x + self.gap(time_buckets(timestamps, torch.cat([first, timestamps[:, :-1]], dim=1)))
        return self.dropout(x)

    def _ages(self, timestamps: Tensor | None) -> Tensor | None:
        """Buckets (B, L, L) of the age of event k seen from event l at [l, k], TIME_BUCKETS where k is later; None
        where nothing is known: one bias for all events is none."""
        if timestamps is None or not self.reads_ages:
            return None
        future = torch.ones(timestamps.shape[1], timestamps.shape[1], dtype=torch.bool, device=timestamps.device)
        ages = time_buckets(timestamps.unsqueeze(2), timestamps.unsqueeze(1))
        return ages.masked_fill(future.triu(1), TIME_BUCKETS)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class CompactTower(nn.Module):
    """The user tower, the item vectors that it reads and ranks, and the temperature of their scores.

    An item's vector is made of its content (the item tower's vector, C wide, given from outside), of a vector learned
    for it alone, or of their sum; an item that was never trained on has its content only. `content_width` None leaves
    content out, `num_ids` 0 the learned vectors; with id vectors alone, learned positions and unit length off, the
    tower is SASRec.
    """

    def __init__(
        self, width: int, config: CompactConfig, content_width: int | None, num_ids: int, *, unit: bool = True
    ) -> None:
        super().__init__()
        if content_width is None and not num_ids:
            raise ValueError("item vectors are made of content, id vectors or both: neither was given")
        self.unit = unit
        self.content = None if content_width is None else nn.Linear(content_width, width)
        self.id_embedding = nn.Embedding(num_ids, width) if num_ids else None
        self.user = CompactUserTower(width, config)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(INITIAL_TEMPERATURE)), requires_grad=unit)
        if self.content is not None:
            nn.init.orthogonal_(self.content.weight)
            nn.init.zeros_(self.content.bias)
        if self.id_embedding is not None:
            nn.init.normal_(self.id_embedding.weight, std=ID_EMBEDDING_STD)

    @torch.no_grad()
    def whiten(self, content: Tensor) -> None:
        """Start the projection of content as the whitening of these vectors (N, C), followed by its random projection.

        A language model's vectors of texts lie in a narrow cone: most of each vector is common to all and says
        nothing about the item (Su et al., arXiv 2103.15316; in recommenders Hou et al., UniSRec, KDD 2022).
        """
        if self.content is None:
            return
        blocks, device = content.split(_WHITENED_AT_A_TIME), self.content.weight.device
        mean = torch.stack([block.to(device).double().sum(0) for block in blocks]).sum(0) / len(content)
        spread = torch.zeros(content.shape[1], content.shape[1], dtype=torch.float64, device=device)
        for block in blocks:
            centred = block.to(device).double() - mean
            spread += centred.T @ centred
        variances, directions = torch.linalg.eigh(spread / len(content))
        ridge = WHITENING_RIDGE * variances.mean().clamp(min=torch.finfo(torch.float32).tiny)
        scale = ID_EMBEDDING_STD / (variances.clamp(min=0) + ridge).sqrt()
        weight = self.content.weight.double() @ (directions * scale) @ directions.T
        self.content.weight.copy_(weight)
        self.content.bias.copy_(-weight @ mean)

    @torch.no_grad()
    def continue_from(self, other: CompactTower, rows: Tensor) -> None:
        """Take the weights of a tower of the same settings. rows: int64 (num_ids,), where the vector that each id has
        learned lies in the other, -1 for one that it lacks, which is left to its content where there is any."""
        learned = {"id_embedding.weight"}
        self.load_state_dict({n: t for n, t in other.state_dict().items() if n not in learned}, strict=False)
        if self.id_embedding is None or other.id_embedding is None:
            return
        known = (rows >= 0).to(self.id_embedding.weight.device)
        self.id_embedding.weight[known] = other.id_embedding.weight[rows[rows >= 0].to(known.device)]
        if self.content is not None:
            self.id_embedding.weight[~known] = 0

    @torch.no_grad()
    def scale_content(self) -> None:
        """Start the projection of content that is standardised already as small as the learned vectors start."""
        if self.content is not None:
            self.content.weight.mul_(ID_EMBEDDING_STD)

    @property
    def temperature(self) -> Tensor:
        """What scores are divided by; 1 where vectors are not normalised."""
        if not self.unit:
            return torch.ones_like(self.log_temperature)
        return self.log_temperature.exp().clamp(min=MIN_TEMPERATURE)

    def item_vectors(self, content: Tensor | None, id_rows: Tensor) -> Tensor:
        """Content vectors (U, C) and rows of learned vectors (U,), -1 for none, to item vectors (U, D)."""
        vectors = torch.zeros(len(id_rows), self.user.width, device=id_rows.device)
        if self.content is not None:
            vectors = vectors + self.content(content)
        if self.id_embedding is not None:
            vectors = vectors + self.id_embedding(id_rows.clamp(min=0)) * (id_rows >= 0).unsqueeze(1)
        return F.normalize(vectors, dim=-1) if self.unit else vectors

    def user_vectors(self, vectors: Tensor, timestamps: Tensor | None = None) -> Tensor:
        """Item vectors (B, L, D) of histories, padded on the right, to the user vector (B, L, D) of each prefix.

        `timestamps` (B, L) as `CompactUserTower.forward` takes them.
        """
        return self._finished(self.user(vectors, timestamps))

    def user_vectors_at(self, vectors: Tensor, last: Tensor, timestamps: Tensor | None = None) -> Tensor:
        """The user vector (B, D) of one prefix of each history: the one that ends at `last` (B,)."""
        return self._finished(self.user.at(vectors, last, timestamps))

    def _finished(self, states: Tensor) -> Tensor:
        return F.normalize(states, dim=-1) if self.unit else states
