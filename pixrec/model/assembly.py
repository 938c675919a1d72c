"""A vision-language model of parts that were trained apart: a language model from a GGUF file, an image encoder, and a
connector between them that is still to be trained, as LLaVA begins (Liu et al., NeurIPS 2023, arXiv 2304.08485).

Writes the folder that `from_pretrained` reads. Knows files and models, not packages.

Shapes: V tokens of the vocabulary · W width of the language model · C channels of the image encoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from pixrec.model.efficientnet import FeatureMap, network

IMAGE_TOKEN = "<image>"
DTYPE = torch.float16
"""What weights are kept in: of 4 bits it keeps all that matters (a relative error of 1/2048)."""
VOCABULARY_MULTIPLE = 64
GELU_POWER = 0.4252
"""Mean square of GELU of a standard normal number."""
_OF_ITS_FILE = ("quantization_config", "dtype", "_name_or_path", "_model_name_or_path")


def assemble(language: Path, encoder: Path, folder: Path, tokens_per_side: int = 3) -> None:
    """Write a LLaVA into `folder`: the language model of the file `language`, the EfficientNet-Lite of the folder
    `encoder`, and a connector drawn from a fixed seed."""
    from pixrec.model.vision_tower import EfficientNetLiteConfig, register

    register()
    facts = json.loads((encoder / "config.json").read_text())
    seen = network(facts["name"])
    seen.load_state_dict(safetensors.torch.load_file(encoder / "model.safetensors"))
    tower = FeatureMap(seen)
    vision = EfficientNetLiteConfig(
        name=facts["name"],
        image_size=facts["image_size"],
        hidden_size=int(tower.blocks[-1]._project_conv.out_channels),
        tokens_per_side=tokens_per_side,
    )
    source = {"pretrained_model_name_or_path": str(language.parent), "gguf_file": language.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    model = llava(read, tower, vision, size, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model.to(DTYPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((encoder / "preprocessor_config.json").read_bytes())


def llava(language: Any, tower: nn.Module, vision: Any, vocabulary: int, image_token: int) -> Any:
    """A LlavaForConditionalGeneration of a causal language model, whose embedding is made `vocabulary` rows long, and
    of an image encoder."""
    settings = {k: v for k, v in language.config.to_dict().items() if k not in _OF_ITS_FILE}
    text = type(language.config)(**{**settings, "vocab_size": vocabulary})
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=vision.tokens_per_side**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    words = language.get_input_embeddings().weight.detach()
    weights = {f"model.language_model.{name}": tensor for name, tensor in language.model.state_dict().items()}
    weights["model.language_model.embed_tokens.weight"] = longer(words, vocabulary)
    weights["lm_head.weight"] = longer(language.get_output_embeddings().weight.detach(), vocabulary)
    weights |= {f"model.vision_tower.map.{name}": tensor for name, tensor in tower.state_dict().items()}
    drawn = connector(vision.hidden_size, text.hidden_size, float(words.square().mean().sqrt()))
    weights |= {f"model.multi_modal_projector.{name}": tensor for name, tensor in drawn.items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def longer(embedding: Tensor, rows: int) -> Tensor:
    """(V, W) with more rows, each the mean of those there are (Hewitt 2021, "Initializing new word embeddings")."""
    return torch.cat([embedding, embedding.mean(0).expand(rows - len(embedding), -1)])


def connector(channels: int, width: int, scale: float) -> dict[str, Tensor]:
    """Weights of LLaVA's two layers, C to W to W, for which standardised features become tokens as long as words are:
    of root mean square `scale`. Drawn by numpy, which gives the same numbers on every machine."""
    rng = np.random.default_rng(0)

    def layer(rows: int, columns: int, deviation: float) -> Tensor:
        uniform = rng.random((rows, columns)) - 0.5  # of variance 1/12
        return torch.from_numpy((uniform * (deviation * 12**0.5)).astype(np.float32))

    return {
        "linear_1.weight": layer(width, channels, channels**-0.5),
        "linear_1.bias": torch.zeros(width),
        "linear_2.weight": layer(width, width, scale * (width * GELU_POWER) ** -0.5),
        "linear_2.bias": torch.zeros(width),
    }
