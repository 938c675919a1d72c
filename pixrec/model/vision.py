"""The picture tokens of a frozen vision part, computed once for each picture, stored, and read in place of pixels.

A store is a folder named by the fingerprint of all that makes picture tokens: vision weights, pixel statistics, size,
decoder. In it a picture is found by the hash of its bytes. So neither a new vision part nor a new picture can meet
stale tokens: they are not found, and the picture itself is read. Tokens are kept as float16, so vectors differ from
the uncached path's by rounding: cosines by less than 1e-3.

Shapes: P pictures · K tokens a picture · X numbers of a picture token · S side in pixels.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from pixrec import storage
from pixrec.config import Config, ModelConfig
from pixrec.data.images import DECODER, decode_image
from pixrec.data.items import ItemTable
from pixrec.errors import ArtifactError, InputError
from pixrec.model.backbone import Backbone

HASH, TOKENS = "picture", "tokens"
_MARKER, _HASHES, _TOKENS = "tokens.json", ".hashes", ".npy"
_HASH_BYTES = 16
_LARGEST = float(np.finfo(np.float16).max)


class StoredPictures:
    """Which pictures a store has, found by bisection: 24 bytes a picture."""

    def __init__(self, hashes: bytes) -> None:
        """hashes: those of all pictures, one behind the other."""
        words = np.frombuffer(hashes, np.uint64).reshape(-1, 2)
        order = np.argsort(words[:, 0], kind="stable")
        new = np.ones(len(order), dtype=bool)  # a picture that is there twice counts once
        new[1:] = (np.diff(words[order], axis=0) != 0).any(axis=1)
        self._order = order[new]
        self._first, self._second = words[self._order].T.copy()

    def __len__(self) -> int:
        return len(self._order)

    def hash_of(self, picture: bytes) -> bytes | None:
        """The hash of a picture that is there; None for another."""
        found = picture_hash(picture)
        return None if self.place(found) is None else found

    def place(self, picture: bytes) -> int | None:
        """Where the picture of this hash stands in the store; None where it is not there."""
        first, second = np.frombuffer(picture, np.uint64)
        at = int(np.searchsorted(self._first, first))
        if at == len(self) or self._first[at] != first or self._second[at] != second:
            return None
        return int(self._order[at])


class PictureTokens:
    """A store that is open: picture bytes to their tokens, which stay on disk until asked for."""

    def __init__(self, pictures: StoredPictures, parts: Sequence[np.ndarray]) -> None:
        """parts: tokens (P, K, X) of the pictures, in order."""
        self._pictures, self._parts = pictures, parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return len(self._pictures)

    def hold(self, items: ItemTable) -> bool:
        """Whether the tokens of every picture of `items` are here."""
        pictures = (items.image(row) for row in range(len(items)))
        return all(picture is None or self._pictures.hash_of(picture) is not None for picture in pictures)

    def of(self, picture: bytes) -> np.ndarray | None:
        """(K, X) float16, read from disk where it is used; None for a picture that is not here."""
        return self.of_hash(picture_hash(picture))

    def of_hash(self, picture: bytes) -> np.ndarray | None:
        """As `of`, by the picture's hash."""
        place = self._pictures.place(picture)
        if place is None:
            return None
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._parts[part][place - self._starts[part]]


def vision_fingerprint(backbone: Backbone) -> str:
    """Hash of everything that the picture tokens follow from."""
    family = backbone.family
    digest = hashlib.blake2b(digest_size=16)
    size = (family.image_size_px, family.tokens_per_picture)
    computed_in = () if backbone.dtype == torch.float32 else (backbone.dtype,)
    digest.update(repr((type(family).__name__, *size, DECODER, *family.vision_settings, *computed_in)).encode())
    for tensor in (backbone.pixel_mean, backbone.pixel_std, *family.vision_parameters(backbone.model)):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def picture_hash(picture: bytes) -> bytes:
    return hashlib.blake2b(picture, digest_size=_HASH_BYTES).digest()


def encode_pictures(backbone: Backbone, pictures: Sequence[bytes]) -> pa.Table:
    """Rows of a store for stored pictures: `picture` (hash), `tokens` (K·X float16). Equal pictures give one row."""
    distinct = {picture_hash(p): p for p in pictures}
    size, device = backbone.family.image_size_px, backbone.pixel_mean.device
    pixels = np.stack([decode_image(p, size) for p in distinct.values()])
    with torch.no_grad():
        tokens = backbone.picture_tokens(torch.from_numpy(pixels).to(device)).float().cpu().numpy()
    flat = np.clip(tokens, -_LARGEST, _LARGEST).astype(np.float16).reshape(len(distinct), -1)
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    return pa.table({HASH: pa.array(list(distinct), pa.binary(_HASH_BYTES)), TOKENS: values})


