"""An exponential moving average of a model's weights. The average is validated and kept; training continues from the
latest weights.

Averaging of iterates (Polyak & Juditsky, SIAM J. Control Optim. 1992), here with exponential weights (Morales-Brotons
et al., TMLR 2024). Plain torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

_MEAN, _LAST = "mean", "last"


class WeightMean:
    """The moving average of the parameters `named`: each step keeps the share `decay` of it. With 0 there is none."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        self.named, self.decay = named, decay
        self._mean = _copies(named) if decay else {}
        self._last: dict[str, Tensor] | None = None  # of the parameters, while they have the mean

    def update(self, step: int) -> None:
        """Add the parameters after optimisation step `step`, from 1. The first steps have a lower decay."""
        if self._mean:
            decay = min(self.decay, step / (step + 9))
            get_ema_multi_avg_fn(decay)(list(self._mean.values()), list(self.named.values()), step)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the average; afterwards their own values again."""
        self._last = _copies(self.named) if self._mean else None
        self.keep()
        try:
            yield
        finally:
            if self._last is not None:
                self._set(self._last)
            self._last = None

    def keep(self) -> None:
        """Set the parameters to the average for good."""
        if self._mean:
            self._set(self._mean)

    def tensors(self) -> dict[str, Tensor]:
        """The average and the latest weights by name, for safetensors; empty where no average is kept."""
        if not self._mean:
            return {}
        last = self._last or _copies(self.named)
        return {f"{kind}/{name}": t for kind, of in ((_MEAN, self._mean), (_LAST, last)) for name, t in of.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` gave; the parameters get the last weights."""
        if self._mean:
            self._mean = {name: tensors[f"{_MEAN}/{name}"] for name in self.named}
            self._set({name: tensors[f"{_LAST}/{name}"] for name in self.named})

    @torch.no_grad()
    def _set(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.named.items():
            parameter.copy_(weights[name])


def _copies(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}
