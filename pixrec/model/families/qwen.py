"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an encoder, a patch merger, a Qwen with multimodal rotary positions.

The family takes pictures of any shape: sides are multiples of a merged patch, which becomes one token, and the number
of pixels is bounded. A picture token holds its row and column in the picture besides its state, as its position
follows from them.

Qwen3-VL also adds what its encoder held in earlier layers to the states of the picture tokens after its first decoder
layers (DeepStack, Meng et al. 2024, arXiv 2406.04334). These features are part of a picture token here, so a stored
token has them too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import vision_utils

from pixrec.data.images import PixelBudget, largest_side
from pixrec.model.families.base import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESSOR_LIMITS = 56 * 56, 28 * 28 * 1280
"""What Qwen2-VL's processor takes where its file says nothing."""
PATCHES_PER_SIDE = 16
"""Of the largest square, until `limit_pixels` says otherwise."""
SEGMENTS = "flash_by_sdpa"
"""Names `attend_in_segments`. To what has "flash" in its name transformers hands all pictures in one call."""


def attend_in_segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, cu_seq_lens_q: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Attention (1, N, H, D) of patches (1, H, N, D) within pictures, or windows of them, that begin and end at
    `cu_seq_lens_q` (S + 1,), on the CPU: one call for all of one length, where transformers makes one for each."""
    lengths = tuple(cu_seq_lens_q.diff().tolist())
    whole = [states[0].transpose(0, 1) for states in (query, key, value)]  # (N, H, D)
    parts, (places, back) = [], _places(lengths, query.device)
    for length, place in places:
        some = whole if back is None else [states[place] for states in whole]
        q, k, v = (states.unflatten(0, (-1, length)).transpose(1, 2) for states in some)
        made = F.scaled_dot_product_attention(q, k, v, scale=options.get("scaling"))
        parts.append(made.transpose(1, 2).flatten(0, 1))
    return (parts[0] if back is None else torch.cat(parts)[back]).unsqueeze(0), None


@functools.lru_cache(maxsize=16)
def _places(lengths: tuple[int, ...], device: torch.device) -> tuple[list[tuple[int, Tensor]], Tensor | None]:
    """Each length with the places of the patches in segments of that length; and where, after these are joined, each
    patch stands, None where nothing has moved."""
    of_patch = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))
    found = [(length, torch.nonzero(of_patch == length).flatten()) for length in sorted(set(lengths))]
    back = torch.cat([place for _, place in found]).argsort() if len(found) > 1 else None
    moved = [(length, place.to(device, non_blocking=True)) for length, place in found]
    return moved, None if back is None else back.to(device, non_blocking=True)


class QwenVL(Family):
    picture_prefix = ("<|vision_start|>",)
    picture_suffix = ("<|vision_end|>",)
    vision_parts = ("visual",)
    vision_attention = (r"attn\.qkv", r"attn\.proj")  # another `proj` embeds the patches

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.vision = self.config.vision_config
        self.merge, self.patch = int(self.vision.spatial_merge_size), int(self.vision.patch_size)
        most = (PATCHES_PER_SIDE * self.patch) ** 2
        self.budget = PixelBudget(self.tile_px, min(PROCESSOR_LIMITS[0], most), most)

    def limit_pixels(self, own: tuple[int, int] | None, least: int | None, most: int) -> None:
        lower, upper = own or PROCESSOR_LIMITS
        upper = max(self.tile_px**2, min(upper, most))
        self.budget = PixelBudget(self.tile_px, min(lower if least is None else least, upper), upper)

    @property
    def picture_size(self) -> PixelBudget:
        return self.budget

    @property
    def image_size_px(self) -> int:
        return largest_side(self.budget)

    @property
    def tile_px(self) -> int:
        return self.merge * self.patch

    @property
    def tokens_per_tile(self) -> int:
        return 1

    @property
    def tokens_per_picture(self) -> int:
        return (self.image_size_px // self.tile_px) ** 2

    @property
    def picture_width(self) -> int:
        return super().picture_width + 2

    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor, grid: Tensor) -> Tensor:
        return torch.cat([*self.states(self.features(model, pixels, grid)), self.places(grid, pixels)], dim=-1)[:, None]

    def features(self, model: PreTrainedModel, pixels: Tensor, grid: Tensor) -> Any:
        """What the library's encoder returns."""
        frames = F.pad(self.merge * grid, (1, 0), value=1)
        return model.model.get_image_features(self.patches(pixels), frames, **self.read_off(frames, pixels.device))

    def read_off(self, frames: Tensor, device: torch.device) -> dict[str, Tensor]:
        """What the encoder reads off the shapes of pictures `frames` (P, 3). It is made here, on the CPU, as the
        encoder would have to wait for a GPU at every layer; borders of segments stay there."""
        found = {"position_ids": vision_utils.get_vision_position_ids(frames, self.merge).to(device, non_blocking=True)}
        found["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(frames)
        if hasattr(self.vision, "fullatt_block_indexes"):
            window, borders = vision_utils.get_vision_window_index(
                frames, self.merge, int(self.vision.window_size), self.patch
            )
            found |= {"window_index": window.to(device, non_blocking=True), "cu_window_seqlens": borders}
        return found

    def tune(self, model: PreTrainedModel) -> None:
        if self.vision._attn_implementation == "sdpa":
            eager = torch.compiler.disable(attend_in_segments)  # which reads lengths off a tensor
            transformers.AttentionInterface.register(SEGMENTS, eager)
            self.vision._attn_implementation_internal = SEGMENTS

    def states(self, features: Any) -> list[Tensor]:
        """Of every token (N, W) for the decoder's input, and for deeper layers."""
        return [_joined(features.pooler_output)]

    def patches(self, pixels: Tensor) -> Tensor:
        """Tiles (N, 3, S, S) to flat patches (N·merge², 3·frames·patch²), as the encoder takes them.

        A picture stands for all frames of the encoder's temporal patch.
        """
        tiles = pixels.unflatten(3, (self.merge, self.patch)).unflatten(2, (self.merge, self.patch))
        frames = tiles.permute(0, 2, 4, 1, 3, 5).unsqueeze(4)
        frames = frames.expand(*frames.shape[:4], int(self.vision.temporal_patch_size), self.patch, self.patch)
        return frames.reshape(len(pixels) * self.merge**2, -1)

    def places(self, grid: Tensor, like: Tensor) -> Tensor:
        """(N, 2) row and column of each tile in its picture."""
        count = grid.prod(1)
        at = torch.arange(len(like))
        first = (count.cumsum(0) - count).repeat_interleave(count, output_size=len(like))
        columns = grid[:, 1].repeat_interleave(count, output_size=len(like))
        places = torch.stack([(at - first) // columns, (at - first) % columns], dim=1)
        return places.to(like.device, like.dtype, non_blocking=True)

    def hidden_states(
        self, model: PreTrainedModel, embeddings: Tensor, is_token: Tensor, picture_slot: Tensor, deeper: Tensor
    ) -> Tensor:
        output = self.language_model(model)(
            inputs_embeds=embeddings,
            position_ids=self.positions(is_token, picture_slot, deeper[:, -2:]),
            use_cache=False,
            **self.deepstack(picture_slot, deeper[:, :-2]),
        )
        return output.last_hidden_state

    def deepstack(self, picture_slot: Tensor, deeper: Tensor) -> dict[str, Any]:
        """What the decoder is given besides the embeddings; nothing before Qwen3-VL."""
        return {}

    def positions(self, is_token: Tensor, picture_slot: Tensor, places: Tensor) -> Tensor:
        """Positions in time, height and width (3, B, T) (M-RoPE, Wang et al. 2024, arXiv 2409.12191, §2.1).

        A text token moves all three on by one. The tokens of a picture share the time and take height and width from
        their place in it, which `places` (N, 2) tells; the next token goes on after the picture's longer side.
        """
        if not places.shape[0]:
            places = picture_slot.new_zeros(1, 2)
        in_picture = picture_slot >= 0
        place = torch.where(in_picture.unsqueeze(-1), places[picture_slot.clamp(min=0)].long(), 0)
        row, column = place.unbind(-1)
        ends = torch.ones_like(in_picture)
        ends[:, :-1] = ~in_picture[:, 1:] | (place[:, 1:].sum(-1) == 0)
        advance = torch.where(in_picture, ends * (torch.maximum(row, column) + 1), is_token.long())
        start = advance.cumsum(1) - advance
        return torch.stack([start, start + row, start + column])


def _joined(tokens: Tensor | Sequence[Tensor]) -> Tensor:
    """The library's tokens, of all pictures joined (N, W) or a list by picture by its release, as (N, W)."""
    return tokens if isinstance(tokens, Tensor) else torch.cat(list(tokens))


class Qwen3VL(QwenVL):
    @property
    def picture_width(self) -> int:
        return self.state_width * (1 + len(self.vision.deepstack_visual_indexes)) + 2

    @property
    def state_width(self) -> int:
        return int(self.config.text_config.hidden_size)

    @property
    def vision_settings(self) -> tuple[Any, ...]:
        return tuple(self.vision.deepstack_visual_indexes)

    def states(self, features: Any) -> list[Tensor]:
        return [_joined(level) for level in (features.pooler_output, *features.deepstack_features)]

    def read_off(self, frames: Tensor, device: torch.device) -> dict[str, Tensor]:
        side, name = int(int(self.vision.num_position_embeddings) ** 0.5), "interp"
        if hasattr(vision_utils, "get_vision_interpolation_indices_and_weights"):
            taps = vision_utils.get_vision_interpolation_indices_and_weights(
                frames, side, align_corners=True, spatial_merge_size=self.merge
            )
        else:  # transformers 5.10
            taps, name = vision_utils.get_vision_bilinear_indices_and_weights(frames, side, self.merge), "bilinear"
        indices, weights = (tensor.to(device, non_blocking=True) for tensor in taps)
        return {**super().read_off(frames, device), f"{name}_indices": indices, f"{name}_weights": weights}

    def language_model(self, model: PreTrainedModel) -> nn.Module:
        language = super().language_model(model)
        if "_deepstack_process" not in vars(language):
            language._deepstack_process = functools.partial(_add_level, language)  # type: ignore[assignment]
        return language

    def deepstack(self, picture_slot: Tensor, deeper: Tensor) -> dict[str, Any]:
        """A level of `deeper` for each of the first decoder layers, at the places of the picture tokens."""
        if not deeper.shape[0]:
            return {}
        in_picture = (picture_slot >= 0).unsqueeze(-1)
        levels = deeper[picture_slot.clamp(min=0)].split(self.state_width, dim=-1)
        return {"deepstack_visual_embeds": [torch.where(in_picture, level, 0) for level in levels]}


def _add_level(language: nn.Module, hidden: Tensor, mask: Tensor | None, level: Tensor) -> Tensor:
    """In place of the decoder's own, which counts the pictures' tokens and waits for a GPU to know how many there are:
    without a `mask`, `level` has all tokens (B, T, W), zero outside of pictures."""
    if mask is None:
        return hidden + level.to(hidden.dtype)
    return type(language)._deepstack_process(language, hidden, mask, level)  # type: ignore[attr-defined]
