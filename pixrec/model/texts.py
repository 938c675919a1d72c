"""The vectors of a text encoder that stands still, computed once for each text, stored, and read in place of it.

They lie beside the picture tokens and in a store of the same kind (`pixrec.data.tokens`): a folder named by the
fingerprint of the encoder, in which a text is found by the hash of its tokens. Kept as float16.

Shapes: W numbers of a text's vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch

from pixrec.config import Config
from pixrec.data.pictures import HASH_BYTES
from pixrec.data.tokens import PictureTokens, open_folders, store_folder, store_schema, texts_place
from pixrec.model.backbone import Backbone
from pixrec.model.encoders import DualEncoder, text_key, weights_of


def text_fingerprint(backbone: DualEncoder) -> str:
    """Hash of everything that a text's vector follows from, its tokens aside."""
    digest = hashlib.blake2b(repr(("text", type(backbone.text).__name__, HASH_BYTES)).encode(), digest_size=16)
    for tensor in weights_of(backbone.text, "text").values():
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def text_schema(backbone: DualEncoder) -> pa.Schema:
    """The columns of this encoder's store."""
    return store_schema((1, backbone.text_width))


def encode_texts(backbone: DualEncoder, texts: Iterable[np.ndarray]) -> pa.Table:
    """Rows of a store for texts, each given by its tokens (T,). Equal texts give one row."""
    distinct = {text_key(token_ids): token_ids for token_ids in texts}
    device = backbone.pixel_mean.device
    with torch.no_grad():
        vectors = backbone.texts_of([torch.from_numpy(token_ids).to(device) for token_ids in distinct.values()])
    schema = text_schema(backbone)
    flat = pa.array(vectors.float().cpu().numpy().astype(np.float16).ravel())
    values = pa.FixedSizeListArray.from_arrays(flat, backbone.text_width)
    return pa.table([pa.array(list(distinct), pa.binary(HASH_BYTES)), values], schema)


def find_texts(data: str | Sequence[str], config: Config, backbone: Backbone) -> PictureTokens | None:
    """The vectors of the texts of a data set, or of several together, that fit a model, where there are any. `config`
    is the model's own."""
    sets = [data] if isinstance(data, str) else data
    places = [texts_place(uri, config.model, config.train.picture_tokens) for uri in sets]
    known = [place for place in places if place is not None]
    return open_texts(known, backbone) if known else None


def open_texts(places: Sequence[str], backbone: Backbone) -> PictureTokens | None:
    """The stores of exactly this encoder at all these places, as one; None where one of them is lacking."""
    if not isinstance(backbone, DualEncoder):
        return None
    name = text_fingerprint(backbone)
    return open_folders([store_folder(place, name) for place in places], (1, backbone.text_width))
