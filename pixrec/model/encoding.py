"""The one way from items to tensors; training, batch embedding and serving all go through it.

An item becomes its text tokens followed by its picture's tokens; a history becomes its items, each closed by a
separator. Knows the tokenizer and the size of the pictures, not the weights.

Shapes: U distinct items · B histories · L items in a history · T tokens · M tiles of pictures · K tokens a
tile · X numbers of a picture token · S side of a tile in pixels (`families.base` says what tiles are).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.utils import cached_file

from pixrec.config import Modalities
from pixrec.data.images import PictureSize, decode_picture
from pixrec.model.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>")


@dataclass(frozen=True)
class Content:
    """What a tower may see of one item: its text and, where there is one, its decoded picture uint8,
    which `ItemEncoder.decode` makes.

    In place of the pixels there may be the picture tokens (tokens, X) that a frozen vision part made of them.
    """

    text: str
    pixels: np.ndarray | None


_ON_CPU = ("length", "grid")
"""What a model's shapes follow from: to read it off a GPU, the processor would have to wait for it."""


@dataclass(frozen=True)
class _Tensors:
    length: Tensor
    """(rows,) int64, tokens of each row. Stays on the CPU, which chooses by it what to compute together."""

    def to(self, device: torch.device | str) -> Self:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{n: t if n in _ON_CPU else t.to(device, non_blocking=True) for n, t in moved.items()})


@dataclass(frozen=True)
class Items(_Tensors):
    """U encoded items."""

    token_ids: Tensor
    """(U, T) int64, padded on the right"""
    is_token: Tensor
    """(U, T) bool, False on padding"""
    is_text: Tensor
    """(U, T) bool, True on text tokens"""
    picture_slot: Tensor
    """(U, T) int64, row among the (M·K) picture tokens, -1 elsewhere"""
    pixels: Tensor
    """(M - R, S, S, 3) uint8, the tiles of the pictures that are still to be encoded, which come first"""
    grid: Tensor
    """(pictures to be encoded, 2) int64, rows and columns of tiles of each. Stays on the CPU, as `length` does."""
    ready: Tensor
    """(R, K, X) picture tokens of the others, computed before, in the type they are stored in"""

    def __len__(self) -> int:
        return self.token_ids.shape[0]


@dataclass(frozen=True)
class Histories(_Tensors):
    """B token sequences over the items of an `Items`."""

    token_ids: Tensor
    """(B, T) int64, padded on the right"""
    is_token: Tensor
    """(B, T) bool"""
    is_text: Tensor
    """(B, T) bool"""
    picture_slot: Tensor
    """(B, T) int64, as in `Items`"""
    position: Tensor
    """(B, T) int64, which item of the history the token belongs to (its separator included); 0 on padding"""
    is_separator: Tensor
    """(B, T) bool"""
    separator_at: Tensor
    """(B, L) int64, index of the token that closes each item; 0 on padding"""
    item: Tensor
    """(B, L) int64, row in `Items`; -1 on padding"""
    example: Tensor
    """(P,) int64, place in the flat (B·L) of the last item of each prefix that has an item to foretell, one further"""
    text: Tensor
    """(text tokens,) int64, places in the flat (B·T) of `target_text`"""

    @property
    def target(self) -> Tensor:
        """(P,) row in `Items` of each example's next item."""
        return self.item.flatten()[self.example + 1]

    @property
    def is_target(self) -> Tensor:
        """(B, L) bool, which items are to be foretold by those before; never the first, nor padding."""
        flat = torch.zeros(self.item.numel(), dtype=torch.bool, device=self.item.device)
        return flat.index_fill(0, self.example + 1, True).view_as(self.item)

    @property
    def target_text(self) -> Tensor:
        """(B, T) bool, text tokens of the next items."""
        return self.is_text & self.is_target.gather(1, self.position)


