"""What a training would need, without training. Of the interleaved towers: parameters, tokens, memory, steps, time. Of
a compact tower on encoders, or on learned vectors alone: parameters, steps, memory but for activations.

A step is taken on torch's `meta` device, where tensors have shapes and no content, so nothing is computed and no weight
is read. Every tensor that is made is followed for as long as it lives; that gives the memory that activations and
gradients need at their most. Weights and the state of AdamW are added by their number. Not counted: what a GPU keeps
beside tensors (0.5 to 1 GB for CUDA itself, fragments of its allocator) and, on several, the buffers of NCCL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pixrec.artifact import planned_model, untrained_model, with_compact
from pixrec.config import Config
from pixrec.data.images import largest_side
from pixrec.data.items import load_texts
from pixrec.data.joined import join_datasets
from pixrec.data.sequences import load_dataset
from pixrec.model.backbone import TINY
from pixrec.model.catalog import Catalog, distinct_rows
from pixrec.model.encoders import DualEncoder
from pixrec.model.families import Family
from pixrec.model.families.qwen import SEGMENTS
from pixrec.model.objective import Batch, TrainingTask
from pixrec.model.towers import DualTower
from pixrec.training.interleaved import choose_trainable, prepare_backbone
from pixrec.training.reading import Collator, Pass, Reader
from pixrec.training.stages import check_joint, plan
from pixrec.training.windows import RecentWindows, ShiftedWindows

STEPS_LOOKED_AT = 3
_NF4_BYTES = 0.516  # 4 bits, and for every 64 weights a scale of 8 bits, itself scaled in blocks of 256
_ADAMW_BYTES = 8  # two float32 a parameter
_ATTENTION, _SEGMENTS = "pixrec_meta", "flash_pixrec_meta"


class LiveTensors(TorchDispatchMode):
    """Bytes of all tensors that are made inside of it and still live, and the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most_bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor):
                self._follow(made)
        return out

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Do not count these, which were there before."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.most_bytes = max(self.most_bytes, self.bytes)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.bytes -= size


