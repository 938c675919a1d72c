"""The random streams of torch, set to a seed: for one step of a training, or for the first weights of a model.

`torch.manual_seed` does the same for every kind of device that torch knows, and for each that is not there it formats
the call stack: .2 ms a call, some ms where the stack is deep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(numbers: Sequence[int]) -> int:
    """A seed for these numbers (a run's seed, a step, a worker); lists that differ by one give unlike seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def reseed(seed: int, device: torch.device) -> None:
    """Start the streams of the CPU and of `device` at `seed`, as `torch.manual_seed` does."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed_all(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's stream starts at `seed` inside and goes on afterwards where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
