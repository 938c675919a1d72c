"""The vision-language model as the towers see it: token ids and picture tokens in, last hidden states out.

Builds `pixrec-tiny` from config and loads any other by `from_pretrained`. Knows nothing of items or users.

Shapes: B rows · T tokens · P pictures · N tiles of pictures · K tokens a tile · W width of the language model
· X numbers of a picture token, W or more · S side of a tile in pixels.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from pixrec.config import LoraConfig, ModelConfig, TinyConfig
from pixrec.data.images import PictureSize
from pixrec.errors import ConfigError
from pixrec.model.encoding import picture_facts
from pixrec.model.families import FAMILIES, family_of
from pixrec.model.packages import model_place
from pixrec.model.seeding import seeded

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig
    from transformers import PreTrainedConfig, PreTrainedModel

TINY = "pixrec-tiny"
ADAPTER = "lora_"
"""In the name of every weight of an adapter."""
_CONNECTORS = ("connector", "multi_modal_projector", "merger", "image_newline")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_NO_MASK = "pixrec_no_mask"
_FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


class Backbone(nn.Module):
    """Wraps an AutoModelForImageTextToText and its family adapter."""

    pixel_mean: Tensor
    pixel_std: Tensor
    instruction: Tensor

    def __init__(
        self, model: PreTrainedModel, mean: list[float], std: list[float], instruction: Sequence[int] = ()
    ) -> None:
        """instruction: ids of tokens that every sequence begins with; their states are dropped again."""
        super().__init__()
        self.model = model
        self.family = family_of(model)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("instruction", torch.tensor(list(instruction), dtype=torch.long), persistent=False)

    @property
    def width(self) -> int:
        return int(self.model.config.text_config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; those in 4 bits aside."""
        return self.model.get_input_embeddings().weight.dtype

    def picture_tokens(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """Tiles (N, S, S, 3) uint8 of pictures that have `grid` (P, 2, on the CPU) rows and columns of them to picture
        tokens (N, K, X)."""
        scaled = pixels.permute(0, 3, 1, 2).float() / 255
        normalised = (scaled - self.pixel_mean) / self.pixel_std
        return self.family.encode_pictures(self.model, normalised.to(self.dtype), grid)

    def hidden_states(self, token_ids: Tensor, is_token: Tensor, picture_slot: Tensor, pictures: Tensor) -> Tensor:
        """Last hidden states (B, T, W), float32 whatever the weights are.

        `token_ids` and `is_token` (B, T): the tokens and which of them are real. `picture_slot` (B, T): for a
        picture token its row in `pictures` (N·K, X), -1 elsewhere.
        """
        start = len(self.instruction)
        if start:
            token_ids = torch.cat([self.instruction.expand(len(token_ids), -1), token_ids], dim=1)
            is_token = F.pad(is_token, (start, 0), value=True)
            picture_slot = F.pad(picture_slot, (start, 0), value=-1)
        # A picture token's id may lie outside the vocabulary (PaliGemma); its embedding is not looked at.
        embeddings = self.model.get_input_embeddings()(token_ids.masked_fill(picture_slot >= 0, 0))
        if pictures.shape[0]:
            looked_up = pictures[:, : self.width].to(embeddings.dtype)[picture_slot.clamp(min=0)]
            embeddings = torch.where((picture_slot >= 0).unsqueeze(-1), looked_up, embeddings)
        deeper = pictures[:, self.width :].to(embeddings.dtype)
        states = self.family.hidden_states(self.model, embeddings, is_token, picture_slot, deeper)
        return states[:, start:].float()

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Scores (…, vocabulary) of the next token from hidden states (…, W)."""
        return self.family.token_logits(self.model, hidden.to(self.dtype))


def build_tiny(
    config: TinyConfig, tokenizer_size: int, ids: dict[str, int], seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """`pixrec-tiny`: the SmolVLM class with random weights; the same seed gives the same weights, rounded to `dtype`.

    `ids` holds the token ids of `image`, `pad`, `bos` and `eos`.
    """
    text = transformers.LlamaConfig(
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
    vision = transformers.SmolVLMVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=config.vision_width * 3,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=4,
        image_size=config.image_size_px,
        patch_size=config.patch_size_px,
    )
    whole = transformers.SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image"], scale_factor=2, tie_word_embeddings=True
    )
    with seeded(seed):
        model = transformers.AutoModelForImageTextToText.from_config(whole)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay whole
        parameter.data = parameter.data.to(dtype)
    return model


def load_pretrained(
    name_or_folder: str, nf4: bool = False, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """`from_pretrained` on a name or a local folder, safetensors only, weights in `dtype`.

    `revision` pins a name on the hub to a branch, tag or commit. `nf4` holds the matrices of the language model in 4
    bits, for adapters to be trained on (QLoRA, Dettmers et al. 2023); the vision part stays whole. Raises ConfigError
    where bitsandbytes is not installed.
    """
    options = {"quantization_config": _nf4()} if nf4 else {}
    know_own_encoders()
    try:
        return transformers.AutoModelForImageTextToText.from_pretrained(
            name_or_folder, use_safetensors=True, trust_remote_code=False, revision=revision, dtype=dtype, **options
        )
    except (OSError, ValueError) as error:
        raise cannot_load(name_or_folder, revision, error) from None


def pretrained_shape(name_or_folder: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `load_pretrained` would read, from its config alone, on whatever device is the default."""
    loaded = _read_config(name_or_folder, revision)
    return transformers.AutoModelForImageTextToText.from_config(loaded, trust_remote_code=False, dtype=dtype)


def know_own_encoders() -> None:
    """Have transformers know the image encoders that are ours, before it reads a backbone's config."""
    from pixrec.model.vision_tower import register  # loads the model code, which whoever reads a backbone needs

    register()


def _read_config(name_or_folder: str, revision: str | None) -> PreTrainedConfig:
    know_own_encoders()
    try:
        return transformers.AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False, revision=revision)
    except (OSError, ValueError) as error:
        raise cannot_load(name_or_folder, revision, error) from None


