"""Float32 copies of weights that are trained in a narrower type.

An update is often smaller than the distance between two neighbouring bf16 numbers, 1/256 of the weight, and would be
rounded away. So the optimiser moves a copy in float32, and the weight is that copy rounded: the master weights of
Micikevicius et al. (ICLR 2018). Plain torch; shards stay shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

MASTER = "master"


class Masters:
    """What the optimiser moves in place of the parameters of a model: float32 copies of those that are narrower, all
    others themselves."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._narrow = {name: p for name, p in named.items() if p.dtype in (torch.bfloat16, torch.float16)}
        copies = {name: nn.Parameter(p.detach().float()) for name, p in self._narrow.items()}
        self.named: dict[str, nn.Parameter] = {**named, **copies}
        """by the parameters' names"""
        self._of = {p: copies[name] for name, p in self._narrow.items()}

    def of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """What is moved in place of these parameters."""
        return [self._of.get(parameter, parameter) for parameter in parameters]

    def take_gradients(self) -> None:
        """Hand the copies the gradients of their parameters, which lose them."""
        for name, parameter in self._narrow.items():
            self.named[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the copies to what the model computes with."""
        for name, parameter in self._narrow.items():
            parameter.copy_(self.named[name])

    def tensors(self) -> dict[str, Tensor]:
        """The copies as `parameter/master`, for a checkpoint."""
        return {f"{name}/{MASTER}": self.named[name].detach() for name in self._narrow}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with what `tensors` gave."""
        for name in self._narrow:
            if f"{name}/{MASTER}" in tensors:
                self.named[name].copy_(tensors[f"{name}/{MASTER}"])