class _Attention(torch.autograd.Function):
    """Of a flash kernel what it keeps: inputs, output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def dry_run(data: Sequence[str], config: Config, tokens_per_second: float | None = None) -> dict[str, Any]:
    """What a training of the interleaved towers on the data sets at `data` needs, for the line of JSON; where there are
    none, of the compact tower, and of the encoders that `train.joint` tunes.

    `tokens_per_second`: of one worker, as a run's log or `python -m benchmarks gpu` measured it. Raises PixRecError as
    the training itself would.
    """
    if not config.model.trains_backbone:
        return _compact_plan(data[0], config)
    texts = [text for uri in data for text in load_texts(uri)] if config.model.backbone == TINY else []
    model = planned_model(config, texts)
    tower, train = model.tower, config.train
    joined = join_datasets([load_dataset(uri) for uri in data])
    source = ShiftedWindows(joined.histories, config.model.max_history_items, train)
    collator = Collator(Catalog(joined.items, model.encoder), joined.counts, config, source.examples_per_step)
    workers = max(1, train.num_workers)
    reader, steps = Reader(source, collator), min(STEPS_LOOKED_AT, source.total_steps())
    passes = [one for step in range(steps) for one in reader.read(step, 0, workers).passes]
    batches = [collator_batch(one, collator, train.micro_batch_histories) for one in passes]
    counts = [whole.tokens() for whole, _ in batches]
    heaviest = max(range(len(batches)), key=lambda i: counts[i][1])
    memory = plan_memory(tower, batches[heaviest][1], config)
    passes_per_step = len(passes) / steps
    read, computed = (float(sum(count[i] for count in counts)) / len(counts) for i in (0, 1))
    step_tokens = read * passes_per_step
    total_steps = source.total_steps()
    seconds = None if tokens_per_second is None else round(total_steps * step_tokens / tokens_per_second)
    return {
        "dry_run": True,
        "backbone": config.model.backbone,
        "picture_px": largest_side(model.encoder.picture_size),
        "tokens_per_picture": model.encoder.tokens_per_picture,
        "parameters": {
            "trained": sum(p.numel() for p in tower.parameters() if p.requires_grad),
            "total": sum(p.numel() for p in tower.parameters()),
        },
        "workers": workers,
        "histories_per_step": train.histories_per_step,
        "tokens_per_step_per_worker": round(step_tokens),
        "padding_share": round(1 - read / max(computed, 1.0), 4),
        "pictures_per_step_per_worker": round(sum(len(whole.items.grid) for whole, _ in batches) / steps),
        "memory_per_gpu_bytes": memory,
        "steps": total_steps,
        "seconds": seconds,
        "seconds_are": "not known; give --tokens-per-second" if seconds is None else "computed from a measured rate",
    }


def _compact_plan(data: str, config: Config) -> dict[str, Any]:
    """As `dry_run`, of the phases after the interleaved one. Encoders are loaded for it."""
    check_joint(config)
    stages, dataset = plan(data, config), load_dataset(data)
    trained = dataset.items.item_ids[: int((dataset.training_counts() > 0).sum())]
    model = with_compact(untrained_model(config, []), trained)
    compact, backbone = model.tower.compact, model.tower.backbone
    assert compact is not None
    assert isinstance(backbone, DualEncoder)
    joint = any(stage.phase == "joint" for stage in stages)
    if joint:
        backbone.tune(config.model, config.train.seed)
    tuned = sum(p.numel() for name, p in backbone.named_parameters() if name in backbone.tuned)
    learned = sum(p.numel() for p in compact.parameters())
    total = sum(p.numel() for p in model.tower.parameters())
    source = RecentWindows(dataset.training_histories(), compact.user.max_history_items, config.train.compact, 0)
    epoch = len(source.epoch(0))
    held = {"weights": 4 * total, "gradients": 4 * (learned + tuned), "optimizer": _ADAMW_BYTES * (learned + tuned)}
    return {
        "dry_run": True,
        "text_encoder": config.model.text_encoder,
        "image_encoder": config.model.image_encoder,
        "parameters": {"trained": learned + tuned, "of_encoders": tuned, "total": total},
        "workers": max(1, config.train.num_workers),
        "histories_per_step": config.train.compact.histories_per_step,
        "memory_per_gpu_bytes": held,
        "steps": {
            "compact": min(epoch * config.train.compact.epochs, config.train.compact.max_steps or sys.maxsize),
            "joint": epoch * config.train.joint.epochs,
        },
        "items_encoded_per_joint_step": config.train.joint.fresh_items_per_step if joint else 0,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Lines for people."""
    if "backbone" not in found:
        parameters, steps = found["parameters"], found["steps"]
        held = sum(found["memory_per_gpu_bytes"].values()) / 2**30
        encoders = f"{found['text_encoder']} and {found['image_encoder']}" if found["text_encoder"] else "none"
        return [
            f"encoders      {encoders}",
            f"parameters    {parameters['trained']:,} trained of {parameters['total']:,}, "
            f"{parameters['of_encoders']:,} of them in the encoders",
            f"memory a GPU  {held:.2f} GiB for weights, gradients and optimizer; activations not computed",
            f"steps         at most {steps['compact']:,} of the compact tower, {steps['joint']:,} of both together",
        ]
    memory, parameters = found["memory_per_gpu_bytes"], found["parameters"]
    gib = {name: f"{value / 2**30:.2f} GiB" for name, value in memory.items()}
    share = parameters["trained"] / max(1, parameters["total"])
    time = found["seconds_are"] if found["seconds"] is None else f"{found['seconds'] / 3600:.2f} h"
    return [
        f"backbone      {found['backbone']}, {found['tokens_per_picture']} tokens for {found['picture_px']} px",
        f"parameters    {parameters['trained']:,} trained of {parameters['total']:,} ({share:.1%})",
        f"a step        {found['tokens_per_step_per_worker']:,} tokens and "
        f"{found['pictures_per_step_per_worker']:,} pictures a worker, {found['padding_share']:.0%} padding",
        f"memory a GPU  {gib['total']}: weights {gib['weights']}, gradients {gib['gradients']}, optimizer "
        f"{gib['optimizer']}, activations {gib['activations']} (computed)",
        f"steps         {found['steps']:,}; time {time}",
    ]


