"""The raw Amazon Reviews 2023 files as the two tables: one line of JSON in, one row out.

`meta_<Category>.jsonl[.gz]` becomes items, `<Category>.jsonl[.gz]` interactions. Read and written as streams: what
grows with the files is the set of item ids, and the rejects. A line that cannot be used becomes a reject that names
its file and number, and the rest goes on. Knows no picture and no split.

Y. Hou et al., Bridging Language and Items for Retrieval and Recommendation, 2024 (arXiv 2403.03952).
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from pixrec import storage
from pixrec.console import Progress
from pixrec.data.tables import rejects
from pixrec.data.text import plain_text
from pixrec.errors import InputError
from pixrec.schema import (
    BRAND,
    CATEGORY,
    DESCRIPTION,
    IMAGE_URI,
    INTERACTIONS,
    ITEM_ID,
    ITEMS,
    PRICE,
    RATING,
    REJECTS,
    TIMESTAMP,
    TITLE,
    USER_ID,
)

Row = dict[str, Any]

# Reasons of rejects, `<field> is empty` beside them.
NOT_JSON, TOO_LONG, REPEATED = "not valid JSON", "line too long", "parent_asin occurred before"
BAD_TIMESTAMP = "timestamp is no whole number of milliseconds"

ITEMS_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (ITEM_ID, TITLE, BRAND, CATEGORY, DESCRIPTION)]
    + [(PRICE, pa.float64()), (IMAGE_URI, pa.string()), ("average_rating", pa.float64()), ("rating_number", pa.int64())]
)
EVENTS_SCHEMA = pa.schema(
    [(USER_ID, pa.string()), (ITEM_ID, pa.string()), (TIMESTAMP, pa.int64()), (RATING, pa.float64())]
)

_MAX_LINE_BYTES = 16 * 1024**2
_MAX_MARKUP_CHARACTERS = 20_000  # far beyond what text.py keeps of a description
_ROWS_AT_ONCE = {ITEMS: 2_000, INTERACTIONS: 50_000}
_PICTURE_SIZES = ("hi_res", "large", "thumb")  # about 1500, 500 and 75 px on the longer side
_EXACT = 2**53  # whole numbers below it are what they seem, as floats too
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_GZIP = b"\x1f\x8b"


class Normalised(NamedTuple):
    """Where the two tables lie, and the lines that are in neither."""

    items: str | None
    interactions: str
    rejects: pa.Table


def to_tables(items_uri: str | None, interactions_uri: str, folder: str, progress: Progress) -> Normalised:
    """Write the tables below `folder`. Either URI is a file, or a folder of such files.

    Raises InputError when a file is absent, damaged as a whole, or holds no usable line.
    """
    items = storage.join(folder, "items.parquet") if items_uri is not None else None
    interactions = storage.join(folder, "interactions.parquet")
    rejected = []
    if items_uri is not None and items is not None:
        rejected.append(_convert(items_uri, ITEMS, _Items(), ITEMS_SCHEMA, items, progress))
    rejected.append(_convert(interactions_uri, INTERACTIONS, event_row, EVENTS_SCHEMA, interactions, progress))
    return Normalised(items, interactions, pa.concat_tables(rejected))


class _Fault(Exception):
    """A line that cannot be used; the text is its reason."""


def _convert(
    uri: str, source: str, row_of: Callable[[Row], Row], schema: pa.Schema, target: str, progress: Progress
) -> pa.Table:
    """Write the usable lines of all files at `uri` to the Parquet file `target`; returns the rejects."""
    keys: list[str] = []
    reasons: list[str] = []
    rows: list[Row] = []
    written = 0
    with storage.table_writer(target, schema) as write:
        for file in _files(uri, is_meta=source == ITEMS):
            for number, line in _lines(file):
                try:
                    rows.append(row_of(_parsed(line)))
                except _Fault as fault:
                    keys.append(f"{storage.name(file)} line {number}")
                    reasons.append(str(fault))
                if len(rows) == _ROWS_AT_ONCE[source]:
                    write(pa.Table.from_pylist(rows, schema))
                    written, rows = written + len(rows), []
                    progress(f"reading {source}", written, None)
        write(pa.Table.from_pylist(rows, schema))
    if not written + len(rows):
        what = f"{len(keys)} lines, the first: {reasons[0]}" if keys else "no line"
        raise InputError(f"{uri}: holds nothing usable ({what}); --source amazon2023 wants the raw .jsonl files")
    return rejects(source, keys, reasons) if keys else REJECTS.empty_table()


def _files(uri: str, *, is_meta: bool) -> list[str]:
    if not storage.exists(uri):
        raise InputError(f"{uri}: no such file or folder")
    if not storage.is_folder(uri):
        return [uri]
    files = [file for suffix in (".jsonl", ".jsonl.gz") for file in storage.list_files(uri, suffix)]
    files = sorted(file for file in files if storage.name(file).startswith("meta_") == is_meta)
    if not files:
        wanted = "meta_<Category>.jsonl" if is_meta else "<Category>.jsonl"
        raise InputError(f"{uri}: holds no {wanted} or {wanted}.gz")
    return files


def _lines(uri: str) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number from 1, blank ones left out; None for one of more than 16 MiB."""
    try:
        with storage.open_stream(uri) as raw:
            stream: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(_GZIP) else raw
            number = 0
            while line := stream.readline(_MAX_LINE_BYTES):
                number += 1
                if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while (rest := stream.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    yield number, None
                elif line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{uri}: is damaged ({error}); get it again") from None


def _parsed(line: bytes | None) -> Row:
    if line is None:
        raise _Fault(TOO_LONG)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise _Fault(NOT_JSON) from None
    if not isinstance(value, dict):
        raise _Fault(NOT_JSON)
    return value


class _Items:
    """Lines of a meta file to rows of the items table; an id counts once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, line: Row) -> Row:
        row = item_row(line)
        if row[ITEM_ID] in self._seen:
            raise _Fault(REPEATED)
        self._seen.add(row[ITEM_ID])
        return row


def item_row(line: Row) -> Row:
    """A line of `meta_<Category>.jsonl` as a row of the items table."""
    details = line.get("details")
    details = details if isinstance(details, dict) else {}
    count = _number(line.get("rating_number"))
    return {
        ITEM_ID: _required(line, "parent_asin"),
        TITLE: _text(line.get("title")),
        BRAND: _text(line.get("store")) or _text(details.get("Brand")) or _text(details.get("Manufacturer")),
        CATEGORY: _category(line),
        DESCRIPTION: _text(line.get("description")) or _text(line.get("features")),
        PRICE: price(line.get("price")),
        IMAGE_URI: picture_url(line.get("images")),
        "average_rating": _number(line.get("average_rating")),
        "rating_number": None if count is None or abs(count) >= _EXACT else int(count),
    }


def event_row(line: Row) -> Row:
    """A line of `<Category>.jsonl` as a row of the interactions table."""
    moment = _number(line.get("timestamp"))
    if moment is None or moment != int(moment) or abs(moment) >= _EXACT:
        raise _Fault(BAD_TIMESTAMP)
    return {
        USER_ID: _required(line, "user_id"),
        ITEM_ID: _required(line, "parent_asin"),
        TIMESTAMP: int(moment),
        RATING: _number(line.get("rating")),
    }


def price(value: Any) -> float | None:
    """Dollars: 12.99 of `12.99`, `"$12.99"` and `"from 12.99"`; the lower end of a range; None of `"—"`."""
    if isinstance(value, str):
        found = _NUMBER.search(value)
        value = float(found.group().replace(",", "")) if found and len(found.group()) < 20 else None
    number = _number(value)
    return number if number is not None and number >= 0 else None


def picture_url(images: Any) -> str | None:
    """The URL of the MAIN picture in its best size; where it has none, the best size that any other has."""
    best: tuple[bool, int, int] | None = None
    url = None
    for position, image in enumerate(images if isinstance(images, list) else []):
        for size, name in enumerate(_PICTURE_SIZES):
            value = image.get(name) if isinstance(image, dict) else None
            rank = (not _is_main(image), size, position)
            if isinstance(value, str) and value.strip() and (best is None or rank < best):
                best, url = rank, value.strip()
    return None if url is None else _storable(url)


def _is_main(image: Any) -> bool:
    return isinstance(image, dict) and str(image.get("variant", "")).upper() == "MAIN"


def _category(line: Row) -> str | None:
    """Main category and the path below it, joined with `|` as the tables have it."""
    path = line.get("categories")
    names = [line.get("main_category"), *(path if isinstance(path, list) else [])]
    texts = [(_text(name) or "").replace("|", "/") for name in names]
    return "|".join(dict.fromkeys(text for text in texts if text)) or None


def _text(value: Any) -> str | None:
    """One line without markup, of a string or a list of strings; None when nothing is left."""
    parts = value if isinstance(value, list) else [value]
    joined = " ".join(part for part in parts if isinstance(part, str))
    return _storable(plain_text(joined[:_MAX_MARKUP_CHARACTERS])) or None


def _required(line: Row, name: str) -> str:
    value = line.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _Fault(f"{name} is empty")
    return _storable(value.strip())


def _storable(text: str) -> str:
    """Half a surrogate pair, which JSON can write as an escape, has no place in UTF-8: it becomes `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _number(value: Any) -> float | None:
    """A finite number, also one written as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
