"""Training of the compact tower and the item tower together, on top of a compact tower trained on vectors that stand
still.

A step's loss reads the content vectors of the whole catalog, and the item tower can encode a few of them only. So it
encodes some items of the step's histories anew, with gradient; all other vectors come from a table, without gradient,
and are as old as the table's row. Three things keep it young: what a step encodes is written back at once, the same on
every worker; the whole table is computed anew every `refresh_every_steps`; and before every validation. What staleness
is left is logged: with each step, of the items that it encodes, `staleness` (mean 1 - cosine of the table's vector and
the new one) and `age_steps` (steps since the table's vector was computed), and `fresh_share` (the share of the items of
the step's histories that are encoded); with each validation `table_staleness`, the same mean over the whole catalog,
just before the table was computed anew.

Items are encoded in micro-batches (GradCache, Gao et al., RepL4NLP 2021): first without a graph; the loss gives the
gradient of each vector; then once more, with a graph, to be sent that gradient. Memory grows with the micro-batch.

The item tower may be two pretrained encoders (`DualEncoder.tune`): adapters in them learn, or all of their weights.
They stay in evaluation mode while they do, without dropout and with the running statistics that they came with.

No Ray, no file system. Every worker holds both towers and the table whole. Nothing is hidden from an item (no modality
dropout): what is written back must be what the table holds.

Shapes: F items that a step encodes · N items of the catalog · U items that its loss reads · C width of content vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixrec.config import Config, SequenceConfig
from pixrec.data.sequences import HeldOut
from pixrec.model.catalog import Catalog
from pixrec.model.gradcache import GradCache
from pixrec.model.losses import all_reduced_rows, gather_with_gradient
from pixrec.model.parallel import clip_gradients
from pixrec.model.seeding import reseed, seed_of
from pixrec.model.towers import DualTower
from pixrec.training.compact import CompactTrainer
from pixrec.training.interleaved import choose_trainable, prepare_backbone
from pixrec.training.windows import rows_of

_ROWS_PER_PASS = 256
"""Items encoded at a time where no gradient is wanted."""


class JointTrainer(CompactTrainer):
    """Both towers of a model, their optimiser and their place in the data; arguments as `CompactTrainer` takes them.

    `content` is the table. It is computed before the first step or validation, also after `restore`: checkpoints lie
    where a validation has just computed it.
    """

    content: Tensor
    """(N, C) as the next step would read them"""
    section = "train.joint"
    validates_first = True  # the frozen phase may have ended better than this one ever gets

    def __init__(
        self,
        towers: DualTower,
        catalog: Catalog,
        histories: Sequence[np.ndarray],
        counts: np.ndarray,
        id_rows: np.ndarray,
        config: Config,
        timestamps: Sequence[np.ndarray] | None = None,
    ) -> None:
        assert towers.compact is not None
        settings, model = config.train.joint, config.model
        super().__init__(
            towers.compact,
            histories,
            counts,
            torch.zeros(len(catalog), model.content_width),
            id_rows,
            _as_sequence(config),
            model.compact.id_dropout,
            config.train.seed,
            timestamps,
            catalog.table.item_ids,
            model.compact.id_dropout_events,
        )
        self.towers, self.catalog, self.settings = towers, catalog, settings
        self.modalities, self.item_precision = model.modalities, config.train.precision
        prepare_backbone(towers, config)
        item = item_parameters(towers, config)
        self.item, self.gradient_clip = item, config.train.gradient_clip
        compact = {f"compact.{name}": parameter for name, parameter in self.named.items()}
        groups = [*self._groups(compact), {"params": list(item.values()), "lr": item_rate(config)}]
        self._optimise({**compact, **item}, groups, self.config.weight_decay)
        self._computed_at = torch.zeros(len(catalog), dtype=torch.int64, device=self.device)
        self._refreshed_at: int | None = None
        self._fresh, self._vectors = np.zeros(0, dtype=np.int64), self.content[:0]

    @torch.no_grad()
    def refresh(self) -> float:
        """Compute the whole table anew; returns the mean 1 - cosine of old and new vectors, 0 the first time."""
        self.towers.eval()
        share = self._share(np.arange(len(self.catalog)))
        parts = [share[i : i + _ROWS_PER_PASS] for i in range(0, len(share), _ROWS_PER_PASS)]
        vectors = self._gathered([self._read(part) for part in parts])
        moved = 0.0 if self._refreshed_at is None else float(_distance(self.content, vectors))
        self.content.copy_(vectors)
        self._computed_at.fill_(self.step)
        self._refreshed_at = self.step
        return moved

    def validate(self, held_out: HeldOut) -> dict[str, float]:
        """As `CompactTrainer.validate`, on a table computed anew; with `table_staleness` of the one before."""
        moved = self.refresh()
        figures = super().validate(held_out)
        return {**figures, "table_staleness": moved} if figures else {}

    def restore(self, position: dict[str, int], tensors: dict[str, Tensor]) -> None:
        super().restore(position, tensors)
        self._refreshed_at = None

    def _backward(self, windows: Sequence[np.ndarray]) -> Tensor:
        if self._refreshed_at is None or self.step - self._refreshed_at >= self.settings.refresh_every_steps:
            self.refresh()
        self._staleness = self._renew(windows)
        return super()._backward(windows)

    def _row(self, found: list[float], norm: float) -> dict[str, float]:
        return self._staleness

    @torch.no_grad()
    def _renew(self, windows: Sequence[np.ndarray]) -> dict[str, float]:
        """Encode items of the step's histories and write them into the table, on all workers alike."""
        rng = np.random.default_rng([self.seed, 6, self.step])
        present = np.unique(np.concatenate([rows_of(window) for window in windows]))
        count = min(len(present), self.settings.fresh_items_per_step)
        self._fresh = np.sort(rng.choice(present, count, replace=False))
        mine, size = self._share(self._fresh), self.settings.micro_batch_items
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        self._cache = GradCache(lambda i, _: self._encoded(parts[i], i), [(i, True) for i in range(len(parts))])
        vectors = self._gathered(self._cache.vectors())
        rows = torch.from_numpy(self._fresh).to(self.device)
        staleness = {
            "staleness": float(_distance(self.content[rows], vectors)),
            "age_steps": float((self.step - self._computed_at[rows]).float().mean()),
            "fresh_share": count / len(present),
        }
        self.content[rows] = vectors
        self._computed_at[rows] = self.step
        self._vectors = vectors.requires_grad_()
        return staleness

    def _content_at(self, items: Tensor) -> Tensor:
        """Rows (U, C) of the table; those that are fresh carry the gradient to `_vectors`."""
        place = torch.full_like(self._computed_at, -1)
        place[torch.from_numpy(self._fresh).to(self.device)] = torch.arange(len(self._fresh), device=self.device)
        at = place[items]
        content, fresh = self.content[items], at >= 0
        content[fresh] = self._vectors[at[fresh]]
        return content

    def _join_gradients(self) -> None:
        """Send the item tower what the losses of all workers say of the fresh vectors, each its share of the items."""
        gradient = self._vectors.grad
        gradient = all_reduced_rows(torch.zeros_like(self._vectors) if gradient is None else gradient)
        mine = self._share(np.arange(len(self._fresh)))
        self._cache.send(gradient[torch.from_numpy(mine).to(self.device)])
        super()._join_gradients()

    def _clip(self) -> Tensor:
        return clip_gradients(self.item.values(), self.gradient_clip)

    def _encoded(self, rows: np.ndarray, index: int) -> Tensor:
        """Content vectors (U, C) in training, the same dropout each time a step asks for micro-batch `index`."""
        reseed(seed_of([self.seed, 7, self.step, self.rank, index]), self.device)
        self.towers.train()
        return self._read(rows)

    def _read(self, rows: np.ndarray) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.item_precision == "bf16"):
            return self.towers.item_vectors(self.catalog.items(rows, self.modalities).to(self.device)).float()

    def _share(self, rows: np.ndarray) -> np.ndarray:
        return np.array_split(rows, self.world_size)[self.rank]

    def _gathered(self, parts: list[Tensor]) -> Tensor:
        """The vectors of all workers, in the order of the rows that they shared."""
        return gather_with_gradient(torch.cat([self.content[:0], *parts]))[0]


