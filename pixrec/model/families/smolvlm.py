"""SmolVLM and Idefics3: a SigLIP encoder, pixel shuffle, a Llama. One picture is written as its global view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pixrec.model.families.base import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SmolVLM(Family):
    picture_prefix = ("<fake_token_around_image>", "<global-img>")
    picture_suffix = ("<fake_token_around_image>",)
    language_part = "text_model"
    vision_parts = ("vision_model", "connector")

    @property
    def tokens_per_picture(self) -> int:
        patches_per_side = self.image_size_px // int(self.config.vision_config.patch_size)
        return (patches_per_side // int(self.config.scale_factor)) ** 2

    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor, grid: Tensor) -> Tensor:
        # As `get_image_features`, but for its search for pictures that are padding, for which a GPU is waited.
        vision, side = model.model.vision_model, self.image_size_px // int(self.config.vision_config.patch_size)
        whole = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
        patches = vision.embeddings(pixel_values=pixels, patch_attention_mask=whole)
        states = vision.encoder(inputs_embeds=patches, attention_mask=None).last_hidden_state
        return model.model.connector(vision.post_layernorm(states))
