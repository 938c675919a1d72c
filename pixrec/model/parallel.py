"""Weights and gradients spread over workers: sharding by FSDP2, averaging, clipping, the optimiser's state.

Plain torch.distributed; in one process everything here is what it would be without. Knows towers, not training. A shard
is a DTensor, known by its methods: FSDP takes a second to import, which only those pay who shard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixrec.model.losses import gather_with_gradient
from pixrec.model.masters import MASTER
from pixrec.model.objective import TrainingTask
from pixrec.model.rowwise import ROW_SUM

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_STEP = "step"
_STATE = (_STEP, "exp_avg", "exp_avg_sq", ROW_SUM)
"""What the optimiser keeps of a parameter: AdamW the first three."""
_STORED = (*_STATE, MASTER)


def rank_and_size() -> tuple[int, int]:
    """Which of the workers this one is, and how many there are: 0 and 1 without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(task: TrainingTask) -> None:
    """Spread the weights of `task` over all workers, in place: each layer of the language model apart, the rest
    together. The temperature is a scalar, which FSDP does not take: it stays whole on every worker."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    backbone = task.tower.backbone
    for layer in backbone.family.language_model(backbone.model).layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(task, ignored_params={task.tower.log_temperature})
    register_fsdp_forward_method(task, "run")
    task.touches = True
    task.tower.by_length = False


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, which is a collective operation; any other tensor as it is."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def _is_shard(tensor: Any) -> TypeGuard[DTensor]:
    return hasattr(tensor, "to_local")


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Mean of the gradients over all workers; a worker that has none counts as zero. Shards are averaged already."""
    sum_gradients([p for p in parameters if not _is_shard(p)], average=True)


def sum_gradients(parameters: Iterable[Tensor], *, average: bool = False) -> None:
    """Sum of the gradients over all workers, or their mean; a parameter without a gradient on any worker keeps none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    wanted = list(parameters)
    if not wanted:
        return
    present = torch.tensor([float(p.grad is not None) for p in wanted], device=wanted[0].device)
    dist.all_reduce(present)
    used = [p for p, count in zip(wanted, present.tolist(), strict=True) if count]
    if not used:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
    dist.all_reduce(flat)
    if average:
        flat /= dist.get_world_size()
    for parameter, gradient in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = gradient.view_as(parameter)


@torch.no_grad()
def sum_sparse_gradient(table: Tensor) -> None:
    """Sum of the sparse gradients (R, D) over all workers; of each, the rows that a step reads go to the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    own = table.grad
    rows = torch.zeros(0, dtype=torch.int64, device=table.device) if own is None else own.coalesce().indices()[0]
    values = table.new_zeros(0, table.shape[1]) if own is None else own.coalesce().values()
    (rows, _), (values, _) = gather_with_gradient(rows), gather_with_gradient(values)
    table.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), values, table.shape, check_invariants=False)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit`; returns the norm before, (), for which no GPU is
    waited."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [g.to_local() for g in gradients if _is_shard(g)]
    plain = [g for g in gradients if not _is_shard(g)]
    square = _squares(plain, gradients)
    if shards:
        spread = _squares(shards, gradients)
        dist.all_reduce(spread)
        square = square + spread
    norm = square.sqrt()
    if gradients:
        torch._foreach_mul_([*plain, *shards], (limit / (norm + 1e-6)).clamp(max=1))
    return norm


def _squares(tensors: list[Tensor], of: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros((), device=of[0].device if of else None)
    return torch.stack([norm.float() ** 2 for norm in torch._foreach_norm(tensors)]).sum()


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state as `parameter/key`, for safetensors; of a sharded parameter this worker's shard."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in named.items()}
    return {
        f"{names[parameter]}/{key}": value.detach().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Give AdamW back the state that `optimizer_tensors` took; a parameter without any stays as it is.

    A counter of steps that lies on a GPU makes the processor wait for it at every step, so only optimisers that count
    there get it there.
    """
    counts_there = {p for g in optimizer.param_groups if g["fused"] or g["capturable"] for p in g["params"]}
    for name, parameter in named.items():
        state = {key: tensors[f"{name}/{key}"] for key in _STATE if f"{name}/{key}" in tensors}
        if state:
            counts = parameter.device if parameter in counts_there else "cpu"
            moved = {key: value.to(counts if key == _STEP else parameter.device) for key, value in state.items()}
            optimizer.state[parameter] = moved


def empty_state(named: dict[str, nn.Parameter], keys: Collection[str]) -> dict[str, Tensor]:
    """What those of `keys` that are the optimiser's (`parameter/key`) can be read into."""
    wanted = [(name, key) for name in named for key in _STORED if f"{name}/{key}" in keys]
    return {
        f"{name}/{key}": torch.zeros(()) if key == _STEP else torch.zeros_like(named[name], requires_grad=False)
        for name, key in wanted
    }
