"""What frozen encoders made of pictures and texts, computed once, stored beside the data set, and found by hash.

A store is a folder named by the fingerprint of what made it (`pixrec.model.vision`, `pixrec.model.texts`). In it the
tokens of a picture are found by the hash of its bytes, the vector of a text by that of its tokens. So neither a new
encoder nor a new picture can meet stale tokens: they are not found, and the picture itself is read. Tokens are kept as
float16. Knows files and hashes; knows no encoder.

Whoever makes tokens writes them, as parts (`pixrec.data.rows`) that `parts/` lists. `index_parts` makes the parts one
data set and writes which row of it holds which picture: sorted hashes, 24 bytes a picture, which readers map.
`tokens.json` marks a store as whole, and names the data sets whose pictures are all in it.

Shapes: P pictures · K tokens of a picture · X numbers of a picture token.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pixrec import storage
from pixrec.config import ModelConfig
from pixrec.data.items import ItemTable
from pixrec.data.pictures import HASH_BYTES, picture_hash
from pixrec.data.rows import Rows, publish, write_rows
from pixrec.errors import ArtifactError, InputError

HASH, TOKENS = "picture", "tokens"
_MARKER, _INDEX, _PARTS, _HASHES = "tokens.json", "index.json", "parts", "hashes"
_CURE = "remove it, it will be made again"


class StoredPictures:
    """Which pictures a store has and in which of its rows, found by bisection."""

    def __init__(self, columns: np.ndarray) -> None:
        """columns: (3, P) uint64 as `sort_hashes` gives them, usually mapped."""
        self._first, self._second, self._rows = columns

    def __len__(self) -> int:
        return len(self._rows)

    def hash_of(self, picture: bytes) -> bytes | None:
        """The hash of a picture that is there; None for another."""
        found = picture_hash(picture)
        return None if self.place(found) is None else found

    def place(self, picture: bytes) -> int | None:
        """The row of the picture of this hash in the store; None where it is not there."""
        first, second = np.frombuffer(picture, np.uint64)
        at = int(np.searchsorted(self._first, first))
        while at < len(self) and self._first[at] == first:  # more than once for 1 picture in 10^12 at most
            if self._second[at] == second:
                return int(self._rows[at])
            at += 1
        return None

    def not_in(self, others: Sequence[StoredPictures]) -> int:
        """How many of the pictures none of the others has."""
        hashes = zip(self._first, self._second, strict=True)
        names = (np.array(pair).tobytes() for pair in hashes)
        return sum(all(other.place(name) is None for other in others) for name in names)


def sort_hashes(hashes: bytes) -> np.ndarray:
    """(3, P) uint64, sorted: both halves of each distinct hash, and the row where it stands first in `hashes`."""
    words = np.frombuffer(hashes, np.uint64).reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(words[order], axis=0) != 0).any(axis=1)
    return np.stack([*words[order[new]].T, order[new].astype(np.uint64)])


class PictureTokens:
    """Stores that are open: picture bytes to their tokens, which stay where they lie until asked for. Goes to other
    processes as their places, and is opened there."""

    def __init__(self, folders: Sequence[str], shape: tuple[int, int]) -> None:
        """folders: whole stores; shape: K, X; -1 where K differs from picture to picture."""
        self._folders, self._shape = list(folders), shape
        self._stores = []
        for folder in folders:
            facts = _index_facts(folder)
            rows = Rows(folder, _CURE, facts["version"])
            self._stores.append((_mapped(folder, facts["hashes"], facts["pictures"]), rows))

    def __reduce__(self) -> tuple[type[PictureTokens], tuple[list[str], tuple[int, int]]]:
        return PictureTokens, (self._folders, self._shape)

    def __len__(self) -> int:
        pictures = [pictures for pictures, _ in self._stores]
        return sum(store.not_in(pictures[:at]) if at else len(store) for at, store in enumerate(pictures))

    def hold(self, items: ItemTable) -> bool:
        """Whether the tokens of every picture of `items` are here."""
        pictures = (items.image(row) for row in range(len(items)))
        return all(picture is None or self._find(picture_hash(picture)) for picture in pictures)

    def of(self, picture: bytes) -> np.ndarray | None:
        """(K, X) float16; None for a picture that is not here."""
        return self.of_hashes([picture_hash(picture)])[0]

    def of_hash(self, picture: bytes) -> np.ndarray | None:
        """As `of`, by the picture's hash."""
        return self.of_hashes([picture])[0]

    def of_hashes(self, pictures: Sequence[bytes | None]) -> list[np.ndarray | None]:
        """As `of`, by the hashes of many pictures, which are read together; None for no picture."""
        found: list[np.ndarray | None] = [None] * len(pictures)
        places = [None if picture is None else self._find(picture) for picture in pictures]
        for store, (_, rows) in enumerate(self._stores):
            wanted = [at for at, place in enumerate(places) if place is not None and place[0] == store]
            taken = rows.take([places[at][1] for at in wanted], TOKENS)  # type: ignore[index]
            for at, of_picture in zip(wanted, taken, strict=True):
                found[at] = of_picture.values.to_numpy(zero_copy_only=False).reshape(self._shape)
        return found

    def _find(self, picture: bytes) -> tuple[int, int] | None:
        """The store that has the picture of this hash, and the row there."""
        for store, (pictures, _) in enumerate(self._stores):
            place = pictures.place(picture)
            if place is not None:
                return store, place
        return None


def store_folder(place: str, fingerprint: str) -> str:
    """Where below `place` the tokens of that vision part lie."""
    return storage.join(place, fingerprint)


