"""Pictures and texts of a data set through frozen parts of a model in Ray Data, stored for all who come after."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import pyarrow as pa
import ray
import ray.data
import torch

from pixrec import storage
from pixrec.artifact import Model, load_model, untrained_model
from pixrec.artifact.decoding import read_pictures
from pixrec.config import Config, dump_config, load_config
from pixrec.data.items import PICTURES_FOLDER, ItemTable
from pixrec.data.pictures import open_pictures
from pixrec.data.sequences import DATASET_MARKER
from pixrec.data.tokens import (
    complete_store,
    covered,
    index_parts,
    store_folder,
    stored_pictures,
    texts_place,
    tokens_place,
    write_part,
)
from pixrec.model.backbone import Backbone
from pixrec.model.encoders import DualEncoder, text_key
from pixrec.model.texts import encode_texts, text_fingerprint, text_schema
from pixrec.model.vision import encode_pictures, token_schema, vision_fingerprint
from pixrec.schema import IMAGE, ITEM_ID, ITEMS, TEXT_FIELDS

_PART_BYTES = 64 * 1024**2  # of tokens, about
_TEXTS_PER_PART = 2048


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
        return _in_actor(self._settings, self._vocabulary).tower.backbone


class TextEncoder:
    """One actor: stores the vectors of those texts that the store lacks. Builds the model, whose tokenizer names them.

    Usable without Ray.
    """

    def __init__(self, config: str, vocabulary: Sequence[str], folder: str) -> None:
        """As `PictureEncoder`."""
        self._settings, self._vocabulary, self._folder = load_config(config), vocabulary, folder
        self._stored = stored_pictures(folder)

    def __call__(self, files: pa.Table) -> pa.Table:
        """Parts of the store from the prepared items in each `file`; the receipt says how many `texts` are new."""
        count = 0
        for file in files.column("file").to_pylist():
            for rows in storage.stream_table(file, [ITEM_ID, *TEXT_FIELDS], _TEXTS_PER_PART):
                items = ItemTable(rows)
                count += self._store([items.text(row) for row in range(len(items))])
        return pa.table({"texts": [count]})

    def _store(self, texts: Sequence[str]) -> int:
        tokens = {text_key(ids): ids for ids in self._model.encoder.tokenize(texts) if len(ids)}
        new = sorted((ids for key, ids in tokens.items() if self._stored.place(key) is None), key=len)
        size, backbone = self._settings.embed.batch_size, cast(DualEncoder, self._model.tower.backbone)
        parts = [encode_texts(backbone, new[start : start + size]) for start in range(0, len(new), size)]
        if parts:
            write_part(self._folder, pa.concat_tables(parts))
        return len(new)

    @functools.cached_property
    def _model(self) -> Model:
        return _in_actor(self._settings, self._vocabulary)


def _in_actor(config: Config, vocabulary: Sequence[str]) -> Model:
    torch.set_num_threads(config.embed.threads_per_actor)
    device = "cuda" if config.embed.gpus_per_actor and torch.cuda.is_available() else "cpu"
    return _first_model(config, vocabulary, device)


def _first_model(config: Config, vocabulary: Sequence[str], device: str = "cpu") -> Model:
    """The model that training begins with, as far as its frozen parts go: encoders may have been tuned before."""
    if config.train.start is not None and config.model.text_encoder is not None:
        return load_model(config.train.start, device)
    return untrained_model(config, vocabulary, device)


def frozen_once(data: str, config: Config, vocabulary: Sequence[str] = ()) -> None:
    """Add what frozen parts of the model make of the data set's pictures and texts to its store, as far as it lacks
    them; a killed run's share is there already.

    The frozen parts are those of the model that training begins with, and stay so. `vocabulary`: the data sets whose
    text trains the tokenizer of `pixrec-tiny`, on which its weights depend; by default this one alone. Neither pictures
    nor texts nor what is made of them come to the driver.
    """
    vocabulary = list(vocabulary) or [storage.absolute(data)]
    where = config.train.picture_tokens
    pictures, texts = tokens_place(data, config.model, where), texts_place(data, config.model, where)
    if pictures is None and texts is None:
        return
    backbone, settings = _first_model(config, vocabulary).tower.backbone, config.embed
    if pictures is not None:
        family = backbone.family
        part = _PART_BYTES // (2 * family.tokens_per_picture * family.picture_width) // settings.batch_size
        uri = storage.absolute(storage.join(data, PICTURES_FOLDER))
        rows = ray.data.range(len(open_pictures(uri))).map_batches(
            functools.partial(read_pictures, uri=uri), batch_size=settings.batch_size, batch_format="pyarrow"
        )
        folder, size = store_folder(pictures, vision_fingerprint(backbone)), settings.batch_size * min(max(part, 1), 16)
        _fill(folder, token_schema(backbone), data, rows, PictureEncoder, size, config, vocabulary)
    if texts is not None and isinstance(backbone, DualEncoder):
        files = [{"file": storage.absolute(file)} for file in storage.table_files(storage.join(data, ITEMS))]
        rows = ray.data.from_items(files, override_num_blocks=len(files))
        folder = store_folder(texts, text_fingerprint(backbone))
        _fill(folder, text_schema(backbone), data, rows, TextEncoder, 1, config, vocabulary)


def _fill(
    folder: str,
    schema: pa.Schema,
    data: str,
    rows: ray.data.Dataset,
    encoder: type[PictureEncoder] | type[TextEncoder],
    batch_size: int,
    config: Config,
    vocabulary: Sequence[str],
) -> None:
    """Have actors of `encoder` store what is lacking of `rows`, unless the store names the data set as covered."""
    folder, settings = storage.absolute(folder), config.embed
    fingerprint = storage.read_json(storage.join(data, DATASET_MARKER), ["fingerprint"])["fingerprint"]
    if fingerprint in covered(folder):
        return
    on_worker = ray.remote(num_cpus=settings.cpus_per_actor)
    ray.get(on_worker(index_parts).remote(folder, schema))  # what a killed run has stored
    receipts = rows.map_batches(
        encoder,
        fn_constructor_args=(dump_config(config), vocabulary, folder),
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=settings.num_actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor or None,
    )
    for _ in receipts.iter_batches(batch_format="pyarrow", batch_size=None):
        pass
    ray.get(on_worker(complete_store).remote(folder, schema, [fingerprint]))
