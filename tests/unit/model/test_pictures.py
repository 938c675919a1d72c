"""The fast decoder against what the backbones' own processors make of the same bytes: pixels, and vectors from them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from fakes import tiny_model
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pixrec.data.images import decode_image, shrink_image
from pixrec.model.encoding import Content

SIDE_PX = 1000


def photograph(seed: int) -> bytes:
    """A JPEG with the spectrum of a photograph, colours paler than its lights."""
    frequency = np.hypot(np.fft.fftfreq(SIDE_PX)[:, None], np.fft.rfftfreq(SIDE_PX)[None])
    frequency[0, 0] = 1
    white = np.fft.rfft2(np.random.default_rng(seed).standard_normal((3, SIDE_PX, SIDE_PX)))
    noise = np.fft.irfft2(white / frequency**1.5, s=(SIDE_PX, SIDE_PX))
    channels = 128 + np.array([40, 12, 12])[:, None, None] * noise / noise.std(axis=(1, 2), keepdims=True)
    pixels = np.moveaxis(np.clip(channels, 0, 255).astype(np.uint8), 0, -1)
    sink = io.BytesIO()
    Image.fromarray(pixels.copy(), "YCbCr").convert("RGB").save(sink, "JPEG", quality=90)
    return sink.getvalue()


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    return [photograph(seed) for seed in range(4)]


def siglip(picture: Image.Image, size: int) -> np.ndarray:
    """PaliGemma's; bicubic."""
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    return processor(images=picture, return_tensors="np")["pixel_values"]


def idefics3(picture: Image.Image, size: int) -> np.ndarray:
    """SmolVLM's and Idefics3's global view; Lanczos."""
    edge = {"longest_edge": size}
    processor = Idefics3ImageProcessorPil(do_image_splitting=False, size=edge, max_image_size=edge)
    return processor(images=[[picture]], return_tensors="np")["pixel_values"]


def qwen(picture: Image.Image, size: int) -> np.ndarray:
    """That of all Qwen-VL, with the patches, mean and deviation of Qwen3-VL; its patches put together again."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": size**2, "longest_edge": size**2}, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )  # fmt: skip
    found = processor(images=picture, return_tensors="np")
    assert found["image_grid_thw"].tolist() == [[1, size // 16, size // 16]]
    tiles = found["pixel_values"].reshape(size // 32, size // 32, 2, 2, 3, 2, 16, 16)[..., 0, :, :]
    return tiles.transpose(4, 0, 2, 5, 1, 3, 6)


def decoded_by(processor, data: bytes, size: int) -> np.ndarray:
    """(size, size, 3) as the processor sees it, on the scale of 0 to 255 (all use mean and deviation 0.5)."""
    with Image.open(io.BytesIO(data)) as picture:
        values = processor(picture.convert("RGB"), size)
    return 127.5 + 127.5 * values.reshape(3, size, size).transpose(1, 2, 0)


@pytest.mark.parametrize("size", [64, 224, 384, 512])
@pytest.mark.parametrize(("processor", "bound"), [(siglip, 1.2), (qwen, 1.2), (idefics3, 1.6)])
def test_pixels_lie_close_to_the_processors(photographs: list[bytes], processor, bound: float, size: int):
    apart = np.abs(decode_image(photographs[0], size) - decoded_by(processor, photographs[0], size))
    assert apart.mean() < bound  # of 255
    assert apart.max() < 30


@pytest.mark.parametrize("processor", [siglip, qwen, idefics3])
def test_vectors_lie_close_to_those_of_the_processors_pixels(photographs: list[bytes], processor):
    embedder = tiny_model().embedder()
    size = embedder.encoder.image_size_px
    slow = [decoded_by(processor, data, size).round().clip(0, 255).astype(np.uint8) for data in photographs]
    theirs = embedder.contents([Content("", pixels) for pixels in slow])
    fast = embedder.contents([Content("", decode_image(data, size)) for data in photographs])
    stored = embedder.contents([Content("", decode_image(shrink_image(data, 256), size)) for data in photographs])
    assert (theirs * fast).sum(1).min() > 0.999
    assert (theirs * stored).sum(1).min() > 0.999
    others = theirs @ theirs.T
    assert others[~np.eye(len(photographs), dtype=bool)].max() < 0.999, "another picture's vector lies farther off"