def no_rows(backbone: Backbone) -> pa.Table:
    """What `encode_pictures` gives for no picture at all."""
    numbers = backbone.family.tokens_per_picture * backbone.family.picture_width
    return pa.schema([(HASH, pa.binary(_HASH_BYTES)), (TOKENS, pa.list_(pa.float16(), numbers))]).empty_table()


def store_folder(place: str, fingerprint: str) -> str:
    """Where below `place` the tokens of that vision part lie."""
    return storage.join(place, fingerprint)


def write_part(folder: str, number: int, rows: pa.Table, tokens_per_picture: int) -> None:
    """Add rows of `encode_pictures` to a store, which may be in use; a part is there once its hashes are.

    The name tells what is in it, so that two runs at a time do not write one part over the other's.
    """
    if not rows.num_rows:
        return
    flat = rows.column(TOKENS).combine_chunks().flatten().to_numpy()
    sink = io.BytesIO()
    np.save(sink, flat.reshape(rows.num_rows, tokens_per_picture, -1))
    hashes = b"".join(rows.column(HASH).to_pylist())
    part = storage.join(folder, f"part-{number:06d}-{picture_hash(hashes).hex()}")
    storage.write_bytes(f"{part}{_TOKENS}", sink.getvalue())
    storage.write_bytes(f"{part}{_HASHES}", hashes)


def complete_store(folder: str, pictures: int) -> None:
    """Mark a store as whole, with `pictures` in it; without the mark it is not read."""
    storage.write_json(storage.join(folder, _MARKER), {"pictures": pictures})


def fitting_store(place: str, backbone: Backbone) -> str | None:
    """The folder of the tokens that exactly this vision part made; None where no complete one lies at `place`."""
    folder = store_folder(place, vision_fingerprint(backbone))
    return folder if storage.exists(storage.join(folder, _MARKER)) else None


def open_store(place: str, backbone: Backbone) -> PictureTokens | None:
    """The tokens in `fitting_store`, open. From s3:// they are copied to local disk, for as long as they are in use.

    Raises ArtifactError when the store is damaged.
    """
    return open_stores([place], backbone)


def open_stores(places: Sequence[str], backbone: Backbone) -> PictureTokens | None:
    """As `open_store`, several stores as one; None where one of them is lacking."""
    hashes: list[bytes] = []
    parts: list[np.ndarray] = []
    for place in places:
        folder = fitting_store(place, backbone)
        if folder is None:
            return None
        shape = (backbone.family.tokens_per_picture, backbone.family.picture_width)
        files = storage.list_files(folder, _HASHES)
        of_parts = [storage.read_bytes(file) for file in files]
        tokens = [_tokens(f"{file.removesuffix(_HASHES)}{_TOKENS}") for file in files]
        if [part.shape for part in tokens] != [(len(h) // _HASH_BYTES, *shape) for h in of_parts]:
            raise ArtifactError(f"{folder} is damaged: its parts do not fit together; remove it, it will be made again")
        hashes, parts = hashes + of_parts, parts + tokens
    return PictureTokens(StoredPictures(b"".join(hashes)), parts)


def stored_pictures(folder: str) -> StoredPictures:
    """Which pictures the store in `folder` has."""
    return StoredPictures(b"".join(storage.read_bytes(file) for file in storage.list_files(folder, _HASHES)))


def _tokens(file: str) -> np.ndarray:
    """The array in a file, read as it is used."""
    try:
        if not storage.is_remote(file):
            return np.load(storage.absolute(file), mmap_mode="r")
        with tempfile.NamedTemporaryFile(prefix="pixrec-") as local:  # the disk has it back once the array is gone
            with storage.open_stream(file) as stream:
                shutil.copyfileobj(stream, local)
            local.flush()
            return np.load(local.name, mmap_mode="r")
    except (OSError, ValueError, EOFError, InputError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{file} is damaged: {reason}; remove its folder, it will be made again") from None


def tokens_place(data: str, model: ModelConfig, where: str | None) -> str | None:
    """Where the picture tokens of a data set are kept; None where there are none to keep.

    `where` is what a config's `picture_tokens` says: a folder, `auto` or None.
    """
    if not model.freeze_vision or model.modalities == "text" or where is None:
        return None
    return f"{data.rstrip('/')}.tokens" if where == "auto" else where


def find_tokens(data: str | Sequence[str], config: Config, backbone: Backbone) -> PictureTokens | None:
    """The store of a data set, or of several together, that fits a model, where there is one. `config` is the model's
    own."""
    sets = [data] if isinstance(data, str) else data
    places = [tokens_place(uri, config.model, config.train.picture_tokens) for uri in sets]
    known = [place for place in places if place is not None]
    return open_stores(known, backbone) if known and len(known) == len(places) else None