class ItemEncoder:
    """Text and pictures of items to `Items` and `Histories`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        family: Family,
        max_text_tokens: int,
        special_tokens: bool = False,
    ) -> None:
        """special_tokens: whether a text has those around it that the tokenizer adds, as encoders want it."""
        self.tokenizer = tokenizer
        self.max_text_tokens, self._special_tokens = max_text_tokens, special_tokens
        self.picture_size: PictureSize = family.picture_size
        self.image_size_px = family.image_size_px
        self.tokens_per_picture = family.tokens_per_picture
        self.tile_px, self.tokens_per_tile = family.tile_px, family.tokens_per_tile
        closes = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self.separator_id = int(closes)
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else closes)
        known = tokenizer.get_vocab()
        prefix, suffix = (
            [known[token] for token in tokens] for tokens in (family.picture_prefix, family.picture_suffix)
        )
        self._prefix, self._suffix, self._image_id = prefix, suffix, family.image_token_id

    def decode(self, picture: bytes) -> np.ndarray:
        """A picture as the backbone takes it, uint8 (height, width, 3). Raises UnreadableImage."""
        return decode_picture(picture, self.picture_size)

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Text tokens of each text, cut to `max_text_tokens`; none of an empty one."""
        if not texts:
            return []
        rows = self.tokenizer(
            list(texts), add_special_tokens=self._special_tokens, truncation=True, max_length=self.max_text_tokens
        )
        return [
            np.array(ids if text else [], dtype=np.int64) for text, ids in zip(texts, rows["input_ids"], strict=True)
        ]

    def items(self, contents: Sequence[Content], modalities: Modalities | Sequence[Modalities] = "both") -> Items:
        """Encode items; `modalities`, one for all or one for each, says what is kept of them."""
        return self.items_from_tokens(
            self.tokenize([c.text for c in contents]), [c.pixels for c in contents], modalities
        )

    def items_from_tokens(
        self,
        text_ids: Sequence[np.ndarray],
        pictures: Sequence[np.ndarray | None],
        modalities: Modalities | Sequence[Modalities] = "both",
    ) -> Items:
        """As `items`, with the text tokenised before."""
        kept: Sequence[str] = [modalities] * len(text_ids) if isinstance(modalities, str) else modalities
        seen = [None if keep == "text" else picture for picture, keep in zip(pictures, kept, strict=True)]
        fresh = [picture for picture in seen if picture is not None and picture.dtype == np.uint8]
        ready = [picture for picture in seen if picture is not None and picture.dtype != np.uint8]
        pixels, grid = cut_into_tiles(fresh, self.tile_px)
        counts = [*(grid.prod(1) * self.tokens_per_tile).tolist(), *map(len, ready)]
        starts = np.cumsum([0, *counts]).tolist()
        numbers, numbers_ready = iter(range(len(fresh))), iter(range(len(fresh), len(counts)))
        rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for ids, picture, keep in zip(text_ids, seen, kept, strict=True):
            slots = np.arange(0)
            if picture is not None:
                number = next(numbers if picture.dtype == np.uint8 else numbers_ready)
                slots = starts[number] + np.arange(counts[number])
            rows.append(self._row(ids if keep != "image" else ids[:0], slots))
        length = max(len(row[0]) for row in rows)
        padded = [_pad([row[i] for row in rows], length, fill) for i, fill in enumerate((self.pad_id, 0, -1))]
        is_token = np.arange(length) < np.array([len(row[0]) for row in rows])[:, None]
        stored = torch.from_numpy(np.concatenate(ready)) if ready else torch.zeros(0, 1)
        return Items(
            length=torch.from_numpy(is_token.sum(1)),
            token_ids=torch.from_numpy(padded[0]),
            is_token=torch.from_numpy(is_token),
            is_text=torch.from_numpy(padded[1].astype(bool)),
            picture_slot=torch.from_numpy(padded[2]),
            pixels=pixels,
            grid=grid,
            ready=stored.unflatten(0, (-1, self.tokens_per_tile)),
        )

    def select(self, items: Items, chosen: np.ndarray) -> Items:
        """Some of the items, by number and in the order given, as if they had been encoded alone."""
        numbers, per_tile = torch.from_numpy(chosen), self.tokens_per_tile
        lengths = items.length[numbers]
        length = int(lengths.max())
        token_ids, is_token, is_text, slots = (
            t[numbers, :length] for t in (items.token_ids, items.is_token, items.is_text, items.picture_slot)
        )
        last = slots.max(1).values  # (U,) of the picture of each item, or -1
        first = torch.where(slots >= 0, slots, last.unsqueeze(1)).min(1).values
        shown, fresh_tiles = last >= 0, len(items.pixels)
        is_fresh = shown & (first < fresh_tiles * per_tile)
        tiles = torch.where(shown, (last - first + 1) // per_tile, 0)
        order = torch.cat([torch.nonzero(is_fresh), torch.nonzero(shown & ~is_fresh)]).flatten()
        start = torch.zeros_like(first)
        start[order] = per_tile * (tiles[order].cumsum(0) - tiles[order])
        moved = torch.where(slots >= 0, slots + (start - first).unsqueeze(1), -1)
        taken = torch.cat([first.new_zeros(0), *(first[i] // per_tile + torch.arange(int(tiles[i])) for i in order)])
        ends = items.grid.prod(1).cumsum(0)
        pictures = torch.searchsorted(ends, first[is_fresh] // per_tile, right=True)
        stored = items.ready[taken[taken >= fresh_tiles] - fresh_tiles]
        if not len(stored):
            stored = torch.zeros(0, per_tile, 1)  # as where there is none
        pixels = items.pixels[taken[taken < fresh_tiles]]
        return Items(lengths, token_ids, is_token, is_text, moved, pixels, items.grid[pictures], stored)

    def histories(
        self, items: Items, histories: Sequence[np.ndarray], is_target: Sequence[np.ndarray] | None = None
    ) -> Histories:
        """Write histories, each a row of indices into `items`, oldest first, as token sequences.

        `is_target`, bool beside them: which are to be foretold, never the first; None: all others of each.
        """
        lengths = items.length.numpy()
        token_ids, text, slots = items.token_ids.numpy(), items.is_text.numpy(), items.picture_slot.numpy()
        parts: dict[str, list[np.ndarray]] = {k: [] for k in ("token_ids", "is_text", "slot", "position", "separator")}
        ends = []
        for history in histories:
            counts = lengths[history] + 1
            total = int(counts.sum())
            position = np.repeat(np.arange(len(history)), counts)
            end = np.cumsum(counts) - 1
            offset = np.arange(total) - np.repeat(end + 1 - counts, counts)
            row = history[position]
            is_separator = np.zeros(total, dtype=np.int64)
            is_separator[end] = 1
            column = np.minimum(offset, token_ids.shape[1] - 1)
            closes = is_separator == 1
            parts["token_ids"].append(np.where(closes, self.separator_id, token_ids[row, column]))
            parts["is_text"].append(np.where(closes, 0, text[row, column]).astype(np.int64))
            parts["slot"].append(np.where(closes, -1, slots[row, column]))
            parts["position"].append(position)
            parts["separator"].append(is_separator)
            ends.append(end)
        length, items_length = max(map(len, parts["token_ids"])), max(map(len, histories))
        is_token = np.arange(length) < np.array([len(p) for p in parts["token_ids"]])[:, None]
        is_text, position = _pad(parts["is_text"], length, 0).astype(bool), _pad(parts["position"], length, 0)
        marks = [np.arange(len(history)) > 0 for history in histories] if is_target is None else is_target
        foretold = _pad(marks, items_length, 0).astype(bool)
        return Histories(
            length=torch.from_numpy(is_token.sum(1)),
            token_ids=torch.from_numpy(_pad(parts["token_ids"], length, self.pad_id)),
            is_token=torch.from_numpy(is_token),
            is_text=torch.from_numpy(is_text),
            picture_slot=torch.from_numpy(_pad(parts["slot"], length, -1)),
            position=torch.from_numpy(position),
            is_separator=torch.from_numpy(_pad(parts["separator"], length, 0).astype(bool)),
            separator_at=torch.from_numpy(_pad(ends, items_length, 0)),
            item=torch.from_numpy(_pad([np.asarray(h) for h in histories], items_length, -1)),
            example=torch.from_numpy(np.flatnonzero(foretold) - 1),
            text=torch.from_numpy(np.flatnonzero(is_text & np.take_along_axis(foretold, position, 1))),
        )

    def _row(self, text: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, which of them are text, and picture slots of one item, whose picture has `slots`."""
        if not len(slots) and not len(text):
            nothing = np.array([self.separator_id], dtype=np.int64)  # an item of which nothing is known
            return nothing, np.zeros(1, np.int64), np.full(1, -1, np.int64)
        before, after = (self._prefix, self._suffix) if len(slots) else ([], [])
        ids = np.concatenate([text, before, np.full(len(slots), self._image_id), after]).astype(np.int64)
        is_text, slot = np.zeros(len(ids), np.int64), np.full(len(ids), -1, np.int64)
        is_text[: len(text)] = 1
        first = len(text) + len(before)
        slot[first : first + len(slots)] = slots
        return ids, is_text, slot


def cut_into_tiles(pictures: Sequence[np.ndarray], side_px: int) -> tuple[Tensor, Tensor]:
    """Pictures (height, width, 3) uint8 as tiles (N, S, S, 3), row by row, and the rows and columns of each (P, 2)."""
    grid = np.array([np.array(picture.shape[:2]) // side_px for picture in pictures], np.int64).reshape(-1, 2)
    tiles = np.zeros((int(grid.prod(1).sum()), side_px, side_px, 3), np.uint8)
    start = 0
    for picture, (rows, columns) in zip(pictures, grid.tolist(), strict=True):
        cut = picture.reshape(rows, side_px, columns, side_px, 3).swapaxes(1, 2)
        tiles[start : start + rows * columns].reshape(cut.shape)[:] = cut
        start += rows * columns
    return torch.from_numpy(tiles), torch.from_numpy(grid)


def _pad(rows: Sequence[np.ndarray], length: int, fill: int) -> np.ndarray:
    out = np.full((len(rows), length), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def train_tokenizer(texts: Sequence[str], vocabulary_tokens: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the catalog's own texts; deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<end_of_utterance>",
        extra_special_tokens=["<fake_token_around_image>", "<global-img>", "<image>"],
    )


class PictureFacts(NamedTuple):
    """What a backbone's processor does to pictures."""

    mean: list[float]
    """of the pixels that the backbone was trained with, by channel"""
    std: list[float]
    limits: tuple[int, int] | None
    """fewest and most pixels of a picture that keeps its shape"""


def picture_facts(name_or_folder: str, revision: str | None = None) -> PictureFacts:
    """From the file of the processor, which for transformers 5 is one for all of it in place of the image processor's
    own."""
    settings: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = cached_file(name_or_folder, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            found = json.loads(Path(file).read_text())
            settings |= found.get("image_processor", {}) if name == "processor_config.json" else found
    size = settings.get("size") or {}
    least, most = settings.get("min_pixels") or size.get("shortest_edge"), settings.get("max_pixels")
    most = most or size.get("longest_edge")
    limits = (int(least), int(most)) if least and most else None
    return PictureFacts(settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3), limits)
