"""Vision once: the pictures of a data set through a frozen vision part in Ray Data, stored for all who come after."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import pyarrow as pa
import ray.data
import torch

from pixrec import storage
from pixrec.artifact import new_model
from pixrec.config import Config, dump_config, load_config
from pixrec.data.sequences import Dataset, load_dataset
from pixrec.model.backbone import Backbone
from pixrec.model.vision import (
    HASH,
    TOKENS,
    complete_store,
    encode_pictures,
    open_store,
    store_folder,
    tokens_place,
    vision_fingerprint,
    write_part,
)
from pixrec.schema import IMAGE, ITEMS


class PictureEncoder:
    """One actor: builds the model once, turns blocks of prepared items into rows of the store. Usable without Ray."""

    def __init__(self, config: str, data: str) -> None:
        settings = load_config(config)
        torch.set_num_threads(settings.embed.threads_per_actor)
        device = "cuda" if settings.embed.gpus_per_actor and torch.cuda.is_available() else "cpu"
        self._backbone = untrained_backbone(settings, load_dataset(data), device)

    def __call__(self, block: pa.Table) -> pa.Table:
        pictures = [picture for picture in block.column(IMAGE).to_pylist() if picture is not None]
        return encode_pictures(self._backbone, pictures) if pictures else self._nothing()

    def _nothing(self) -> pa.Table:
        width = self._backbone.family.tokens_per_picture * self._backbone.width
        return pa.schema([(HASH, pa.binary(16)), (TOKENS, pa.list_(pa.float16(), width))]).empty_table()


def untrained_backbone(config: Config, dataset: Dataset, device: str = "cpu") -> Backbone:
    """The backbone as training finds it: a frozen vision part stays so."""
    return new_model(config, [dataset.items.text(row) for row in range(len(dataset.items))], device).tower.backbone


def vision_once(data: str, config: Config) -> None:
    """Fill the store of the data set's pictures, unless one of this vision part holds them all."""
    place = tokens_place(data, config)
    if place is None:
        return
    dataset = load_dataset(data)
    backbone = untrained_backbone(config, dataset)
    store = open_store(place, backbone)
    if store is not None and store.hold(dataset.items):
        return
    folder = store_folder(place, vision_fingerprint(backbone))
    storage.remove(folder)  # unmarked or not enough
    settings = config.embed
    filesystem, path = storage.arrow_location(storage.join(data, ITEMS))
    tokens = ray.data.read_parquet(path, filesystem=filesystem, columns=[IMAGE]).map_batches(
        PictureEncoder,
        fn_constructor_args=(dump_config(config), storage.absolute(data)),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=settings.num_actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor or None,
    )
    rows = 0
    blocks = cast(Iterable[pa.Table], tokens.iter_batches(batch_format="pyarrow", batch_size=None))
    for number, block in enumerate(blocks):
        write_part(folder, number, block, backbone.family.tokens_per_picture)
        rows += block.num_rows
    complete_store(folder, rows)
