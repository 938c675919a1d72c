"""A catalog of coloured squares, shoppers who walk through it in order, and a model of a few thousand weights.

Everything is deterministic and made in memory in milliseconds; `write_*` put the same things on disk in the formats
that docs/data.md describes, without Ray.
"""

from __future__ import annotations

import colorsys
import copy
import dataclasses
import functools
import hashlib
import importlib.machinery
import io
import json
import os
import sys
import types
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerBase, ViTConfig, ViTModel

import pixrec
from pixrec import storage
from pixrec.artifact import Model, fingerprint, index_version, new_model, save_model, with_compact
from pixrec.cluster.prepare import check_counts
from pixrec.config import (
    CompactConfig,
    Config,
    ModelConfig,
    PrepareConfig,
    TinyConfig,
    TrainConfig,
    dump_config,
    load_config,
    to_dict,
)
from pixrec.data import tokens
from pixrec.data.arrays import write_arrays
from pixrec.data.interactions import split_block
from pixrec.data.items import ItemTable
from pixrec.data.pictures import complete, write_part
from pixrec.data.sequences import (
    DATASET_MARKER,
    FORMAT,
    ITEMS_FOLDER,
    PICTURES_FOLDER,
    REJECTS_FOLDER,
    SEQUENCES_FOLDER,
    Dataset,
    Events,
    Users,
)
from pixrec.model import vision
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import train_tokenizer
from pixrec.model.seeding import seeded
from pixrec.schema import IMAGE, IMAGE_STATUS, MISSING, OK, PREPARED_ITEM_FIELDS, REJECTED, REJECTS, SEQUENCES
from pixrec.scorers import Scorer

NUM_ITEMS, NUM_USERS = 12, 10
_TITLES = ("Square", "Tile", "Patch")
_BRANDS = ("Ann", "Bob")

TINY = Config(
    model=ModelConfig(
        embedding_width=16,
        max_history_items=4,
        max_text_tokens=12,
        compact=CompactConfig(layers=1, max_history_items=6),
        tiny=TinyConfig(
            vocabulary_tokens=400,
            hidden_width=32,
            num_layers=1,
            num_heads=2,
            vision_width=32,
            vision_layers=1,
            image_size_px=32,
            patch_size_px=8,
        ),
    ),
    train=TrainConfig(histories_per_step=4, epochs=2, num_workers=1, validate_every_steps=4),
)


class FixedScorer(Scorer):
    """Gives every user the same scores."""

    def __init__(self, name: str, scores: Sequence[float]) -> None:
        self.name, self._scores = name, torch.tensor(scores, dtype=torch.float32)

    def scores(self, users: Users) -> torch.Tensor:
        return self._scores.expand(len(users.histories), -1)


def users_of(histories: Sequence[np.ndarray]) -> Users:
    """Users with these histories, numbered."""
    return Users([f"u{i}" for i in range(len(histories))], histories)


def tiny_config(**sections: dict[str, Any]) -> Config:
    """TINY with changes: `tiny_config(model={"user_tower": "interleaved"}, train={"epochs": 1})`."""
    return load_config(yaml.safe_dump(sections), base=TINY)


def square(hue: float, size: int = 32, form: str = "JPEG") -> bytes:
    """The bytes of a picture of one colour; `hue` runs from 0 to 1."""
    colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 0.8))
    sink = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(sink, form)
    return sink.getvalue()


def tiny_items(n: int = NUM_ITEMS, *, with_pictures: bool | Container[int] = True) -> ItemTable:
    """`n` items `i00`, `i01`, ... as `prepare` leaves them.

    Three titles and two brands are shared, so only the pictures tell all items apart. `with_pictures` is True, False,
    or the rows that have one.
    """
    shown = [with_pictures if isinstance(with_pictures, bool) else row in with_pictures for row in range(n)]
    columns = {
        "item_id": [f"i{row:02d}" for row in range(n)],
        "title": [_TITLES[row % len(_TITLES)] for row in range(n)],
        "brand": [_BRANDS[row % len(_BRANDS)] for row in range(n)],
        "category": ["Shapes|Flat"] * n,
        "description": [None] * n,
        "price": [10.0 + row % len(_TITLES) for row in range(n)],
        "image": [square(row / n) if show else None for row, show in enumerate(shown)],
        "image_status": [OK if show else MISSING for show in shown],
        "year": [2000 + row for row in range(n)],
    }
    return ItemTable(pa.table(columns, schema=pa.schema([*PREPARED_ITEM_FIELDS, ("year", pa.int64())])))


