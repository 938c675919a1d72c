"""Vision once: the pictures of a data set through a frozen vision part in Ray Data, stored for all who come after."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pyarrow as pa
import ray
import ray.data
import torch

from pixrec import storage
from pixrec.artifact import untrained_model
from pixrec.config import Config, dump_config, load_config
from pixrec.data.items import PICTURES_FOLDER
from pixrec.data.pictures import open_pictures
from pixrec.data.sequences import DATASET_MARKER
from pixrec.model.backbone import Backbone
from pixrec.model.vision import (
    complete_store,
    covered,
    encode_pictures,
    index_parts,
    store_folder,
    stored_pictures,
    token_schema,
    tokens_place,
    vision_fingerprint,
    write_part,
)
from pixrec.schema import IMAGE

_PART_BYTES = 64 * 1024**2  # of tokens, about


class PictureEncoder:
    """One actor: stores the tokens of those pictures that the store lacks. Builds the model at the first of them.

    Usable without Ray.
    """

    def __init__(self, config: str, vocabulary: Sequence[str], folder: str) -> None:
        """folder: the store, of which the pictures that it had at its last indexing are passed over."""
        self._settings, self._vocabulary, self._folder = load_config(config), vocabulary, folder
        self._stored = stored_pictures(folder)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One part of the store from a block of prepared items; the receipt says how many `pictures` are new in it."""
        pictures = (picture.as_py() for picture in block.column(IMAGE) if picture.is_valid)
        new = list(dict.fromkeys(picture for picture in pictures if self._stored.hash_of(picture) is None))
        size = self._settings.embed.batch_size
        parts = [encode_pictures(self._backbone, new[start : start + size]) for start in range(0, len(new), size)]
        if parts:
            write_part(self._folder, pa.concat_tables(parts))
        return pa.table({"pictures": [len(new)]})

    @functools.cached_property
    def _backbone(self) -> Backbone:
        torch.set_num_threads(self._settings.embed.threads_per_actor)
        device = "cuda" if self._settings.embed.gpus_per_actor and torch.cuda.is_available() else "cpu"
        return untrained_model(self._settings, self._vocabulary, device).tower.backbone


def _read(rows: pa.Table, *, uri: str) -> pa.Table:
    return pa.table({IMAGE: pa.array(open_pictures(uri).read(rows.column("id").to_numpy()), pa.binary())})


def vision_once(data: str, config: Config, vocabulary: Sequence[str] = ()) -> None:
    """Add those of the data set's pictures to their store that it lacks; a killed run's share is there already.

    The vision part is that of the untrained model: frozen, it stays so. `vocabulary`: the data sets whose text trains
    the tokenizer of `pixrec-tiny`, on which its weights depend; by default this one alone. Neither pictures nor
    tokens come to the driver.
    """
    vocabulary = list(vocabulary) or [storage.absolute(data)]
    place = tokens_place(data, config.model, config.train.picture_tokens)
    if place is None:
        return
    backbone = untrained_model(config, vocabulary).tower.backbone
    folder = storage.absolute(store_folder(place, vision_fingerprint(backbone)))
    fingerprint = storage.read_json(storage.join(data, DATASET_MARKER), ["fingerprint"])["fingerprint"]
    if fingerprint in covered(folder):
        return
    schema, settings = token_schema(backbone), config.embed
    on_worker = ray.remote(num_cpus=settings.cpus_per_actor)
    ray.get(on_worker(index_parts).remote(folder, schema))  # what a killed run has stored
    part_pictures = _PART_BYTES // (2 * backbone.family.tokens_per_picture * backbone.family.picture_width)
    uri = storage.absolute(storage.join(data, PICTURES_FOLDER))
    pictures = ray.data.range(len(open_pictures(uri))).map_batches(
        functools.partial(_read, uri=uri), batch_size=settings.batch_size, batch_format="pyarrow"
    )
    receipts = pictures.map_batches(
        PictureEncoder,
        fn_constructor_args=(dump_config(config), vocabulary, folder),
        batch_size=settings.batch_size * min(max(part_pictures // settings.batch_size, 1), 16),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=settings.num_actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor or None,
    )
    for _ in receipts.iter_batches(batch_format="pyarrow", batch_size=None):
        pass
    ray.get(on_worker(complete_store).remote(folder, schema, [fingerprint]))
