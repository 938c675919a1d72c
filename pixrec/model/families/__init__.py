"""What PixRec must know of a family of vision-language models: one short adapter file each.

To add a family, subclass `Family` in a file of its own and list it in FAMILIES under its `model_type`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pixrec.errors import ConfigError
from pixrec.model.families.base import Family
from pixrec.model.families.gemma3 import Gemma3
from pixrec.model.families.internvl import InternVL
from pixrec.model.families.llava import Llava, LlavaOnevision
from pixrec.model.families.paligemma import PaliGemma
from pixrec.model.families.qwen import Qwen3VL, QwenVL
from pixrec.model.families.smolvlm import SmolVLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    "smolvlm": SmolVLM,
    "idefics3": SmolVLM,
    "paligemma": PaliGemma,
    "gemma3": Gemma3,
    "internvl": InternVL,
    "llava": Llava,
    "llava_onevision": LlavaOnevision,
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": Qwen3VL,
}


def family_of(model: PreTrainedModel | Any) -> Family:
    """The adapter of a loaded model, or of whatever has the `config` of one. Raises ConfigError where its family has
    none."""
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model.backbone is of the family {model_type!r}; known: {', '.join(sorted(FAMILIES))}. "
            "A further one is an adapter in pixrec/model/families"
        )
    return FAMILIES[model_type](model)