def collator_batch(one: Pass, collator: Collator, micro: int | None) -> tuple[Batch, Batch]:
    """A pass whole, and as much of it as is in memory at a time: with GradCache its longest histories alone."""
    encoder = collator.catalog.encoder
    local = distinct_rows(one.windows)[1]
    whole = Batch(one.items, encoder.histories(one.items, local), one.item_rows, one.log_inclusion)
    if micro is None:
        return whole, whole
    longest = sorted(local, key=len)[-micro:]
    rows = torch.unique(torch.cat([torch.from_numpy(history) for history in longest]))
    place = torch.zeros(len(one.items), dtype=torch.int64)
    place[rows] = torch.arange(len(rows))
    items = encoder.select(one.items, rows.numpy())
    histories = encoder.histories(items, [place[torch.from_numpy(history)].numpy() for history in longest])
    return whole, Batch(items, histories, one.item_rows[rows], one.log_inclusion[rows])


def plan_memory(tower: DualTower, batch: Batch, config: Config) -> dict[str, int]:
    """Bytes a GPU needs for a step on `batch`: `weights`, `gradients`, `optimizer`, `activations` (kept when the
    backward pass begins), `total` (the most at a time: gradients grow while activations go). `tower` lies on `meta` and
    is altered."""
    choose_trainable(tower, config)
    prepare_backbone(tower, dataclasses.replace(config, train=dataclasses.replace(config.train, compile=False)))
    trained = [p for p in tower.parameters() if p.requires_grad]
    shards = config.train.num_workers if config.train.parallel == "fsdp2" else 1
    weights = math.ceil(_weight_bytes(tower, config) / shards)
    copies_in_float32 = sum(4 * p.numel() for p in trained if p.element_size() < 4)
    optimizer = math.ceil((sum(_ADAMW_BYTES * p.numel() for p in trained) + copies_in_float32) / shards)
    gradients = math.ceil(sum(p.numel() * p.element_size() for p in trained) / shards)
    autocast = config.train.precision == "bf16" and tower.backbone.dtype == torch.float32
    copies = 0
    if autocast:  # which keeps a copy of every matrix until the backward pass is over
        copies = 2 * sum(p.numel() for p in tower.parameters() if p.ndim >= 2)
        for parameter in tower.backbone.parameters():
            parameter.data = parameter.data.bfloat16()
    activations, most = step_memory(tower, batch.to(torch.device("meta")), config)
    if autocast:  # gradients were made in two bytes and not in four
        most += gradients // 2
    total = weights + optimizer + copies + (most if shards == 1 else activations + gradients)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations + copies,
        "total": max(total, weights + optimizer + gradients),
    }


def step_memory(tower: DualTower, batch: Batch, config: Config) -> tuple[int, int]:
    """Bytes of tensors that live between forward and backward pass, and the most of the whole step; weights and batch
    not counted. On any device: on `meta` nothing is computed."""
    tower.train()
    with _shapes_alone(tower) if batch.item_rows.is_meta else contextlib.nullcontext():
        task = TrainingTask(tower, config.train)
        if batch.item_rows.is_meta:
            task.autocast = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        with LiveTensors() as live:
            live.ignore(p for p in tower.parameters())
            loss, _ = task(batch)
            kept = live.bytes
            loss.backward()
            most = live.most_bytes
    for parameter in tower.parameters():
        parameter.grad = None
    return kept, most


@contextlib.contextmanager
def _shapes_alone(tower: DualTower) -> Iterator[None]:
    """Attention as a flash kernel keeps memory, where a part of the backbone does not want it eager."""
    transformers.AttentionInterface.register(_ATTENTION, _attend)
    # Of all pictures together it keeps what it does of each.
    transformers.AttentionInterface.register(_SEGMENTS, _attend)
    parts = [c for m in tower.backbone.modules() if (c := getattr(m, "config", None)) is not None]
    before = [(config, config._attn_implementation) for config in parts if hasattr(config, "_attn_implementation")]
    for config, kind in before:
        if kind != "eager":
            config._attn_implementation_internal = _SEGMENTS if kind == SEGMENTS else _ATTENTION
    try:
        yield
    finally:
        for config, kind in before:
            config._attn_implementation_internal = kind


def _weight_bytes(tower: DualTower, config: Config) -> float:
    family: Family = tower.backbone.family
    packed: set[int] = set()
    if config.model.lora.base == "nf4":
        language = family.language_model(tower.backbone.model)
        packed = {id(m.weight) for m in language.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
    return sum(p.numel() * (_NF4_BYTES if id(p) in packed else p.element_size()) for p in tower.parameters())
