"""What the workers of batch embedding do with a model: embed what `pixrec.artifact.decoding` has decoded.

Usable without Ray; Arrow tables in, Arrow tables out.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from pixrec import storage
from pixrec.artifact.decoding import FAULT, HEIGHT, PIXELS, REJECTED_PICTURE, TEXT, TOKENS_OF, receipt
from pixrec.artifact.model import load_model
from pixrec.artifact.stored import item_keys, to_table
from pixrec.artifact.unfinished import Unfinished
from pixrec.config import EmbedConfig
from pixrec.data.tokens import PictureTokens
from pixrec.errors import ArtifactError, PixRecError, fault_text, raise_fault
from pixrec.model.catalog import Embedder
from pixrec.model.encoders import EncoderTower
from pixrec.model.encoding import Content
from pixrec.model.texts import open_texts
from pixrec.model.vision import fitting_store, open_store
from pixrec.schema import CONTENT_HASH, ITEM_ID


def find_store(model: str, place: str) -> dict[str, str | None]:
    """The `store` below `place` that holds what this model's vision part makes of pictures; `fault` as elsewhere."""
    try:
        return {"store": fitting_store(place, load_model(model).tower.backbone), "fault": None}
    except PixRecError as error:
        return {"store": None, "fault": fault_text(error)}


class ItemEmbedder:
    """One actor: loads the model once, turns blocks of decoded items into stored parts."""

    def __init__(
        self,
        model: str,
        config: EmbedConfig,
        unfinished: Unfinished,
        tokens: str | None = None,
        texts: str | None = None,
    ) -> None:
        """tokens: the store that `decode_items` looked into; texts: the place below which vectors of texts may lie."""
        self._model, self._config, self._unfinished = model, config, unfinished
        self._store, self._texts = tokens, texts

    def __call__(self, block: pa.Table) -> pa.Table:
        """Embed and store U decoded items; the receipt says `part`, `keys` (16 bytes an item, in the part's order),
        how many `pictures` were seen, how many of them `stored` as tokens and how many `rejected`, and the `fault`
        where there is one instead."""
        try:
            for fault in block.column(FAULT).drop_null().to_pylist():
                raise_fault(fault)
            return receipt(**self._stored(block), fault=None)
        except PixRecError as error:
            return receipt(part="", keys=b"", pictures=0, stored=0, rejected=0, fault=fault_text(error))

    def _stored(self, block: pa.Table) -> dict[str, object]:
        name = self._unfinished.start(len(block))
        item_ids, hashes = block.column(ITEM_ID).to_pylist(), block.column(CONTENT_HASH).to_pylist()
        stored = block.column(TOKENS_OF).is_valid().to_numpy()
        has_image = block.column(PIXELS).is_valid().to_numpy() | stored
        vectors, content = self.vectors(block)
        part = self._unfinished.finish(name, to_table(item_ids, vectors, hashes, has_image, "float32", content))
        return {
            "part": part,
            "keys": b"".join(item_keys(item_ids, hashes).to_pylist()),
            "pictures": int(has_image.sum()),
            "stored": int(stored.sum()),
            "rejected": sum(block.column(REJECTED_PICTURE).to_pylist()),
        }

    def vectors(self, block: pa.Table) -> tuple[np.ndarray, np.ndarray | None]:
        """Item vectors (U, D) of decoded items, and what a search compares (U, C) where that is something else; items
        of like length share a forward pass, so little is padding."""
        texts, item_ids = block.column(TEXT).to_pylist(), block.column(ITEM_ID).to_pylist()
        pictures = self._pictures(block)
        order = sorted(range(len(texts)), key=lambda row: (pictures[row] is not None, len(texts[row])))
        batches = []
        for start in range(0, len(order), self._config.batch_size):
            rows = order[start : start + self._config.batch_size]
            batches.append(([Content(texts[row], pictures[row]) for row in rows], [item_ids[row] for row in rows]))
        made, place = list(self._embedder.content_batches(batches)), np.argsort(order)
        content = [searched for _, searched in made if searched is not None]
        vectors = np.concatenate([of_batch for of_batch, _ in made])
        return vectors[place], np.concatenate(content)[place] if content else None

    def _pictures(self, block: pa.Table) -> list[np.ndarray | None]:
        """Of each item what `Content` takes: pixels (height, width, 3), stored tokens (K, X), or nothing."""
        hashes = block.column(TOKENS_OF).to_pylist()
        stored = [None] * len(hashes) if self._tokens is None else self._tokens.of_hashes(hashes)
        if any(wanted is not None and tokens is None for wanted, tokens in zip(hashes, stored, strict=True)):
            raise ArtifactError(f"{self._store}: its picture tokens went while they were in use; run it again")
        return [
            np.frombuffer(pixels.as_buffer(), np.uint8).reshape(height.as_py(), -1, 3) if pixels.is_valid else tokens
            for pixels, height, tokens in zip(block.column(PIXELS), block.column(HEIGHT), stored, strict=True)
        ]

    @cached_property
    def _tokens(self) -> PictureTokens | None:
        """Opened for the weights that are loaded here, whatever the store was chosen by."""
        return open_store(storage.parent(self._store), self._embedder.tower.backbone) if self._store else None

    @cached_property
    def _embedder(self) -> Embedder:
        """Loaded at the first block and not before: from there an error of ours reaches the driver."""
        torch.set_num_threads(self._config.threads_per_actor)
        device = "cuda" if self._config.gpus_per_actor and torch.cuda.is_available() else "cpu"
        embedder = load_model(self._model, device).embedder()
        if self._texts is not None and isinstance(embedder.tower, EncoderTower):
            embedder.tower.stored_texts = open_texts([self._texts], embedder.tower.backbone)
        embedder.precision = self._config.precision
        return embedder
