"""The picture tokens of a frozen vision part, computed once for each picture, stored, and read in place of pixels.

A store is a folder named by the fingerprint of all that makes picture tokens: vision weights, pixel statistics, size,
decoder. In it a picture is found by the hash of its bytes. So neither a new vision part nor a new picture can meet
stale tokens: they are not found. Tokens are kept as float16, so vectors differ from the uncached path's by rounding:
cosines by less than 1e-3.

Shapes: P pictures · K tokens a picture · W width of the language model · S side in pixels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from pixrec import storage
from pixrec.config import Config
from pixrec.data.images import DECODER, decode_image
from pixrec.data.items import ItemTable
from pixrec.model.backbone import Backbone

HASH, TOKENS = "picture", "tokens"
_MARKER, _HASHES, _TOKENS = "tokens.json", ".hashes", ".npy"
_HASH_BYTES = 16
_LARGEST = float(np.finfo(np.float16).max)


class PictureTokens:
    """A store that is open: picture bytes to their tokens. On a local disk the tokens stay there until asked for."""

    def __init__(self, parts: Sequence[tuple[list[bytes], np.ndarray]]) -> None:
        self._parts = [tokens for _, tokens in parts]
        self._place = {h: (part, row) for part, (hashes, _) in enumerate(parts) for row, h in enumerate(hashes)}

    def __len__(self) -> int:
        return len(self._place)

    def hold(self, items: ItemTable) -> bool:
        """Whether the tokens of every picture of `items` are here: a batch is read one way or the other."""
        pictures = (items.image(row) for row in range(len(items)))
        return all(picture is None or picture_hash(picture) in self._place for picture in pictures)

    def of(self, picture: bytes) -> np.ndarray | None:
        """(K, W) float32, or None for a picture that is not here."""
        place = self._place.get(picture_hash(picture))
        return None if place is None else self._parts[place[0]][place[1]].astype(np.float32)


def vision_fingerprint(backbone: Backbone) -> str:
    """Hash of everything that the picture tokens follow from."""
    family = backbone.family
    digest = hashlib.blake2b(digest_size=16)
    facts = (type(family).__name__, family.image_size_px, family.tokens_per_picture, DECODER)
    digest.update(repr(facts).encode())
    for tensor in (backbone.pixel_mean, backbone.pixel_std, *family.vision_parameters(backbone.model)):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def picture_hash(picture: bytes) -> bytes:
    return hashlib.blake2b(picture, digest_size=_HASH_BYTES).digest()


def encode_pictures(backbone: Backbone, pictures: Sequence[bytes]) -> pa.Table:
    """Rows of a store for stored pictures: `picture` (hash), `tokens` (K·W float16). Equal pictures give one row."""
    distinct = {picture_hash(p): p for p in pictures}
    size, device = backbone.family.image_size_px, backbone.pixel_mean.device
    pixels = np.stack([decode_image(p, size) for p in distinct.values()])
    with torch.no_grad():
        tokens = backbone.picture_tokens(torch.from_numpy(pixels).to(device)).float().cpu().numpy()
    flat = np.clip(tokens, -_LARGEST, _LARGEST).astype(np.float16).reshape(len(distinct), -1)
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    return pa.table({HASH: pa.array(list(distinct), pa.binary(_HASH_BYTES)), TOKENS: values})


def store_folder(place: str, fingerprint: str) -> str:
    """Where below `place` the tokens of that vision part lie."""
    return storage.join(place, fingerprint)


def write_part(folder: str, number: int, rows: pa.Table, tokens_per_picture: int) -> None:
    """Add rows of `encode_pictures` to a store."""
    flat = rows.column(TOKENS).combine_chunks().flatten().to_numpy()
    sink = io.BytesIO()
    np.save(sink, flat.reshape(rows.num_rows, tokens_per_picture, -1))
    part = storage.join(folder, f"part-{number:06d}")
    storage.write_bytes(f"{part}{_HASHES}", b"".join(rows.column(HASH).to_pylist()))
    storage.write_bytes(f"{part}{_TOKENS}", sink.getvalue())


def complete_store(folder: str, pictures: int) -> None:
    """Mark a store as whole; without the mark it is not read."""
    storage.write_json(storage.join(folder, _MARKER), {"pictures": pictures})


def open_store(place: str, backbone: Backbone) -> PictureTokens | None:
    """The tokens that exactly this vision part made; None where no complete store of it lies at `place`.

    On s3:// all of them are read into memory.
    """
    folder = store_folder(place, vision_fingerprint(backbone))
    if not storage.exists(storage.join(folder, _MARKER)):
        return None
    parts = []
    for file in storage.list_files(folder, _TOKENS):
        joined = storage.read_bytes(f"{file.removesuffix(_TOKENS)}{_HASHES}")
        hashes = [joined[i : i + _HASH_BYTES] for i in range(0, len(joined), _HASH_BYTES)]
        remote = storage.is_remote(file)
        tokens = np.load(io.BytesIO(storage.read_bytes(file))) if remote else np.load(file, mmap_mode="r")
        parts.append((hashes, tokens))
    return PictureTokens(parts)


def tokens_place(data: str, config: Config) -> str | None:
    """Where the picture tokens of a data set are kept; None where there are none to keep."""
    place = config.train.picture_tokens
    if not config.model.freeze_vision or config.model.modalities == "text" or place is None:
        return None
    return f"{data.rstrip('/')}.tokens" if place == "auto" else place


def find_tokens(data: str, config: Config, backbone: Backbone) -> PictureTokens | None:
    """The store of a data set that fits a model, where there is one."""
    place = tokens_place(data, config)
    return None if place is None else open_store(place, backbone)