def picture_size_of(config: ModelConfig) -> PictureSize:
    """What pictures are decoded to for a backbone, of which no weight is read. Raises ConfigError, ArtifactError."""
    if config.backbone in (TINY, "none"):  # the latter looks at none
        return config.tiny.image_size_px
    place = model_place(config.backbone)
    family = family_of(SimpleNamespace(config=_read_config(place, config.revision)))
    family.limit_pixels(picture_facts(place, config.revision).limits, config.min_pixels, config.max_pixels)
    return family.picture_size


def cannot_load(name_or_folder: str, revision: str | None, error: Exception) -> ConfigError:
    """What is said of a backbone that `from_pretrained` refuses."""
    local = " (no such folder)" if not Path(name_or_folder).exists() else ""
    pinned = f" at revision {revision!r}" if revision else ""
    return ConfigError(f"model.backbone {name_or_folder!r} cannot be loaded{pinned}{local}: {_one_line(error)}")


def pretrained_facts(name_or_folder: str, revision: str | None) -> dict[str, str | None]:
    """What tells the weights that `load_pretrained` read from all others: `revision`, which is the commit where they
    came from the hub, and `weights`, a hash of their files."""
    revision = extract_commit_hash(cached_file(name_or_folder, "config.json", revision=revision), None) or revision
    find = functools.partial(cached_file, revision=revision, _raise_exceptions_for_missing_entries=False)
    names = ["model.safetensors"]
    if find(name_or_folder, names[0]) is None and (index := find(name_or_folder, f"{names[0]}.index.json")):
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    hashes = [_file_hash(cached_file(name_or_folder, name, revision=revision)) for name in names]
    return {"revision": revision, "weights": hashlib.sha256("".join(hashes).encode()).hexdigest()}


