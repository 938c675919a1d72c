"""Seeds torch's random number generators: for one training step, or for a model's initial weights.

`torch.manual_seed` does the same, but for every kind of device that torch knows, and for each absent one it formats the
call stack. That takes .2 ms a call, and some ms where the stack is deep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(numbers: Sequence[int]) -> int:
    """A seed made of these numbers (a run's seed, a step, a worker); similar lists give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def reseed(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of `device`, as `torch.manual_seed` does."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed_all(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block the CPU's generator starts at `seed`; afterwards it continues where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
