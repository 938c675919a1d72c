"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an encoder, a patch merger, a Qwen with multimodal rotary positions.

The family takes pictures of any shape: sides are multiples of a merged patch, which becomes one token, and the number
of pixels is bounded. A picture token holds its row and column in the picture besides its state, as its position
follows from them.

Qwen3-VL also adds what its encoder held in earlier layers to the states of the picture tokens after its first decoder
layers (DeepStack, Meng et al. 2024, arXiv 2406.04334). These features are part of a picture token here, so a stored
token has them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pixrec.data.images import PixelBudget, largest_side
from pixrec.model.families.base import Family

PROCESSOR_LIMITS = 56 * 56, 28 * 28 * 1280
"""What Qwen2-VL's processor takes where its file says nothing."""
PATCHES_PER_SIDE = 16
"""Of the largest square, until `limit_pixels` says otherwise."""


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
        frames = torch.nn.functional.pad(self.merge * grid, (1, 0), value=1)
        return model.model.get_image_features(self.patches(pixels), frames)

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
        at = torch.arange(len(like), device=grid.device)
        first = (count.cumsum(0) - count).repeat_interleave(count, output_size=len(like))
        columns = grid[:, 1].repeat_interleave(count, output_size=len(like))
        return torch.stack([(at - first) // columns, (at - first) % columns], dim=1).to(like.dtype)

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

    def deepstack(self, picture_slot: Tensor, deeper: Tensor) -> dict[str, Any]:
        """A level of `deeper` for each of the first decoder layers, at the places of the picture tokens."""
        if not deeper.shape[0]:
            return {}
        in_picture = picture_slot >= 0
        levels = deeper[picture_slot[in_picture]].split(self.state_width, dim=-1)
        return {"visual_pos_masks": in_picture, "deepstack_visual_embeds": list(levels)}
