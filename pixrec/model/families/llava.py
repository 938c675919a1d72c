"""LLaVA and LLaVA-OneVision: an image encoder, two linear layers, a language model.

LLaVA (Liu et al., NeurIPS 2023) takes the features of a layer of CLIP, or of SigLIP, and puts no tokens around a
picture. Its encoder may also be an EfficientNet-Lite (`pixrec.model.vision_tower`).

LLaVA-OneVision cuts a picture that is alone into tiles. Of several each is one view, closed by a learned token that
ends the line; a history has several, so that is the form used here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixrec.errors import ConfigError
from pixrec.model.families.base import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASS_TOKEN = {"clip_vision_model": 1, "siglip_vision_model": 0, "efficientnet_lite": 0}
"""Encoders of one size of picture, and how many states they have before those of the patches."""


class Llava(Family):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        layers = self.config.vision_feature_layer
        self.feature_layers = [layers] if isinstance(layers, int) else list(layers)
        self.skips_first = self.config.vision_feature_select_strategy == "default"
        kind = self.config.vision_config.model_type
        if kind not in CLASS_TOKEN:
            raise ConfigError(f"model.backbone is a LLaVA that sees by {kind!r}; known: {', '.join(CLASS_TOKEN)}")

    @property
    def tokens_per_picture(self) -> int:
        vision = self.config.vision_config
        side = getattr(vision, "tokens_per_side", None) or self.image_size_px // int(vision.patch_size)
        return int(side**2) + CLASS_TOKEN[vision.model_type] - int(self.skips_first)

    @property
    def unread_parts(self) -> tuple[str, ...]:
        """Layers behind the last one that is read, and the norm behind all of them."""
        count = int(self.config.vision_config.num_hidden_layers)  # states: of the embedding, then of each layer
        last = max(layer if layer >= 0 else count + 1 + layer for layer in self.feature_layers)
        return ("head", "post_layernorm", *(f"encoder.layers.{layer}" for layer in range(last, count)))

    @property
    def vision_settings(self) -> tuple[Any, ...]:
        return (*self.feature_layers, self.skips_first)

    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor, grid: Tensor) -> Tensor:
        layers = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = torch.cat([layers[i] for i in self.feature_layers], dim=-1)[:, int(self.skips_first) :]
        return model.model.multi_modal_projector(features)


class LlavaOnevision(Llava):
    vision_parts = ("vision_tower", "multi_modal_projector", "image_newline")

    @property
    def tokens_per_picture(self) -> int:
        return super().tokens_per_picture + 1

    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor, grid: Tensor) -> Tensor:
        tokens = super().encode_pictures(model, pixels, grid)
        newline = model.model.image_newline.to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat([tokens, newline], dim=1)