def item_parameters(towers: DualTower, config: Config) -> dict[str, nn.Parameter]:
    """What the item tower learns with, by name: its head and the backbone, or adapters, but for frozen vision."""
    choose_trainable(towers, config)
    own = ("backbone.", "item_proj.")
    return {n: p for n, p in towers.named_parameters() if p.requires_grad and n.startswith(own)}


def item_rate(config: Config) -> float:
    """Peak rate of the item tower: of pretrained encoders a usual one for adapters, or for all weights of such models
    (BERT, Devlin et al. 2019), unless `train.joint.item_learning_rate` says another."""
    given = config.train.joint.item_learning_rate
    if given is not None:
        return given
    if config.model.text_encoder is None:
        return 1e-4
    return 2e-4 if config.model.lora.enabled else 2e-5


def _as_sequence(config: Config) -> SequenceConfig:
    """train.compact with what train.joint says otherwise; the table follows the last weights, so no mean of them."""
    joint, compact = config.train.joint, config.train.compact
    slower, content = joint.learning_rate / compact.learning_rate, compact.content_learning_rate
    return dataclasses.replace(
        compact,
        epochs=joint.epochs,
        max_steps=None,
        validate_every_steps=None,
        learning_rate=joint.learning_rate,
        content_learning_rate=None if content is None else content * slower,
        id_learning_rate=compact.id_learning_rate * slower,
        warmup_steps=joint.warmup_steps,
        validate_every_epochs=joint.validate_every_epochs,
        patience=joint.patience,
        averaging=0.0,
    )


def _distance(old: Tensor, new: Tensor) -> Tensor:
    """Mean 1 - cosine of the rows of two tables; a row of zeros, an item without content, stays where it is."""
    return (F.normalize(old, dim=1) - F.normalize(new, dim=1)).square().sum(1).mean() / 2
