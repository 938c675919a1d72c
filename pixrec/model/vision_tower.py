"""An EfficientNet-Lite where transformers wants a vision encoder, for its LLaVA classes (`families.llava`).

Loads the model code of transformers, so it is imported where a backbone is read and not before.

Shapes: P pictures · S side in pixels · R rows and columns of picture tokens · C channels.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from pixrec.model.efficientnet import FeatureMap, network


class EfficientNetLiteConfig(PreTrainedConfig):
    model_type = "efficientnet_lite"

    name: str = "efficientnet-lite2"
    """as the package efficientnet-lite-pytorch names it"""
    image_size: int = 260
    hidden_size: int = 352
    """C, channels of the last block"""
    tokens_per_side: int = 3
    """R; the map of the last block is averaged to as many rows and columns"""
    num_hidden_layers: int = 0
    """of a transformer: the features are the only states there are"""


class EfficientNetLiteTower(PreTrainedModel):
    """Pixels (P, 3, S, S) to features (P, R·R, C), row by row."""

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    # It has no attention, so any way to compute that will do.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.map = FeatureMap(network(config.name))
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        features = F.adaptive_avg_pool2d(self.map(pixel_values), self.config.tokens_per_side)
        tokens = features.flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


def register() -> None:
    """Have the Auto classes of transformers know the encoder. More than once is once."""
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteTower, exist_ok=True)
