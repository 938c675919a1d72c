"""The picture tokens of a frozen vision part: what names them, how they are made, and the stores that fit a model.

They are computed once for each picture and read in place of pixels (`pixrec.data.tokens`). The fingerprint is of all
that makes picture tokens: vision weights, pixel statistics, size, decoder. Tokens are kept as float16, so vectors
differ from the uncached path's by rounding: cosines by less than 1e-3.

Shapes: P pictures · K tokens of a picture · X numbers of a picture token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from pixrec.config import Config
from pixrec.data.images import DECODER, decode_picture
from pixrec.data.pictures import HASH_BYTES, picture_hash
from pixrec.data.tokens import (
    TOKENS,
    PictureTokens,
    open_folders,
    store_folder,
    store_schema,
    tokens_place,
    whole_store,
)
from pixrec.model.backbone import Backbone
from pixrec.model.encoding import cut_into_tiles

_FORMAT = 2  # 1: a .npy and a .hashes a part
_LARGEST = float(np.finfo(np.float16).max)


def vision_fingerprint(backbone: Backbone) -> str:
    """Hash of everything that the picture tokens follow from, and of how they are stored."""
    family = backbone.family
    digest = hashlib.blake2b(digest_size=16)
    size = (family.picture_size, family.tokens_per_picture)
    computed_in = () if backbone.dtype == torch.float32 else (backbone.dtype,)
    described = (_FORMAT, type(family).__name__, *size, DECODER, *family.vision_settings, *computed_in)
    digest.update(repr(described).encode())
    for tensor in (backbone.pixel_mean, backbone.pixel_std, *family.token_parameters(backbone.model)):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode_pictures(backbone: Backbone, pictures: Sequence[bytes]) -> pa.Table:
    """Rows of a store for stored pictures, as `token_schema` says. Equal pictures give one row."""
    distinct = {picture_hash(p): p for p in pictures}
    family = backbone.family
    pixels = [decode_picture(picture, family.picture_size) for picture in distinct.values()]
    tiles, grid = cut_into_tiles(pixels, family.tile_px)
    with torch.no_grad():
        tokens = backbone.picture_tokens(tiles.to(backbone.pixel_mean.device), grid).float().cpu()
    flat = np.clip(tokens.numpy(), -_LARGEST, _LARGEST).astype(np.float16).ravel()
    ends = grid.prod(1).cumsum(0).numpy() * family.tokens_per_tile * family.picture_width
    values = pa.LargeListArray.from_arrays(pa.array([0, *ends], pa.int64()), pa.array(flat))
    schema = token_schema(backbone)
    return pa.table([pa.array(list(distinct), pa.binary(HASH_BYTES)), values.cast(schema.field(TOKENS).type)], schema)


def token_schema(backbone: Backbone) -> pa.Schema:
    """The columns of this vision part's store."""
    return store_schema(_shape(backbone))


def _shape(backbone: Backbone) -> tuple[int, int]:
    """K, X; -1 where K differs from picture to picture."""
    family = backbone.family
    return (family.tokens_per_picture if isinstance(family.picture_size, int) else -1), family.picture_width


def fitting_store(place: str, backbone: Backbone) -> str | None:
    """The folder of the tokens that exactly this vision part made; None where no complete one lies at `place`."""
    return whole_store(store_folder(place, vision_fingerprint(backbone)))


def open_store(place: str, backbone: Backbone) -> PictureTokens | None:
    """The tokens in `fitting_store`, open. Raises ArtifactError when the store is damaged."""
    return open_stores([place], backbone)


def open_stores(places: Sequence[str], backbone: Backbone) -> PictureTokens | None:
    """As `open_store`, several stores as one; None where one of them is lacking."""
    return open_folders([store_folder(place, vision_fingerprint(backbone)) for place in places], _shape(backbone))


def find_tokens(data: str | Sequence[str], config: Config, backbone: Backbone) -> PictureTokens | None:
    """The store of a data set, or of several together, that fits a model, where there is one. `config` is the model's
    own."""
    sets = [data] if isinstance(data, str) else data
    places = [tokens_place(uri, config.model, config.train.picture_tokens) for uri in sets]
    known = [place for place in places if place is not None]
    return open_stores(known, backbone) if known and len(known) == len(places) else None
