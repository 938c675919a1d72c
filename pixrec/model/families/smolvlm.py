"""SmolVLM and Idefics3: a SigLIP encoder, pixel shuffle, a Llama. One picture is written as its global view."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pixrec.model.families.base import Family


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
        features = model.model.get_image_features(pixels.unsqueeze(1)).pooler_output
        if isinstance(features, (list, tuple)):
            features = torch.stack(list(features))
        return features.view(pixels.shape[0], self.tokens_per_picture, -1)
