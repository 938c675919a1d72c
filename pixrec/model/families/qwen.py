"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an encoder, a patch merger, a Qwen with multimodal rotary positions.

The family takes pictures of any shape; here all are squares of 16 × 16 patches, which become 64 tokens.

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

from pixrec.model.families.base import Family

PATCHES_PER_SIDE = 16


class QwenVL(Family):
    picture_prefix = ("<|vision_start|>",)
    picture_suffix = ("<|vision_end|>",)
    vision_parts = ("visual",)
    vision_attention = (r"attn\.qkv", r"attn\.proj")  # another `proj` embeds the patches

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.vision = self.config.vision_config
        self.tokens_per_side = PATCHES_PER_SIDE // int(self.vision.spatial_merge_size)

    @property
    def image_size_px(self) -> int:
        return PATCHES_PER_SIDE * int(self.vision.patch_size)

    @property
    def tokens_per_picture(self) -> int:
        return self.tokens_per_side**2

    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor) -> Tensor:
        return self.by_picture(self.features(model, pixels).pooler_output)

    def by_picture(self, tokens: Tensor | Sequence[Tensor]) -> Tensor:
        """The library's tokens, of all pictures joined (P·K, W) or a list of P (K, W) by its release, as (P, K, W)."""
        joined = tokens if isinstance(tokens, Tensor) else torch.cat(list(tokens))
        return joined.view(-1, self.tokens_per_picture, joined.shape[-1])

    def features(self, model: PreTrainedModel, pixels: Tensor) -> Any:
        """What the library's encoder returns for P squares, for `by_picture` to read."""
        grid = torch.tensor([[1, PATCHES_PER_SIDE, PATCHES_PER_SIDE]] * len(pixels), device=pixels.device)
        return model.model.get_image_features(self.patches(pixels), grid)

    def patches(self, pixels: Tensor) -> Tensor:
        """Pixels (P, 3, S, S) to flat patches (P·16·16, 3·frames·patch²), the patches of a merged token together.

        A picture stands for all frames of the encoder's temporal patch.
        """
        side, merge, patch = self.tokens_per_side, int(self.vision.spatial_merge_size), int(self.vision.patch_size)
        tiles = pixels.view(-1, 3, side, merge, patch, side, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
        frames = tiles.unsqueeze(6).expand(*tiles.shape[:6], int(self.vision.temporal_patch_size), patch, patch)
        return frames.reshape(len(pixels) * PATCHES_PER_SIDE**2, -1)

    def hidden_states(
        self, model: PreTrainedModel, embeddings: Tensor, is_token: Tensor, picture_slot: Tensor, deeper: Tensor
    ) -> Tensor:
        output = self.language_model(model)(
            inputs_embeds=embeddings,
            position_ids=self.positions(is_token, picture_slot),
            use_cache=False,
            **self.deepstack(picture_slot, deeper),
        )
        return output.last_hidden_state

    def deepstack(self, picture_slot: Tensor, deeper: Tensor) -> dict[str, Any]:
        """What the decoder is given besides the embeddings; nothing before Qwen3-VL."""
        return {}

    def positions(self, is_token: Tensor, picture_slot: Tensor) -> Tensor:
        """Positions in time, height and width (3, B, T) (M-RoPE, Wang et al. 2024, arXiv 2409.12191, §2.1).

        A text token moves all three on by one. The tokens of a picture share the time and take height and width from
        their place in it; the next token goes on after the picture's side.
        """
        side = self.tokens_per_side
        in_picture = picture_slot >= 0
        place = torch.where(in_picture, picture_slot % self.tokens_per_picture, 0)
        closes = in_picture & (place == self.tokens_per_picture - 1)
        advance = torch.where(in_picture, closes * side, is_token.long())
        start = advance.cumsum(1) - advance
        return torch.stack([start, start + place // side, start + place % side])


class Qwen3VL(QwenVL):
    @property
    def picture_width(self) -> int:
        return super().picture_width * (1 + len(self.vision.deepstack_visual_indexes))

    @property
    def vision_settings(self) -> tuple[Any, ...]:
        return tuple(self.vision.deepstack_visual_indexes)

    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor) -> Tensor:
        features = self.features(model, pixels)
        levels = [features.pooler_output, *features.deepstack_features]
        return torch.cat([self.by_picture(level) for level in levels], dim=-1)

    def deepstack(self, picture_slot: Tensor, deeper: Tensor) -> dict[str, Any]:
        """A level of `deeper` for each of the first decoder layers, at the places of the picture tokens."""
        if not deeper.shape[0]:
            return {}
        in_picture = picture_slot >= 0
        levels = deeper[picture_slot[in_picture]].split(super().picture_width, dim=-1)
        return {"visual_pos_masks": in_picture, "deepstack_visual_embeds": list(levels)}