def _file_hash(file: str) -> str:
    """sha256 of a file, which in the hub's cache is the name of what a link points to."""
    real = Path(file).resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    return _sha256(str(real), os.stat(real).st_size, os.stat(real).st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256(file: str, size: int, changed: int) -> str:
    """Once for each state of a file, which its size and time of change tell apart."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def use_attention(model: PreTrainedModel, wanted: str) -> None:
    """Compute attention the way `wanted` says, in every part of `model`; `auto` leaves what transformers chose: sdpa
    where a part has it, eager where it has not (Gemma 2, whose scores are capped).

    Raises ConfigError where the model has no such way, or its package is not installed.
    """
    family, text = family_of(model), model.config.text_config
    with_masks(model)
    _set_attention(model, wanted)
    family.tune(model)
    full = set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if family.causal and full and text._attn_implementation not in ("eager", "flex_attention"):
        # Only what makes masks looks at this config, not the layers: transformers makes none for a way it has no mask
        # of. Otherwise it searches the positions for packed sequences, for which a GPU is waited, to make none either.
        family.language_model(model).config = own = copy.copy(text)
        own._attn_implementation_internal = _NO_MASK


def with_masks(model: PreTrainedModel) -> None:
    """Have the language model heed the masks it is given, as the library does."""
    family_of(model).language_model(model).config = model.config.text_config


def _set_attention(model: PreTrainedModel, wanted: str) -> None:
    text = model.config.text_config
    capped = getattr(text, "attn_logit_softcapping", None) is not None  # which sdpa would leave out without a word
    if wanted == "auto":
        if capped and text._attn_implementation == "sdpa":
            model.set_attn_implementation({"text_config": "eager"})
        return
    package = _FLASH.get(wanted)
    setting = f"model.attn_implementation {wanted}"
    if package and not any(importlib.util.find_spec(name) for name in (package, "kernels")):
        raise ConfigError(f"{setting} needs the package {package} or kernels; install one of them, or set it to auto")
    if package and not family_of(model).causal:
        kind = model.config.model_type
        raise ConfigError(f"{setting} knows no mask as a {kind} needs one; set it to auto or flex_attention")
    if capped and wanted == "sdpa":
        raise ConfigError(f"{setting} does not suit a {text.model_type}, whose scores are capped; set it to auto")
    try:
        model.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{setting} does not suit model.backbone: {_one_line(error)}; set it to auto") from None


def compile_layers(model: nn.Module) -> None:
    """torch.compile on each layer of the vision and of the language model, in place, for any number of tokens. Layers
    of a kind share what was compiled, so a deep model is compiled in the time of a shallow one."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes seconds

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _nf4() -> transformers.BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.lora.base nf4 needs bitsandbytes, which is not installed; pip install 'pixrec[nf4]', or set it to "
            "as_is"
        )
    vision = sorted({name for family in FAMILIES.values() for name in family.vision_parts})
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *(f".*{name}" for name in vision)],  # matched from the start
    )


def of_connector(name: str, vision_parts: Sequence[str]) -> bool:
    """Whether a weight is the connector's: of what only pictures use, behind the image encoder."""
    parts = name.split(".")
    return bool(set(parts) & set(vision_parts)) and any(c in part for part in parts for c in _CONNECTORS)


def learns_with_adapters(name: str, lora: LoraConfig, vision_parts: Sequence[str]) -> bool:
    """Whether a weight of a backbone with adapters is trained, and saved with them."""
    return ADAPTER in name or (lora.connector and of_connector(name, vision_parts))


def add_lora(model: PreTrainedModel, config: LoraConfig, vision: bool = True) -> None:
    """Insert low-rank adapters into `model` in place; everything else in it is frozen.

    `vision`: whether the vision part may have any. Raises ConfigError where a target matches nothing.
    """
    family, wanted = family_of(model), config.targets
    if not isinstance(wanted, str):
        names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        for target in wanted:
            if target not in names:
                raise ConfigError(f"model.lora.targets names {target!r}, which matches no module of the backbone")
        targets: str | list[str] = list(wanted)
    else:
        targets = family.attention_layers(wanted if vision else "language")
    try:
        model.add_adapter(lora_settings(config, targets, None if vision else family.vision_layers))
    except ValueError as error:
        raise ConfigError(f"model.lora.targets: {_one_line(error)}") from None
    keep_adapters_whole(model)


def lora_settings(config: LoraConfig, targets: str | list[str], excluded: str | None = None) -> PeftLoraConfig:
    """What peft is told: `targets` and `excluded` as it reads them, a pattern or names of modules."""
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        exclude_modules=excluded,
        lora_dropout=0.0,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def keep_adapters_whole(model: PreTrainedModel) -> None:
    """Hold the adapters in float32, whatever the type of the weights below them."""
    for name, parameter in model.named_parameters():
        if ADAPTER in name:
            parameter.data = parameter.data.float()


def fill_adapters(model: PreTrainedModel, stored: dict[str, Tensor]) -> None:
    """Give adapters that are held whole their stored values: `load_adapter` rounds them to the type of the weights
    below them."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, {name.removeprefix("base_model.model."): t for name, t in stored.items()})