def tiny_dataset(
    items: ItemTable | None = None,
    *,
    num_users: int = NUM_USERS,
    num_events: int | None = None,
    split: Literal["leave_one_out", "temporal"] = "leave_one_out",
    uri: str = "memory",
) -> Dataset:
    """User u begins at item u and always goes on to the next row, which makes the next item easy to learn.

    Users have `num_events` events each, by default 3 to 6 in turn; one event a second, all users side by side.
    """
    items = items or tiny_items()
    lengths = [num_events or 3 + user % 4 for user in range(num_users)]
    rows = [(user + step) % len(items) for user, length in enumerate(lengths) for step in range(length)]
    times = [1000 * step for length in lengths for step in range(length)]
    events = Events(
        [f"u{user:02d}" for user in range(num_users)],
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array(rows, dtype=np.int32),
        np.array(times, dtype=np.int64),
    )
    return Dataset(uri, items, _info(items, events, PrepareConfig(split=split)), events)


_first_model = functools.cache(new_model)  # never used itself, since tests train and alter what they get


def tiny_model(config: Config | None = None, items: ItemTable | None = None) -> Model:
    """An untrained model whose tokenizer has read the titles of `items`; a compact tower knows the first half."""
    items, config = items or tiny_items(), config or TINY
    first = _first_model(config, tuple(items.text(row) for row in range(len(items))))
    model = dataclasses.replace(first, tower=copy.deepcopy(first.tower))
    if config.model.user_tower == "compact":
        model = with_compact(model, items.item_ids[: len(items) // 2])
    return dataclasses.replace(model, info={"fingerprint": fingerprint(model)})


def write_prepared(folder: str | Path, dataset: Dataset | None = None) -> Dataset:
    """Write `dataset` as a prepared data set; returns it with its new place."""
    uri, dataset = str(folder), dataset or tiny_dataset()
    items, events = dataset.items, dataset.events
    bounds = list(zip(events.offsets[:-1], events.offsets[1:], strict=True))
    ids = np.array(items.item_ids)
    sequences = {
        "user_id": events.user_ids,
        "item_ids": [ids[events.rows[start:end]].tolist() for start, end in bounds],
        "timestamps": [events.timestamps[start:end].tolist() for start, end in bounds],
    }
    part = "part-000000.parquet"
    columns = [name for name in items._table.column_names if name != IMAGE]
    storage.write_table(storage.join(uri, ITEMS_FOLDER, part), items._table.select(columns))
    pictures = storage.join(uri, PICTURES_FOLDER)
    write_part(pictures, 0, [items.image(row) for row in range(len(items))])
    complete(pictures, 1)
    storage.write_table(storage.join(uri, SEQUENCES_FOLDER, part), pa.table(sequences, schema=SEQUENCES))
    storage.write_table(storage.join(uri, REJECTS_FOLDER, "tables.parquet"), REJECTS.empty_table())
    write_arrays(
        uri,
        item_ids=items.item_ids,
        has_image=items.with_image,
        training_count=dataset.training_counts(),
        user_ids=events.user_ids,
        user_offset=events.offsets,
        item_row=events.rows,
        timestamp=events.timestamps,
    )
    storage.write_json(storage.join(uri, DATASET_MARKER), {**dataset.info, "item_parts": [len(items)]})
    return dataclasses.replace(dataset, uri=uri)


def write_model(folder: str | Path, model: Model | None = None) -> Model:
    """Save `model`; returns it with the model.json that was written."""
    model = model or tiny_model()
    return dataclasses.replace(model, info=save_model(str(folder), model, {}))


def job_of(phase: str, start: Path | str, data: str, config: Config) -> dict[str, Any]:
    """What the workers of a phase are given, on top of the model at `start`."""
    return {"phase": phase, "start": str(start), "data": [data], "vocabulary": [], "config": dump_config(config)}


ENCODER_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER_VISION = {**ENCODER_TEXT, "image_size": 32, "patch_size": 16}
ENCODER_STATISTICS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}


def write_tokens(place: str | Path, model: Model, items: ItemTable) -> str:
    """Store what the vision part of `model` makes of the pictures of `items`, in parts of 3; returns the folder."""
    backbone = model.tower.backbone
    folder = tokens.store_folder(str(place), vision.vision_fingerprint(backbone))
    pictures = [picture for row in range(len(items)) if (picture := items.image(row)) is not None]
    for start in range(0, len(pictures), 3):
        tokens.write_part(folder, vision.encode_pictures(backbone, pictures[start : start + 3]))
    tokens.complete_store(folder, vision.token_schema(backbone))
    return folder


def save_encoder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write an encoder as `from_pretrained` reads it."""
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(ENCODER_STATISTICS))
    return str(folder)


def small_encoders(folder: Path) -> dict[str, Any]:
    """Settings of `model` for a small BERT and a small ViT, which are written into `folder`."""
    texts = tiny_items()
    tokenizer = train_tokenizer([texts.text(row) for row in range(len(texts))], 300)
    with seeded(0):
        text = BertModel(
            BertConfig(**ENCODER_TEXT, vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0)
        )
        image = ViTModel(ViTConfig(**ENCODER_VISION), add_pooling_layer=False)
    encoders = {
        "text_encoder": save_encoder(folder / "text", text, tokenizer),
        "image_encoder": save_encoder(folder / "image", image, tokenizer),
    }
    return {**encoders, "user_tower": "compact", "encoder_components": 4, "max_text_tokens": 20}


def fake_efficientnet(patch: pytest.MonkeyPatch) -> None:
    """A package efficientnet-lite-pytorch whose networks have two blocks: pixels to a map of an eighth of their side, 8
    channels deep. Batch norms have statistics of their own."""
    package = types.ModuleType("efficientnet_lite_pytorch")
    package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None)
    package.EfficientNet = _SmallNetwork  # type: ignore[attr-defined]
    patch.setitem(sys.modules, package.__name__, package)


class _SmallBlock(nn.Module):
    def __init__(self, channels: int, out: int, expands: bool) -> None:
        super().__init__()
        inner = 2 * channels if expands else channels
        if expands:
            self._expand_conv, self._bn0 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self._depthwise_conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn1, self._bn2, self._swish = nn.BatchNorm2d(inner), nn.BatchNorm2d(out), nn.ReLU6()

    def forward(self, states: Tensor) -> Tensor:
        if hasattr(self, "_expand_conv"):
            states = self._swish(self._bn0(self._expand_conv(states)))
        states = self._swish(self._bn1(self._depthwise_conv(states)))
        return self._bn2(self._project_conv(states))


class _SmallNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 4, 8, 8, bias=False), nn.BatchNorm2d(4)
        self._blocks = nn.ModuleList([_SmallBlock(4, 6, False), _SmallBlock(6, 8, True)])
        self._conv_head, self._bn1, self._swish = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)

    @classmethod
    def from_name(cls, name: str) -> _SmallNetwork:
        return cls()


class Seen:
    """How many pictures a vision part was shown from now on."""

    def __init__(self, patch: pytest.MonkeyPatch, model: Model) -> None:
        self.pictures = 0
        encode = model.tower.backbone.picture_tokens

        def counted(pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
            self.pictures += len(grid)
            return encode(pixels, grid)

        patch.setattr(model.tower.backbone, "picture_tokens", counted)


def write_index(folder: str | Path, model: Model, dataset: Dataset, *, dtype: str = "float32") -> np.ndarray:
    """Publish the vectors (N, D) of all items of `dataset`, as `pixrec embed` does; returns them."""
    uri, items = str(folder), dataset.items
    vectors, content = model.embedder().items_and_search(Catalog(items, model.encoder), np.arange(len(items)))
    facts = {
        "data": storage.absolute(dataset.uri),
        "data_from_index": os.path.relpath(dataset.uri, uri),
        "data_fingerprint": dataset.info["fingerprint"],
    }
    width = 0 if content is None else content.shape[1]
    with index_version(uri, model.fingerprint, vectors.shape[1], dtype, facts, width) as writer:
        hashes = [items.content_hash(row) for row in range(len(items))]
        writer.add(items.item_ids, vectors, hashes, content=content)
    return vectors


def _info(items: ItemTable, events: Events, config: PrepareConfig) -> dict[str, Any]:
    statuses = [items.fields(row)[IMAGE_STATUS] for row in range(len(items))]
    num_events = len(events.rows)
    info = {
        "format": FORMAT,
        "pixrec_version": pixrec.__version__,
        "fingerprint": hashlib.blake2b(repr((statuses, events)).encode(), digest_size=16).hexdigest(),
        "items": {"read": len(items), "kept": len(items), "rejected": 0},
        "images": {status: statuses.count(status) for status in (OK, MISSING, REJECTED)},
        "interactions": {
            "read": num_events,
            "kept": num_events,
            "rejected": 0,
            "filtered_rating": 0,
            "filtered_kcore": 0,
            "held_out_cold": 0,
        },
        "cold": {"items": 0, "test_targets": 0},
        "users": len(events.user_ids),
        "rejects": {},
        "split": split_block(events.timestamps, config),
        "inputs": {"items": "items.parquet", "interactions": "interactions.parquet"},
        "config": to_dict(config),
    }
    check_counts(info)
    return info
