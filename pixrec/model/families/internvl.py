"""InternVL 3: an InternViT encoder, pixel shuffle, a Qwen 2. A picture is one tile, not cut into several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pixrec.model.families.base import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class InternVL(Family):
    picture_prefix = ("<img>",)
    picture_suffix = ("</img>",)
    vision_attention = ("q_proj", "k_proj", "v_proj", "projection_layer")

    @property
    def tokens_per_picture(self) -> int:
        patches_per_side = self.image_size_px // int(self.config.vision_config.patch_size[0])
        return int(patches_per_side * self.config.downsample_ratio) ** 2

    @property
    def vision_settings(self) -> tuple[Any, ...]:
        return (self.config.vision_feature_layer, self.config.vision_feature_select_strategy)

    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor, grid: Tensor) -> Tensor:
        return model.model.get_image_features(pixels).pooler_output
