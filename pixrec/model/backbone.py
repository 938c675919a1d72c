"""The vision-language model as the towers see it: token ids and picture tokens in, last hidden states out.

Builds `pixrec-tiny` from config and loads any other by `from_pretrained`. Knows nothing of items or users.

Shapes: B rows · T tokens · P pictures · K tokens a picture · W width of the language model · X numbers of a picture
token, W or more · S side in pixels.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlamaConfig, PreTrainedModel, SmolVLMConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from pixrec.config import LoraConfig, TinyConfig
from pixrec.errors import ConfigError
from pixrec.model.families import family_of
from pixrec.model.seeding import seeded

TINY = "pixrec-tiny"
VISION_MODULES = ("vision_model", "vision_tower", "visual", "connector", "multi_modal_projector")


class Backbone(nn.Module):
    """Wraps an AutoModelForImageTextToText and its family adapter."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: PreTrainedModel, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(model)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        return int(self.model.config.text_config.hidden_size)

    def picture_tokens(self, pixels: Tensor) -> Tensor:
        """Raw pictures (P, S, S, 3) uint8 to picture tokens (P, K, X)."""
        scaled = pixels.permute(0, 3, 1, 2).float() / 255
        normalised = (scaled - self.pixel_mean) / self.pixel_std
        return self.family.encode_pictures(self.model, normalised)

    def hidden_states(self, token_ids: Tensor, is_token: Tensor, picture_slot: Tensor, pictures: Tensor) -> Tensor:
        """Last hidden states (B, T, W).

        `token_ids` and `is_token` (B, T): the tokens and which of them are real. `picture_slot` (B, T): for a
        picture token its row in `pictures` (P·K, X), -1 elsewhere.
        """
        # A picture token's id may lie outside the vocabulary (PaliGemma); its embedding is not looked at.
        embeddings = self.model.get_input_embeddings()(token_ids.masked_fill(picture_slot >= 0, 0))
        if pictures.shape[0]:
            looked_up = pictures[:, : self.width].to(embeddings.dtype)[picture_slot.clamp(min=0)]
            embeddings = torch.where((picture_slot >= 0).unsqueeze(-1), looked_up, embeddings)
        deeper = pictures[:, self.width :]
        return self.family.hidden_states(self.model, embeddings, is_token, picture_slot, deeper)

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Scores (…, vocabulary) of the next token from hidden states (…, W)."""
        return self.family.token_logits(self.model, hidden)


def build_tiny(config: TinyConfig, tokenizer_size: int, ids: dict[str, int], seed: int) -> PreTrainedModel:
    """`pixrec-tiny`: the SmolVLM class with random weights; the same seed gives the same weights.

    `ids` holds the token ids of `image`, `pad`, `bos` and `eos`.
    """
    text = LlamaConfig(
        vocab_size=tokenizer_size,
        hidden_size=config.hidden_width,
        intermediate_size=config.hidden_width * 3,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        tie_word_embeddings=True,
    )
    vision = SmolVLMVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=config.vision_width * 3,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=4,
        image_size=config.image_size_px,
        patch_size=config.patch_size_px,
    )
    whole = SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image"], scale_factor=2, tie_word_embeddings=True
    )
    with seeded(seed):
        return AutoModelForImageTextToText.from_config(whole)


def load_pretrained(name_or_folder: str, nf4: bool = False) -> PreTrainedModel:
    """`from_pretrained` on a name or a local folder, safetensors only, weights in float32.

    `nf4` holds the matrices of the language model in 4 bits, for adapters to be trained on (QLoRA, Dettmers et al.
    2023); the vision part stays whole. Raises ConfigError where bitsandbytes is not installed.
    """
    options = {"quantization_config": _nf4()} if nf4 else {}
    try:
        return AutoModelForImageTextToText.from_pretrained(
            name_or_folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, **options
        )
    except (OSError, ValueError) as error:
        local = " (no such folder)" if not Path(name_or_folder).exists() else ""
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.backbone {name_or_folder!r} cannot be loaded{local}: {reason}") from None


def _nf4() -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.lora.base nf4 needs bitsandbytes, which is not installed; pip install 'pixrec[nf4]', or set it to "
            "as_is"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *(f".*{name}" for name in VISION_MODULES)],  # matched from the start
    )


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Insert low-rank adapters into `model` in place; everything else in it is frozen."""
    from peft import LoraConfig as PeftLoraConfig

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for target in config.targets:
        if target not in names:
            raise ConfigError(f"model.lora.targets names {target!r}, which matches no module of the backbone")
    model.add_adapter(
        PeftLoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), lora_dropout=0.0)
    )
