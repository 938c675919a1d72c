"""Vision once: the pictures of a data set through a frozen vision part in Ray Data, stored for all who come after."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import cast

import pyarrow as pa
import ray.data
import torch

from pixrec import storage
from pixrec.artifact import untrained_model
from pixrec.config import Config, dump_config, load_config
from pixrec.data.items import PICTURES_FOLDER, load_items
from pixrec.data.pictures import open_pictures
from pixrec.model.vision import (
    complete_store,
    encode_pictures,
    no_rows,
    open_store,
    store_folder,
    stored_pictures,
    tokens_place,
    vision_fingerprint,
    write_part,
)
from pixrec.schema import IMAGE


class PictureEncoder:
    """One actor: builds the model once, turns blocks of prepared items into rows of the store. Usable without Ray."""

    def __init__(self, config: str, vocabulary: Sequence[str], folder: str) -> None:
        """folder: the store, whose pictures are passed over."""
        settings = load_config(config)
        torch.set_num_threads(settings.embed.threads_per_actor)
        device = "cuda" if settings.embed.gpus_per_actor and torch.cuda.is_available() else "cpu"
        self._backbone = untrained_model(settings, vocabulary, device).tower.backbone
        self._stored = stored_pictures(folder)

    def __call__(self, block: pa.Table) -> pa.Table:
        pictures = [picture for picture in block.column(IMAGE).to_pylist() if picture is not None]
        new = [picture for picture in pictures if self._stored.hash_of(picture) is None]
        return encode_pictures(self._backbone, new) if new else no_rows(self._backbone)


def _read(rows: pa.Table, *, uri: str) -> pa.Table:
    return pa.table({IMAGE: pa.array(open_pictures(uri).read(rows.column("id").to_numpy()), pa.binary())})


def vision_once(data: str, config: Config, vocabulary: Sequence[str] = ()) -> None:
    """Add those of the data set's pictures to their store that it lacks; a killed run's share is there already.

    The vision part is that of the untrained model: frozen, it stays so. `vocabulary`: the data sets whose text trains
    the tokenizer of `pixrec-tiny`, on which its weights depend; by default this one alone.
    """
    vocabulary = list(vocabulary) or [storage.absolute(data)]
    place = tokens_place(data, config.model, config.train.picture_tokens)
    if place is None:
        return
    backbone = untrained_model(config, vocabulary).tower.backbone
    store = open_store(place, backbone)
    if store is not None and store.hold(load_items(data)):
        return
    folder = store_folder(place, vision_fingerprint(backbone))
    settings = config.embed
    uri = storage.absolute(storage.join(data, PICTURES_FOLDER))
    pictures = ray.data.range(len(open_pictures(uri))).map_batches(
        functools.partial(_read, uri=uri), batch_size=settings.batch_size, batch_format="pyarrow"
    )
    tokens = pictures.map_batches(
        PictureEncoder,
        fn_constructor_args=(dump_config(config), vocabulary, storage.absolute(folder)),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=settings.num_actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor or None,
    )
    blocks = cast(Iterable[pa.Table], tokens.iter_batches(batch_format="pyarrow", batch_size=None))
    for number, block in enumerate(blocks):
        write_part(folder, number, block, backbone.family.tokens_per_picture)
    complete_store(folder, len(stored_pictures(folder)))
