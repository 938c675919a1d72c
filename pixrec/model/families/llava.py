"""LLaVA-OneVision: a SigLIP encoder, two linear layers, a Qwen 2.

A picture that is alone is cut into tiles by the library. Of several each is one view, closed by a learned token that
ends the line; a history has several, so that is the form used here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixrec.model.families.base import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LlavaOnevision(Family):
    vision_parts = ("vision_tower", "multi_modal_projector", "image_newline")

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        layers = self.config.vision_feature_layer
        self.feature_layers = [layers] if isinstance(layers, int) else list(layers)
        self.skips_first = self.config.vision_feature_select_strategy == "default"

    @property
    def tokens_per_picture(self) -> int:
        patches = (self.image_size_px // int(self.config.vision_config.patch_size)) ** 2
        return patches - int(self.skips_first) + 1

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
        tokens = model.model.multi_modal_projector(features)
        newline = model.model.image_newline.to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat([tokens, newline], dim=1)
