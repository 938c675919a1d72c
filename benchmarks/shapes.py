"""Configs of real backbones as they are published, without their weights, and tiny ones of the same classes."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from pixrec.model.encoding import train_tokenizer

PUBLISHED = {
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "paligemma2-3b": "google/paligemma2-3b-pt-224",
    "gemma3-4b": "google/gemma-3-4b-it",
    "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
    "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
}
"""Names on the hub of the backbones whose shapes are here."""

_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads")  # fmt: skip
_TEXT = {
    "smolvlm-256m": (49280, 576, 1536, 30, 9, 3),
    "smolvlm-500m": (49280, 960, 2560, 32, 15, 5),
    "smolvlm2-2.2b": (49280, 2048, 8192, 24, 32, 32),
    "qwen2.5-vl-3b": (151936, 2048, 11008, 36, 16, 2),
    "qwen3-vl-2b": (151936, 2048, 6144, 28, 16, 8),
    "paligemma2-3b": (257216, 2304, 9216, 26, 8, 4),
    "gemma3-4b": (262208, 2560, 10240, 34, 8, 4),
    "internvl3-1b": (151674, 896, 4864, 24, 14, 2),
    "llava-onevision-0.5b": (152000, 896, 4864, 24, 14, 2),
}
_VISION = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, image_size, patch_size
    "smolvlm-256m": (768, 3072, 12, 12, 512, 16),
    "smolvlm-500m": (768, 3072, 12, 12, 512, 16),
    "smolvlm2-2.2b": (1152, 4304, 27, 16, 384, 14),
    "paligemma2-3b": (1152, 4304, 27, 16, 224, 14),
    "gemma3-4b": (1152, 4304, 27, 16, 896, 14),
    "internvl3-1b": (1024, 4096, 24, 16, 448, 14),
    "llava-onevision-0.5b": (1152, 4304, 26, 16, 384, 14),
}
_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>",
           "\n\n", "<start_of_image>", "<end_of_image>", "<image_soft_token>")  # fmt: skip


def small_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the special tokens of every family."""
    tokenizer = train_tokenizer(texts, 500)
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *_TOKENS]})
    return tokenizer


def shape(name: str, ids: dict[str, int], small: bool = False) -> PreTrainedConfig:
    """The config of a backbone of PUBLISHED with the token `ids` of `small_tokenizer`; `small`: of the same classes,
    with some 100,000 weights."""
    text: dict[str, Any] = dict(zip(_FIELDS, (600, 48, 96, 2, 4, 2) if small else _TEXT[name], strict=True))
    text |= {"pad_token_id": ids["<pad>"], "bos_token_id": ids["<s>"], "eos_token_id": ids["<end_of_utterance>"]}
    sides = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    vision: dict[str, Any] = {}
    if name in _VISION:
        vision = dict(zip(sides, (32, 64, 2, 2, 64, 16) if small else _VISION[name], strict=True))
    if name.startswith("smolvlm"):
        factor = 2 if small else 3 if name == "smolvlm2-2.2b" else 4
        return SmolVLMConfig(
            text_config=LlamaConfig(**text, max_position_embeddings=8192), vision_config=vision, scale_factor=factor,
            image_token_id=ids["<image>"],
        )  # fmt: skip
    if name.startswith("qwen"):
        return _qwen(name, ids, text, small)
    if name == "internvl3-1b":
        return InternVLConfig(
            text_config=Qwen2Config(**text),
            vision_config=vision,
            image_token_id=ids["<IMG_CONTEXT>"],
            tie_word_embeddings=False,
        )
    siglip = SiglipVisionConfig(**vision, vision_use_head=False)
    if name == "llava-onevision-0.5b":
        return LlavaOnevisionConfig(
            vision_config=siglip, text_config=Qwen2Config(**text), image_token_index=ids["<image>"],
            video_token_index=ids["<|video_pad|>"], tie_word_embeddings=True,
        )  # fmt: skip
    text["head_dim"] = 12 if small else 256
    if name == "gemma3-4b":
        return Gemma3Config(
            vision_config=siglip, text_config=Gemma3TextConfig(**text, sliding_window=1024),
            image_token_index=ids["<image_soft_token>"], mm_tokens_per_image=4 if small else 256,
        )  # fmt: skip
    width = text["hidden_size"]
    return PaliGemmaConfig(
        vision_config=siglip, text_config=Gemma2Config(**text), image_token_index=ids["<image>"], projection_dim=width,
        hidden_size=width,
    )  # fmt: skip


def _qwen(name: str, ids: dict[str, int], text: dict[str, Any], small: bool) -> PreTrainedConfig:
    third = name.startswith("qwen3")
    if third:
        vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
                  "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}
        text["head_dim"] = 128
    else:
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
                  "out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    if small:
        vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
        vision |= {"deepstack_visual_indexes": [0]} if third else {"fullatt_block_indexes": [1]}
        rope["mrope_section"] = [2, 2, 2]
        text["head_dim"] = 12
    kind = Qwen3VLConfig if third else Qwen2_5_VLConfig
    return kind(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], video_token_id=ids["<|video_pad|>"],
    )  # fmt: skip
