"""What PixRec must know of a family of vision-language models: one short adapter each.

An adapter says how a picture is written in the token sequence, how pixels become picture tokens, and which module
maps embeddings to hidden states. Everything else is common. To add a family, subclass `Family` and list it in
FAMILIES under its `model_type`.

Shapes: P pictures · K tokens a picture · W width of the language model · S side of a picture in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pixrec.errors import ConfigError


class Family(ABC):
    """Base adapter; `model` is what AutoModelForImageTextToText returned."""

    picture_prefix: tuple[str, ...] = ()
    """Tokens before the picture tokens."""
    picture_suffix: tuple[str, ...] = ()
    """Tokens after them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config: Any = model.config

    @property
    def image_token_id(self) -> int:
        return int(self.config.image_token_id)

    @property
    def image_size_px(self) -> int:
        size = self.config.vision_config.image_size
        return int(size if isinstance(size, int) else size[0])

    @property
    @abstractmethod
    def tokens_per_picture(self) -> int:
        """K: how many tokens a picture becomes."""

    @abstractmethod
    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor) -> Tensor:
        """Normalised pixels (P, 3, S, S) to picture tokens (P, K, W)."""

    @abstractmethod
    def language_model(self, model: PreTrainedModel) -> nn.Module:
        """The module that takes `inputs_embeds` and returns `last_hidden_state`."""

    @abstractmethod
    def vision_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """All parameters that only pictures use."""


class SmolVLM(Family):
    """SmolVLM and Idefics3: a SigLIP encoder, pixel shuffle, a Llama. One picture is written as its global view."""

    picture_prefix = ("<fake_token_around_image>", "<global-img>")
    picture_suffix = ("<fake_token_around_image>",)

    @property
    def tokens_per_picture(self) -> int:
        patches_per_side = self.image_size_px // int(self.config.vision_config.patch_size)
        return (patches_per_side // int(self.config.scale_factor)) ** 2

    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor) -> Tensor:
        features = model.model.get_image_features(pixels.unsqueeze(1)).pooler_output
        if isinstance(features, (list, tuple)):
            features = torch.stack(list(features))
        return features.view(pixels.shape[0], self.tokens_per_picture, -1)

    def language_model(self, model: PreTrainedModel) -> nn.Module:
        return model.model.text_model

    def vision_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        return [*model.model.vision_model.parameters(), *model.model.connector.parameters()]


FAMILIES: dict[str, Callable[[PreTrainedModel], Family]] = {"smolvlm": SmolVLM, "idefics3": SmolVLM}


def family_of(model: PreTrainedModel) -> Family:
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model.backbone is of the family {model_type!r}; known: {', '.join(sorted(FAMILIES))}. "
            "A further one is an adapter in pixrec/model/families.py"
        )
    return FAMILIES[model_type](model)
