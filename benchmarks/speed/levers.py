"""What each lever of training is worth where a CPU can show it: with and without, on the same numbers.

    python -m benchmarks.speed.levers

Processor time on one thread, both ways in turn, the median of the ratios; beside it how far the results are apart. How
much padding costs is in `benchmarks.speed.padding`. None of this is a figure of a GPU.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from benchmarks.shapes import shape, small_tokenizer
from pixrec.model.backbone import Backbone, compile_layers, use_attention, with_masks
from pixrec.model.encoding import cut_into_tiles
from pixrec.model.families.qwen import SEGMENTS

ROUNDS = 5


def compare(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
    """Print seconds of ours over theirs, and the largest relative difference of what they return."""
    one, other = ours(), theirs()
    apart = float((one - other).abs().max() / other.abs().max())
    ratios = []
    for _ in range(ROUNDS):
        taken = []
        for call in (ours, theirs):
            started = time.process_time()
            call()
            taken.append(time.process_time() - started)
        ratios.append(taken[0] / taken[1])
    print(f"{name}: {statistics.median(ratios):.2f} of the time; apart {apart:.0e}", flush=True)


def optimiser() -> None:
    """A step of AdamW over the matrices of six layers 576 wide."""

    def step(**kind: bool) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = [(576,), (576, 576), (1536, 576)] * 6
        parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        made = torch.optim.AdamW(parameters, lr=1e-4, **kind)

        def call() -> Tensor:
            made.step()
            return torch.cat([p.detach().flatten() for p in parameters])

        return call

    compare("AdamW fused, beside a loop over parameters", step(fused=True), step(foreach=False))
    compare("AdamW fused, beside foreach", step(fused=True), step(foreach=True))


def qwen_vision() -> None:
    """Forward and backward of the encoder of a Qwen2.5-VL, 2 layers 64 wide, for 8 pictures of 252 px in windows."""
    config = shape("qwen2.5-vl-3b", small_tokenizer(["word"]).get_vocab(), small=True)
    vision = config.vision_config
    vision.out_hidden_size = 48
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 64, 128, 2
    model = AutoModelForImageTextToText.from_config(config)
    use_attention(model, "auto")
    backbone = Backbone(model, [0.5] * 3, [0.5] * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 252, 252, 3)).astype(np.uint8)
    tiles, grid = cut_into_tiles(list(pixels), backbone.family.tile_px)

    def encode(attention: str) -> Tensor:
        backbone.family.config.vision_config._attn_implementation_internal = attention
        tokens = backbone.picture_tokens(tiles, grid)
        tokens.square().mean().backward()
        return tokens.detach()

    compare("A Qwen's windows of one length in one call", lambda: encode(SEGMENTS), lambda: encode("sdpa"))


def masks() -> None:
    """Forward and backward of a Llama 576 wide with 2 layers, 4 rows of 256 tokens, the last quarter padding in half of
    them."""
    config: Any = shape("smolvlm-256m", small_tokenizer(["word"]).get_vocab())
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 2, 1
    model = AutoModelForImageTextToText.from_config(config)
    use_attention(model, "auto")
    language, whole = model.model.text_model, model.config.text_config
    own, states = language.config, torch.randn(4, 256, 576)
    is_token = torch.ones(4, 256, dtype=torch.bool)
    is_token[::2, 192:] = False

    def read(mask: bool) -> Tensor:
        language.config = own
        if mask:
            with_masks(model)
        assert (language.config is whole) == mask
        given = {"attention_mask": is_token.long()} if mask else {}
        hidden = language(inputs_embeds=states, use_cache=False, **given).last_hidden_state[is_token]
        hidden.square().mean().backward()
        return hidden.detach()

    compare("No attention mask", lambda: read(False), lambda: read(True))


def compiled_layers() -> None:
    """Forward and backward of a SmolVLM 576 wide with 2 layers that read and 2 that see, over pictures of 512 px and
    sequences of several lengths. Compiling comes before the first timed round."""
    config: Any = shape("smolvlm-256m", small_tokenizer(["word"]).get_vocab())
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 2
    model = AutoModelForImageTextToText.from_config(config)
    use_attention(model, "auto")
    compiled = copy.deepcopy(model)
    compile_layers(compiled)
    pixels, states = torch.randn(2, 3, 512, 512), [torch.randn(3, tokens, 576) for tokens in (250, 130, 60)]

    def pass_through(model: Any) -> Tensor:
        seen = model.model.vision_model(pixel_values=pixels).last_hidden_state
        read = [model.model.text_model(inputs_embeds=s, use_cache=False).last_hidden_state for s in states]
        sum(made.square().mean() for made in (seen, *read)).backward()
        return torch.cat([made.detach().flatten() for made in (seen, *read)])

    compare("Layers compiled", lambda: pass_through(compiled), lambda: pass_through(model))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    optimiser()
    qwen_vision()
    masks()
    compiled_layers()


if __name__ == "__main__":
    main()