def write_part(folder: str, rows: pa.Table) -> None:
    """Add rows of `encode_pictures` to a store, which may be in use; they are seen after `index_parts`.

    The name tells what is in it, so that two runs at a time do not write one part over the other's.
    """
    if rows.num_rows:
        name = picture_hash(b"".join(rows.column(HASH).to_pylist())).hex()
        storage.write_json(storage.join(folder, _PARTS, f"{name}.json"), write_rows(folder, rows))


def store_schema(shape: tuple[int, int]) -> pa.Schema:
    """The columns of a store: `picture` (hash), `tokens` (K·X float16)."""
    tokens, width = shape
    kind = pa.large_list(pa.float16()) if tokens < 0 else pa.list_(pa.float16(), tokens * width)
    return pa.schema([(HASH, pa.binary(HASH_BYTES)), (TOKENS, kind)])


def index_parts(folder: str, schema: pa.Schema) -> int:
    """Make all parts that are there one data set, and index it; the answer is the number of pictures.

    Holds 80 bytes a picture meanwhile. Raises ArtifactError where a part is damaged.
    """
    parts = storage.read_files(storage.list_files(storage.join(folder, _PARTS), ".json"))
    files = [file for part in parts if part is not None for file in json.loads(part)]
    version = publish(folder, files, schema)
    hashes = Rows(folder, _CURE, version).column(HASH)
    columns = sort_hashes(b"".join(_bytes_of(chunk) for chunk in hashes.chunks))
    sink = io.BytesIO()
    np.save(sink, columns)
    name = f"{_HASHES}-{picture_hash(sink.getvalue()).hex()}.npy"  # an older one may be in use
    storage.write_bytes(storage.join(folder, name), sink.getvalue())
    facts = {"pictures": columns.shape[1], "version": version, "hashes": name}
    storage.write_json(storage.join(folder, _INDEX), facts)
    return columns.shape[1]


def _bytes_of(hashes: pa.FixedSizeBinaryArray) -> memoryview:
    return memoryview(hashes.buffers()[1])[HASH_BYTES * hashes.offset : HASH_BYTES * (hashes.offset + len(hashes))]


def complete_store(folder: str, schema: pa.Schema, data: Sequence[str] = ()) -> None:
    """Index a store and mark it as whole; without the mark it is not read.

    data: fingerprints of data sets of which every picture is in it, beside those that it names already.
    """
    known = {*data, *covered(folder)}
    pictures = index_parts(folder, schema)
    storage.write_json(storage.join(folder, _MARKER), {"pictures": pictures, "data": sorted(known)})


def covered(folder: str) -> list[str]:
    """Fingerprints of the data sets of which every picture is in the store; none where it is not whole."""
    marker = storage.join(folder, _MARKER)
    return storage.read_json(marker, ["data"])["data"] if storage.exists(marker) else []


def whole_store(folder: str) -> str | None:
    """The folder; None where no whole store lies there."""
    return folder if storage.exists(storage.join(folder, _MARKER)) else None


def open_folders(folders: Sequence[str], shape: tuple[int, int]) -> PictureTokens | None:
    """The stores in these folders as one; None where one of them is not whole. `shape` as `PictureTokens` takes it."""
    if not all(map(whole_store, folders)):
        return None
    tokens = PictureTokens(folders, shape)
    for folder, (_, rows) in zip(folders, tokens._stores, strict=True):
        if rows.schema != store_schema(shape):
            raise ArtifactError(f"{folder} is damaged: its tokens are not {shape[0]} of {shape[1]} numbers; {_CURE}")
    return tokens


def stored_pictures(folder: str) -> StoredPictures:
    """Which pictures the store in `folder` has, as of the last `index_parts`."""
    if not storage.exists(storage.join(folder, _INDEX)):
        return StoredPictures(np.empty((3, 0), np.uint64))
    facts = _index_facts(folder)
    return _mapped(folder, facts["hashes"], facts["pictures"])


def _index_facts(folder: str) -> dict[str, Any]:
    return storage.read_json(storage.join(folder, _INDEX), ["pictures", "version", "hashes"])


@lru_cache(maxsize=4)
def _mapped(folder: str, hashes: str, pictures: int) -> StoredPictures:
    """The index of a store; from s3:// it is copied to local disk, once a process."""
    file = storage.join(folder, hashes)
    try:
        if not storage.is_remote(file):
            columns = np.load(storage.absolute(file), mmap_mode="r")
        else:
            with tempfile.NamedTemporaryFile(prefix="pixrec-") as local:  # gone from the disk with the array
                with storage.open_stream(file) as stream:
                    shutil.copyfileobj(stream, local)
                local.flush()
                columns = np.load(local.name, mmap_mode="r")
    except (OSError, ValueError, EOFError, InputError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{file} is damaged: {reason}; remove its folder, it will be made again") from None
    if columns.shape != (3, pictures):
        raise ArtifactError(f"{file} is damaged: it does not fit {_INDEX}; remove its folder, it will be made again")
    return StoredPictures(columns)


def tokens_place(data: str, model: ModelConfig, where: str | None) -> str | None:
    """Where the picture tokens of a data set are kept; None where there are none to keep.

    `where` is what a config's `picture_tokens` says: a folder, `auto` or None.
    """
    if model.learns_vision or model.modalities == "text" or where is None:
        return None
    return f"{data.rstrip('/')}.tokens" if where == "auto" else where


def texts_place(data: str, model: ModelConfig, where: str | None) -> str | None:
    """Where the texts' vectors of a data set are kept, beside its picture tokens; None where there are none to keep.
    `where` as `tokens_place` takes it."""
    if model.text_encoder is None or model.modalities == "image" or where is None:
        return None
    return f"{data.rstrip('/')}.tokens" if where == "auto" else where
