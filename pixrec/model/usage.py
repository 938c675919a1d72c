"""What a training step costs: peak memory, and on a GPU the share of its arithmetic that is used (MFU)."""

from __future__ import annotations

import resource
import sys

import torch

from pixrec.model.towers import DualTower

# Dense bf16 tensor-core FLOP/s by the manufacturer's data sheets; a name that holds the key is that device.
PEAK_FLOPS = {
    "B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "A10": 125e12, "T4": 65e12, "V100": 125e12,
}  # fmt: skip


def usage(tower: DualTower, tokens_per_second: float, device: torch.device) -> dict[str, float]:
    """`peak_memory_bytes` of this process (on a GPU: of the device's allocator), and `mfu` on a known GPU.

    `tokens_per_second` of one worker.
    """
    if device.type != "cuda":
        return {"peak_memory_bytes": float(peak_resident_bytes())}
    figures = {"peak_memory_bytes": float(torch.cuda.max_memory_allocated(device))}
    peak = peak_flops(torch.cuda.get_device_name(device))
    return figures if peak is None else {**figures, "mfu": tokens_per_second * flops_per_token(tower) / peak}


def flops_per_token(tower: DualTower) -> float:
    """2 for each weight forward, 2 backward for activations, 2 for its gradient where it is trained (Kaplan et al.
    2020, arXiv 2001.08361, table 1). Attention, pictures and the embedding table are left out: the figure is a lower
    bound."""
    backbone = tower.backbone
    language_model = backbone.family.language_model(backbone.model)
    table = {id(p) for p in backbone.model.get_input_embeddings().parameters()}
    weights = [p for p in language_model.parameters() if id(p) not in table]
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in weights))


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a device by its name; None for one that is not in the table."""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in device_name), None)


def peak_resident_bytes() -> int:
    """Most memory this process has had at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
