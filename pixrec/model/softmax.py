"""Losses of next-item models: softmax over the whole catalog, softmax over sampled negatives, and gBCE.

Every loss is a sum over P examples. The scores of all N items are never held at once: they are computed, turned
into gradients and dropped block by block (as in fused linear cross-entropy; Hsu et al., Liger Kernel, 2024), which
keeps memory flat and the blocks in the processor's cache.

Shapes: P examples · N candidates · D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = {"cpu": 2**19, "cuda": 2**27}
"""Scores made at a time: 2 MB of float32 stay in a processor's cache; a GPU wants few large kernels, half a GB each."""
WHOLE_ROWS = 64
"""The last block is filled up with zeros to a multiple of this many examples, so that steps share their shapes: oneDNN
makes kernels for bfloat16 for each shape and keeps a thousand of them, which is gigabytes."""


def catalog_softmax(states: Tensor, table: Tensor, target: Tensor, *, bfloat16: bool = False) -> Tensor:
    """Cross-entropy of each state's own row of the table among all rows, summed over the examples.

    states (P, D), table (N, D), target (P,) rows; scores are inner products, so a temperature goes into the states.
    `bfloat16` does the three matrix products in that type and everything else in float32.
    """
    total: Tensor = _CatalogSoftmax.apply(states, table, target, bfloat16)
    return total


class _CatalogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, target: Tensor, bfloat16: bool) -> Tensor:
        kind = torch.bfloat16 if bfloat16 else table.dtype
        to_states, to_table = torch.empty_like(states), torch.zeros_like(table)
        total = states.new_zeros((), dtype=torch.float32)
        items = table.to(kind)
        most = max(1, BLOCK_SCORES.get(table.device.type, BLOCK_SCORES["cpu"]) // len(table))
        whole = min(WHOLE_ROWS, most)
        for rows in torch.arange(len(states), device=states.device).split(most // whole * whole):
            count, spare = len(rows), -len(rows) % whole
            part = F.pad(states[rows].to(kind), (0, 0, 0, spare))
            own = F.pad(target[rows], (0, spare)).unsqueeze(1)
            scores = (part @ items.T).float()
            mine, largest = scores.gather(1, own), scores.amax(1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            sums = weights.sum(1, keepdim=True)
            total += (sums.log() + largest - mine)[:count].sum()
            gradient = weights.div_(sums)  # of the scores: probability minus one for the example's own
            gradient.scatter_add_(1, own, -torch.ones_like(mine))
            gradient[count:] = 0
            narrow = gradient.to(kind)
            to_states[rows] = (narrow @ items)[:count].to(states.dtype)
            to_table += narrow.T @ part
        ctx.save_for_backward(to_states, to_table)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        to_states, to_table = ctx.saved_tensors
        return to_states * gradient, to_table * gradient, None, None


def sampled_softmax(
    states: Tensor, positives: Tensor, negatives: Tensor, same: Tensor, log_chance: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each positive among K shared negatives, summed (Jean et al., ACL 2015).

    states, positives (P, D), negatives (K, D), same (P, K): the negative is the example's own item and does not count.
    `log_chance` (K,), the log of how often each negative is expected in the sample, makes the expected denominator
    that of the whole catalog (logQ, Yi et al., RecSys 2019); without it, only relative to the sample.
    """
    positive, negative = _scores(states, positives, negatives)
    if log_chance is not None:
        negative = negative - log_chance
    logits = torch.cat([positive.unsqueeze(1), negative.masked_fill(same, float("-inf"))], 1)
    return -logits.log_softmax(1)[:, 0].sum()


def generalised_bce(positive: Tensor, negative: Tensor, sampling_rate: float, calibration: float) -> Tensor:
    """gBCE of gSASRec (Petrov & Macdonald, RecSys 2023), summed over the examples.

    positive (P,), negative (P, K): scores; -inf where a negative is the example's own item and does not count.
    `sampling_rate` a = K / (N - 1); `calibration` t from 0 (plain BCE) to 1 (calibrated probabilities). The positive's
    sigmoid is raised to beta = a (t (1 - 1/a) + 1/a).
    """
    beta = sampling_rate * (calibration * (1 - 1 / sampling_rate) + 1 / sampling_rate)
    return (F.softplus(negative).sum(1) - beta * F.logsigmoid(positive)).sum() / (1 + negative.shape[1])


def _scores(states: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    return (states * positives).sum(1).float(), (states @ negatives.T).float()
