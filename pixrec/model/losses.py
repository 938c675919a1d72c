"""The parts of the training objective (`objective` puts them together) as functions of tensors.

Every part is returned as a sum over examples and the number of examples, so that the parts of several workers add up to
exactly that of the joined batch.

Shapes: P examples (a history and the item that followed it) · U distinct items of one worker · G items gathered
from all workers · D width of the shared space · V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Part(NamedTuple):
    """One part of the objective: a sum over a number of examples."""

    total: Tensor
    examples: Tensor


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    target: Tensor,
    candidate_ids: Tensor,
    temperature: Tensor,
    log_inclusion: Tensor | None = None,
    excluded: Tensor | None = None,
    *,
    once: bool = True,
) -> Part:
    """InfoNCE (van den Oord et al., 2018) of unit vectors: cross-entropy of each anchor's own candidate among all.

    anchors (P, D), candidates (G, D), target (P,) rows of `candidates`. An item is never a negative of
    itself, and counts once, however many workers contribute it (`once` False: each time). `log_inclusion` (G,) is the
    log probability of each candidate to be in the batch; negatives are reweighted by it, which makes the expected
    denominator that of the whole catalog (logQ correction, Yi et al., RecSys 2019; the positive, which is always
    there, keeps its weight). `excluded` (P, G): candidates that are not negatives of an anchor.
    """
    logits = anchors @ candidates.T / temperature
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, target.unsqueeze(1), True)
    if log_inclusion is not None:
        logits = torch.where(own, logits, logits - log_inclusion)
    dropped = candidate_ids.unsqueeze(0) == candidate_ids[target].unsqueeze(1)
    if once:
        dropped = dropped | _repeats(candidate_ids)
    if excluded is not None:
        dropped = dropped | excluded
    logits = logits.masked_fill(dropped & ~own, float("-inf"))
    total = F.cross_entropy(logits, target, reduction="sum")
    return Part(total, _number(len(target), logits))


def _number(value: int, like: Tensor) -> Tensor:
    """A scalar where `like` lies; filled there, as a copy to a GPU would be waited for."""
    return torch.full((), float(value), device=like.device)


def _repeats(ids: Tensor) -> Tensor:
    """(G,) bool: the id stood in an earlier row already."""
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[order[1:]] = ordered[1:] == ordered[:-1]
    return repeated


def next_item_generation(logits: Tensor, token_ids: Tensor) -> Part:
    """Cross-entropy of the target's text tokens: logits (P, V) of the tokens before them, token_ids (P,)."""
    total = F.cross_entropy(logits.float(), token_ids, reduction="sum")
    return Part(total, _number(len(token_ids), logits))


def gather_with_gradient(tensor: Tensor, fill: float = 0.0) -> tuple[Tensor, int]:
    """Rows of all workers, (sum of their counts, …), and where this worker's begin; gradients flow to every worker.

    Workers may hold different numbers of rows. In one process the tensor comes back as it is.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([tensor.shape[0]], dtype=torch.int64, device=tensor.device))
    sizes = [int(c) for c in counts]
    gathered = _Gather.apply(tensor, sizes) if tensor.requires_grad else _all_gather_rows(tensor, sizes)
    return gathered, sum(sizes[: dist.get_rank()])


def _all_gather_rows(tensor: Tensor, sizes: list[int]) -> Tensor:
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    buffers = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(buffers, padded)
    return torch.cat([buffer[:size] for buffer, size in zip(buffers, sizes, strict=True)])


def all_reduced_rows(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all workers, as a new tensor."""
    summed = tensor.contiguous().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(summed)
    return summed


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums what every worker's loss says of this worker's rows."""

    @staticmethod
    def forward(ctx, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _all_gather_rows(tensor.detach(), sizes)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        summed = all_reduced_rows(gradient)
        start = sum(ctx.sizes[: dist.get_rank()])
        return summed[start : start + ctx.sizes[dist.get_rank()]], None
