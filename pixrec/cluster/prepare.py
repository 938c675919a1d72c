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
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pixrec import __version__, errors, storage
from pixrec.config import PrepareConfig, to_dict
from pixrec.console import Rate
from pixrec.data import amazon2023, interactions, tables
from pixrec.data.fetch import Fetcher, Picture
from pixrec.data.images import DECODER, shrink_image
from pixrec.data.sequences import DATASET_MARKER, ITEMS_FOLDER, REJECTS_FOLDER, SEQUENCES_FOLDER, source_name
from pixrec.schema import (
    IMAGE,
    IMAGE_URI,
    IMAGES,
    INTERACTIONS,
    ITEM_ID,
    ITEMS,
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

Progress = Callable[..., None]  # as Console.progress
Source = Literal["tables", "amazon2023"]

KIND = "data set"
# A slice reads its row group up to its own rows, so a group is cut into no more than 64 slices, unless a slice would
# then hold more than 4096 pictures (20 KB each at 256 px) or more than 64 MiB of input.
_SLICES_PER_GROUP, _ROWS_LEAST, _ROWS_MOST, _BYTES_MOST = 64, 128, 4096, 64 * 1024**2


def prepare(
    items_uri: str | None,
    interactions_uri: str,
    out_uri: str,
    config: PrepareConfig,
    progress: Progress,
    source: Source = "tables",
) -> dict[str, Any]:
    """Make the prepared data set `out_uri` and return the content of its dataset.json.

    Everything that can be wrong with the tables is found before Ray is started. Local URIs, and the pictures' paths,
    must be the same on every node. Raises InputError, OutputError.
    """
    storage.check_writable(out_uri, DATASET_MARKER, KIND)
    inputs = {"source": source, "items": items_uri, "interactions": interactions_uri}
    if source == "tables":
        tables_at = amazon2023.Normalised(items_uri, interactions_uri, REJECTS.empty_table())
        return _prepare(tables_at, inputs, out_uri, config, progress)
    with storage.scratch_folder(storage.absolute(out_uri)) as scratch:
        tables_at = amazon2023.to_tables(items_uri, interactions_uri, scratch, progress)
        return _prepare(tables_at, inputs, out_uri, config, progress)


def _prepare(
    raw: amazon2023.Normalised, inputs: dict[str, Any], out_uri: str, config: PrepareConfig, progress: Progress
) -> dict[str, Any]:
    files = _item_files(raw.items)
    usable, catalog = _read_tables(raw, files, inputs, config, progress)
    # The raw reviews hold some twice, word for word; a table's events are all meant.
    distinct = (
        usable.interactions if inputs["source"] == "tables" else interactions.without_repeats(usable.interactions)
    )
    core = interactions.core(distinct, config.min_user_events, config.min_item_events)
    split = interactions.split_block(core.timestamp, config)
    held_out = interactions.hold_out_items(core, config, split)

    with storage.staged_folder(out_uri, DATASET_MARKER, KIND) as staging:
        staging = storage.absolute(staging)  # workers have another working directory
        tables_rejected = pa.concat_tables([raw.rejects, catalog.rejects, usable.rejects])
        storage.write_table(_table_rejects(staging), tables_rejected)
        if raw.items is None:
            parts = [_write_bare_items(catalog.item_ids, staging)]
        else:
            work = functools.partial(prepare_slice, staging=staging, config=config, cache=_cache(out_uri, config))
            parts = sorted(_prepare_slices(work, _slices(files), config, progress), key=lambda part: part["number"])
        _drop_partial_files(staging)
        hashes = [part["hash"] for part in parts]
        progress("writing sequences", 0, None)
        for number, table in enumerate(interactions.sequences(held_out.interactions)):
            hashes.append(storage.write_table(_part(staging, SEQUENCES_FOLDER, number), table))
        info = {
            "pixrec_version": __version__,
            "decoder": DECODER,
            "name": config.name or source_name(inputs["interactions"]),
            "fingerprint": _fingerprint(config, hashes),
            **_counts(raw, catalog, usable, len(distinct), len(core), held_out, parts),
            "rejects": _count_rejects(staging),
            "split": split,
            "inputs": inputs,
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
    raw: amazon2023.Normalised,
    catalog: tables.CheckedIds,
    usable: interactions.Usable,
    distinct: int,
    core: int,
    held_out: interactions.HeldOutItems,
    parts: list[dict[str, Any]],
) -> dict[str, Any]:
    lines = Counter(raw.rejects.column(SOURCE).to_pylist())
    kept = held_out.interactions
    bad_items, bad_events = lines[ITEMS] + len(catalog.rejects), lines[INTERACTIONS] + len(usable.rejects)
    return {
        "items": {
            "read": len(catalog.item_ids) + bad_items,
            "kept": sum(part["items"] for part in parts),
            "rejected": bad_items,
        },
        "images": {status: sum(part[status] for part in parts) for status in (OK, MISSING, REJECTED)},
        "interactions": {
            "read": len(usable.interactions) + usable.filtered_rating + bad_events,
            "kept": len(kept),
            "rejected": bad_events,
            "filtered_rating": usable.filtered_rating,
            "filtered_repeats": len(usable.interactions) - distinct,
            "filtered_kcore": distinct - core,
            "held_out_cold": core - len(kept),
        },
        "cold": {"items": held_out.items, "test_targets": held_out.test_targets},
        "users": len(np.unique(kept.user)),
    }


def _item_files(items_uri: str | None) -> list[str]:
    files = [storage.absolute(file) for file in storage.table_files(items_uri)] if items_uri is not None else []
    schemas = {file: storage.read_schema(file) for file in files}
    for file, schema in schemas.items():
        tables.check_items_schema(schema, file)
    if items_uri is not None:
        tables.check_items_agree(schemas.values(), items_uri)
    return files


def _read_tables(
    raw: amazon2023.Normalised, files: list[str], inputs: dict[str, Any], config: PrepareConfig, progress: Progress
) -> tuple[interactions.Usable, tables.CheckedIds]:
    """What lies in the tables; errors speak of the places in `inputs`."""
    for file in storage.table_files(raw.interactions):
        tables.check_interactions_schema(storage.read_schema(file), file, min_rating=config.min_rating)
    known = None
    if raw.items is not None:
        progress("reading items", 0, None)
        known = tables.check_item_ids(storage.read_table(raw.items, [ITEM_ID]).column(ITEM_ID), inputs["items"])
    progress("reading interactions", 0, None)
    columns = [USER_ID, ITEM_ID, TIMESTAMP] + [RATING] * (config.min_rating is not None)
    usable = interactions.usable_interactions(
        storage.read_table(raw.interactions, columns),
        known.item_ids if known else None,
        inputs["interactions"],
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
    work: Callable[[dict[str, Any]], dict[str, Any]], slices: list[_Slice], config: PrepareConfig, progress: Progress
) -> Iterator[dict[str, Any]]:
    """What `work`, a `prepare_slice`, says of each slice, in any order; on Ray when there are pictures to decode."""
    names = {name for file in {piece.file for piece in slices} for name in storage.read_schema(file).names}
    results = _on_ray(work, slices, config) if names & {IMAGE, IMAGE_URI} else (work(asdict(piece)) for piece in slices)
    done, total, rejected, rate = 0, sum(piece.stop - piece.start for piece in slices), 0, Rate()
    progress("preparing items", done, total)
    for result in results:
        done += slices[result["number"]].stop - slices[result["number"]].start
        rejected += result[REJECTED]
        progress("preparing items", done, total, f"{rate.add(result[OK], 'pictures/s')}, {rejected} rejected")
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


def prepare_slice(
    row: dict[str, Any], *, staging: str, config: PrepareConfig, cache: str | None = None
) -> dict[str, Any]:
    """Read one slice (the fields of `_Slice`), store its pictures, write its items and its rejected pictures.

    The answer counts `items` and pictures by status, and holds the `hash` of the file written.
    """
    piece = _Slice(**row)
    table = tables.with_id(storage.read_rows(piece.file, piece.group, piece.start, piece.stop))
    pictures = _pictures(table, storage.parent(piece.file), config, cache)
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


def _pictures(table: pa.Table, folder: str, config: PrepareConfig, cache: str | None) -> list[Picture]:
    """The pictures of a slice as they are stored; each is shrunk as soon as it is there, while others still come."""
    pictures = [Picture(None, MISSING)] * len(table)
    with Fetcher(folder, config, cache) as fetcher:
        for row, picture in fetcher.pictures(zip(_values(table, IMAGE), _values(table, IMAGE_URI), strict=True)):
            pictures[row] = _stored(picture, config)
    return pictures


def _stored(picture: Picture, config: PrepareConfig) -> Picture:
    if picture.data is None:
        return picture
    try:
        return Picture(shrink_image(picture.data, config.image_size_px, max_pixels=config.max_image_pixels), OK)
    except errors.UnreadableImage as error:
        return Picture(None, REJECTED, error.reason)


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


def _cache(out_uri: str, config: PrepareConfig) -> str | None:
    return f"{storage.absolute(out_uri)}.pictures" if config.fetch_cache == "auto" else config.fetch_cache


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
    counted: Counter[tuple[str, str]] = Counter()
    for file in storage.list_files(storage.join(staging, REJECTS_FOLDER), ".parquet"):
        groups = storage.read_table(file, [SOURCE, REASON]).group_by([SOURCE, REASON]).aggregate([([], "count_all")])
        for row in groups.to_pylist():
            counted[row[SOURCE], row[REASON]] += row["count_all"]
    return {f"{source}: {reason}": count for (source, reason), count in counted.most_common()}


# What changes how the work is done and nothing of what is written; a picture that came or did not is in the hashes.
_NOT_CONTENT = {"name", "num_cpus_per_task", "allow_private_addresses"}
_OF_COLD_ITEMS = {"cold_item_share", "seed"}


def _fingerprint(config: PrepareConfig, hashes: list[str]) -> str:
    """Hash of what was written and of the settings behind it."""
    without = _NOT_CONTENT if config.cold_item_share else _NOT_CONTENT | _OF_COLD_ITEMS
    settings = {
        name: value for name, value in to_dict(config).items() if name not in without and not name.startswith("fetch_")
    }
    return hashlib.blake2b(json.dumps([settings, hashes]).encode(), digest_size=16).hexdigest()
