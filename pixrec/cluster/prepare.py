"""From raw tables to a prepared data set.

Ids and events are columns in the driver's memory (200 bytes an event at the peak, measured: 100 million want 20 GB).
Rows of items, with their pictures, never are: they are cut into slices, and every slice is read, decoded and written
by a worker to a file of its own that carries the slice's number. So the items keep their order, and a slice that is
tried twice replaces its file and doubles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pixrec import __version__, errors, storage
from pixrec.config import PrepareConfig, to_dict
from pixrec.data import tables
from pixrec.data.images import load_picture
from pixrec.data.sequences import DATASET_MARKER, ITEMS_FOLDER, REJECTS_FOLDER, SEQUENCES_FOLDER
from pixrec.schema import (
    IMAGE,
    IMAGE_URI,
    IMAGES,
    ITEM_ID,
    MISSING,
    OK,
    RATING,
    REASON,
    REJECTED,
    REJECTS,
    SOURCE,
    TIMESTAMP,
    USER_ID,
)

Progress = Callable[[str, int, int | None], None]

KIND = "data set"
# A slice reads its row group up to its own rows, so a group is cut into no more than 64 slices, unless a slice would
# then hold more than 4096 pictures (20 KB each at 256 px) or more than 64 MiB of input.
_SLICES_PER_GROUP, _ROWS_LEAST, _ROWS_MOST, _BYTES_MOST = 64, 128, 4096, 64 * 1024**2


def prepare(
    items_uri: str | None, interactions_uri: str, out_uri: str, config: PrepareConfig, progress: Progress
) -> dict[str, Any]:
    """Make the prepared data set `out_uri` and return the content of its dataset.json.

    Everything that can be wrong with the tables is found before Ray is started. Local URIs, and the pictures' paths,
    must be the same on every node. Raises InputError, OutputError.
    """
    storage.check_writable(out_uri, DATASET_MARKER, KIND)
    files = _item_files(items_uri)
    usable, catalog = _read_tables(items_uri, files, interactions_uri, config, progress)
    kept = tables.core(usable.interactions, config.min_user_events, config.min_item_events)
    split = tables.split_block(kept.timestamp, config)

    with storage.staged_folder(out_uri, DATASET_MARKER, KIND) as staging:
        staging = storage.absolute(staging)  # workers have another working directory
        tables_rejected = pa.concat_tables([catalog.rejects, usable.rejects])
        storage.write_table(_table_rejects(staging), tables_rejected)
        if items_uri is None:
            parts = [_write_bare_items(catalog.item_ids, staging)]
        else:
            parts = sorted(_prepare_slices(_slices(files), staging, config, progress), key=lambda part: part["number"])
        _drop_partial_files(staging)
        hashes = [part["hash"] for part in parts]
        progress("writing sequences", 0, None)
        for number, table in enumerate(tables.sequences(kept)):
            hashes.append(storage.write_table(_part(staging, SEQUENCES_FOLDER, number), table))
        info = {
            "pixrec_version": __version__,
            "fingerprint": _fingerprint(config, hashes),
            **_counts(catalog, usable, kept, parts),
            "rejects": _count_rejects(staging),
            "split": split,
            "inputs": {"items": items_uri, "interactions": interactions_uri},
            "config": to_dict(config),
        }
        check_counts(info)
        storage.write_json(storage.join(staging, DATASET_MARKER), info)
    return info


def check_counts(info: dict[str, Any]) -> None:
    """Assert that what was read is what was kept plus what was left out, for items, pictures and events."""
    items, images, events = info["items"], info["images"], info["interactions"]
    assert items["read"] == items["kept"] + items["rejected"], items
    assert items["kept"] == sum(images.values()), (items, images)
    assert events["read"] == sum(events[name] for name in events if name != "read"), events
    assert 0 < info["users"] <= events["kept"], info["users"]


def _counts(
    catalog: tables.CheckedIds, usable: tables.Usable, kept: tables.Interactions, parts: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "items": {
            "read": len(catalog.item_ids) + len(catalog.rejects),
            "kept": sum(part["items"] for part in parts),
            "rejected": len(catalog.rejects),
        },
        "images": {status: sum(part[status] for part in parts) for status in (OK, MISSING, REJECTED)},
        "interactions": {
            "read": len(usable.interactions) + usable.filtered_rating + len(usable.rejects),
            "kept": len(kept),
            "rejected": len(usable.rejects),
            "filtered_rating": usable.filtered_rating,
            "filtered_kcore": len(usable.interactions) - len(kept),
        },
        "users": len(np.unique(kept.user)),
    }


def _item_files(items_uri: str | None) -> list[str]:
    files = [storage.absolute(file) for file in storage.table_files(items_uri)] if items_uri is not None else []
    for file in files:
        tables.check_items_schema(storage.read_schema(file), file)
    return files


def _read_tables(
    items_uri: str | None, files: list[str], interactions_uri: str, config: PrepareConfig, progress: Progress
) -> tuple[tables.Usable, tables.CheckedIds]:
    for file in storage.table_files(interactions_uri):
        tables.check_interactions_schema(storage.read_schema(file), file, min_rating=config.min_rating)
    known = None
    if items_uri is not None:
        progress("reading items", 0, None)
        known = tables.check_item_ids(storage.read_table(items_uri, [ITEM_ID]).column(ITEM_ID), items_uri)
    progress("reading interactions", 0, None)
    columns = [USER_ID, ITEM_ID, TIMESTAMP] + [RATING] * (config.min_rating is not None)
    usable = tables.usable_interactions(
        storage.read_table(interactions_uri, columns),
        known.item_ids if known else None,
        interactions_uri,
        min_rating=config.min_rating,
    )
    return usable, known or tables.CheckedIds(usable.interactions.item_ids, REJECTS.empty_table())


@dataclass(frozen=True)
class _Slice:
    """Rows `start` to `stop` of a row group of an items file; `number` counts the slices in input order."""

    number: int
    file: str
    group: int
    start: int
    stop: int


def _slices(files: list[str]) -> list[_Slice]:
    slices: list[_Slice] = []
    for file in files:
        for group, (rows, num_bytes) in enumerate(storage.row_groups(file)):
            step = min(max(-(-rows // _SLICES_PER_GROUP), _ROWS_LEAST), _ROWS_MOST)
            step = max(min(step, _BYTES_MOST * rows // max(num_bytes, 1)), 1)
            for start in range(0, rows, step):
                slices.append(_Slice(len(slices), file, group, start, min(start + step, rows)))
    return slices


def _prepare_slices(
    slices: list[_Slice], staging: str, config: PrepareConfig, progress: Progress
) -> Iterator[dict[str, Any]]:
    """What `prepare_slice` says of each slice, in any order; on Ray when there are pictures to decode."""
    names = {name for file in {piece.file for piece in slices} for name in storage.read_schema(file).names}
    work = functools.partial(prepare_slice, staging=staging, config=config)
    results = _on_ray(work, slices, config) if names & {IMAGE, IMAGE_URI} else (work(asdict(piece)) for piece in slices)
    done, total = 0, sum(piece.stop - piece.start for piece in slices)
    progress("preparing items", done, total)
    for result in results:
        done += slices[result["number"]].stop - slices[result["number"]].start
        progress("preparing items", done, total)
        yield result


def _on_ray(
    work: Callable[[dict[str, Any]], dict[str, Any]], slices: list[_Slice], config: PrepareConfig
) -> Iterator[dict[str, Any]]:
    import ray

    from pixrec.cluster.session import connect

    with connect():
        data = ray.data.from_items([asdict(piece) for piece in slices], override_num_blocks=len(slices))
        answers = data.map(functools.partial(_answer, work=work), num_cpus=config.num_cpus_per_task)
        for row in answers.iter_rows():
            answer = json.loads(row["answer"])
            if "error" in answer:
                raise getattr(errors, answer["error"])(answer["message"])
            yield answer


def _answer(row: dict[str, Any], *, work: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, str]:
    """An error of ours travels as a value: Ray would hand the driver a traceback in its place."""
    try:
        answer = work(row)
    except errors.PixRecError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    return {"answer": json.dumps(answer)}


def prepare_slice(row: dict[str, Any], *, staging: str, config: PrepareConfig) -> dict[str, Any]:
    """Read one slice (the fields of `_Slice`), store its pictures, write its items and its rejected pictures.

    The answer counts `items` and pictures by status, and holds the `hash` of the file written.
    """
    piece = _Slice(**row)
    table = tables.with_id(storage.read_rows(piece.file, piece.group, piece.start, piece.stop))
    folder = storage.parent(piece.file)
    pictures = [
        load_picture(
            data,
            uri,
            folder,
            config.image_size_px,
            max_bytes=config.max_image_bytes,
            max_pixels=config.max_image_pixels,
        )
        for data, uri in zip(_values(table, IMAGE), _values(table, IMAGE_URI), strict=True)
    ]
    statuses = [picture.status for picture in pictures]
    items = tables.prepared_items(table, [picture.data for picture in pictures], statuses)
    faults = [(key, picture.reason) for key, picture in zip(_values(items, ITEM_ID), pictures, strict=True)]
    keys, reasons = [key for key, reason in faults if reason], [reason for _, reason in faults if reason]
    if not storage.exists(_table_rejects(staging)):  # written first; gone with the folder of a run that failed
        raise errors.OutputError(f"{staging} is gone: the run that made it has ended; start it again")
    if keys:
        rejected = tables.rejects(IMAGES, keys, reasons)
        storage.write_table(storage.join(staging, REJECTS_FOLDER, f"images-{piece.number:06d}.parquet"), rejected)
    return {
        "number": piece.number,
        "items": len(items),
        "hash": storage.write_table(_part(staging, ITEMS_FOLDER, piece.number), items),
        **{status: statuses.count(status) for status in (OK, MISSING, REJECTED)},
    }


def _write_bare_items(item_ids: pa.Array, staging: str) -> dict[str, Any]:
    """The catalog of an interactions table alone: ids, with no text and no pictures."""
    count = len(item_ids)
    items = tables.prepared_items(pa.table({ITEM_ID: item_ids}), [None] * count, [MISSING] * count)
    digest = storage.write_table(_part(staging, ITEMS_FOLDER, 0), items)
    return {"number": 0, "items": count, "hash": digest, OK: 0, MISSING: count, REJECTED: 0}


def _values(table: pa.Table, name: str) -> Iterator[Any]:
    """A column's values one by one; Nones where the table lacks it."""
    if name not in table.column_names:
        return itertools.repeat(None, len(table))
    return (value.as_py() for value in table.column(name))


