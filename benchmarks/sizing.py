"""What a catalog of 1, 10 and 100 million items takes: `python -m benchmarks.sizing [--no-measuring]`.

Rates of one core are measured here, in seconds of the processor, so that a busy machine does not matter. The rate of a
GPU comes from `benchmarks/RESULTS.md`. All else is arithmetic, which this file is: memory from the bytes an item and an
event that RESULTS.md has, time and price from the rates. Prices are assumed (c6i.4xlarge and g6.4xlarge on demand in
us-east-1, dollars an hour): give your own.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from pixrec.data.images import decode_image, shrink_image

DECODE_AND_STORE, DECODE_STORED = 121.0, 860.0
"""Pictures a second of one core: 1000 px to a stored one of 256 px; stored to 224 px. As this command measured them."""
GPU_TRAINED = 360.0 * 10
"""Items a second that one H200 encodes while it trains the shape of SmolVLM-256M: 360 examples of 9 items and a target
(RESULTS.md, "Training on a GPU"). Embedding has no backward pass, so this is less than it would do."""
L4_SHARE = 121 / 989
"""An L4's peak in bf16 over an H200's, dense, as NVIDIA states them."""
CORES, CPU_PRICE, GPU_PRICE = 16, 0.68, 1.32
STORED_BYTES, EVENT_BYTES, TEXT_BYTES, WIDTH = 12_000, 12, 300, 64
EVENTS_PER_USER = 50


class Size(NamedTuple):
    items: int
    users: int


SIZES = (Size(10**6, 10**6), Size(10**7, 2 * 10**7), Size(10**8, 10**8))


def rate(work: Callable[[], object], times: int = 40) -> float:
    """How often a second of the processor does it."""
    work()
    began = time.process_time()
    for _ in range(times):
        work()
    return times / (time.process_time() - began)


def measure() -> tuple[float, float]:
    pixels = np.random.default_rng(0).integers(0, 255, (63, 63, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((1000, 1000), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=85)
    large = sink.getvalue()
    stored = shrink_image(large, 256)
    return rate(lambda: shrink_image(large, 256)), rate(lambda: decode_image(stored, 224))


def table(store_rate: float, decode_rate: float, cpu_price: float, gpu_price: float) -> list[str]:
    lines = [
        "| | " + " | ".join(f"{size.items // 10**6} M items, {size.users // 10**6} M users" for size in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
    ]

    def row(name: str, value: Callable[[Size], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(value(size) for size in SIZES) + " |")

    l4 = GPU_TRAINED * L4_SHARE
    core_hours = {size: size.items / store_rate / 3600 for size in SIZES}
    gpu_hours = {size: size.items / l4 / 3600 for size in SIZES}
    row("stored pictures", lambda s: f"{s.items * STORED_BYTES / 1e9:,.0f} GB")
    row("events, mapped on each node", lambda s: f"{s.users * EVENTS_PER_USER * EVENT_BYTES / 1e9:,.1f} GB")
    row("item vectors, float32, mapped once a node", lambda s: f"{s.items * WIDTH * 4 / 1e9:,.1f} GB")
    row("the same in int8, stored", lambda s: f"{s.items * (WIDTH + 4) / 1e9:,.1f} GB")
    row("driver of `embed`", lambda s: f"{s.items * 16 / 1e9:,.2f} GB")
    row("`prepare`, core hours for pictures", lambda s: f"{core_hours[s]:,.1f}")
    row("price on c6i.4xlarge", lambda s: f"${core_hours[s] / CORES * cpu_price:,.2f}")
    row("hours on 8 of them", lambda s: f"{core_hours[s] / CORES / 8:,.2f}")
    row("`embed`, hours of one L4 (SmolVLM-256M)", lambda s: f"{gpu_hours[s]:,.1f}")
    row("price on g6.4xlarge", lambda s: f"${gpu_hours[s] * gpu_price:,.2f}")
    row("the same with 2 % of the items new", lambda s: f"${0.02 * gpu_hours[s] * gpu_price:,.2f}")
    lines.append("")
    lines.append(
        f"Cores that decode for one L4 that embeds: {l4 / decode_rate:.1f}; for one H200: "
        f"{GPU_TRAINED / decode_rate:.1f}."
    )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--no-measuring", action="store_true", help="take the rates that docs/operating.md was written with"
    )
    parser.add_argument("--cpu-price", type=float, default=CPU_PRICE)
    parser.add_argument("--gpu-price", type=float, default=GPU_PRICE)
    given = parser.parse_args()
    rates = (DECODE_AND_STORE, DECODE_STORED) if given.no_measuring else measure()
    print(f"pictures a second of one core: {rates[0]:,.0f} decoded and stored, {rates[1]:,.0f} decoded again\n")
    print("\n".join(table(*rates, given.cpu_price, given.gpu_price)))