def _part(staging: str, folder: str, number: int) -> str:
    return storage.join(staging, folder, f"part-{number:06d}.parquet")


def _table_rejects(staging: str) -> str:
    return storage.join(staging, REJECTS_FOLDER, "tables.parquet")


def _drop_partial_files(staging: str) -> None:
    """A worker that was killed while it wrote leaves a part of a file under another name."""
    for file in storage.list_files(staging):
        if not file.endswith(".parquet"):
            storage.remove(file)


def _count_rejects(staging: str) -> dict[str, int]:
    """How many rejects each `<source>: <reason>` has, most frequent first."""
    table = storage.read_table(storage.join(staging, REJECTS_FOLDER), [SOURCE, REASON])
    counted = Counter(zip(table.column(SOURCE).to_pylist(), table.column(REASON).to_pylist(), strict=True))
    return {f"{source}: {reason}": count for (source, reason), count in counted.most_common()}


def _fingerprint(config: PrepareConfig, hashes: list[str]) -> str:
    """Hash of what was written and of the settings behind it; how many CPUs a task claims changes nothing."""
    settings = {name: value for name, value in to_dict(config).items() if name != "num_cpus_per_task"}
    return hashlib.blake2b(json.dumps([settings, hashes]).encode(), digest_size=16).hexdigest()
