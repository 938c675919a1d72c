"""From raw tables to a prepared data set.

Tables may be larger than memory: they are worked on in pieces and in partitions (`pixrec.data.partitions`), which in
the driver are a few counts each, and in slices of items (`pixrec.data.slices`). Small tables are worked on in this
process, before Ray is started, large ones and pictures by tasks of Ray Data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pixrec import __version__, errors, storage
from pixrec.config import PrepareConfig, to_dict
from pixrec.console import Progress, Rate
from pixrec.data import amazon2023, interactions, partitions, pictures, slices, tables
from pixrec.data.images import DECODER
from pixrec.data.partitions import Answer, Number, Plan
from pixrec.data.sequences import DATASET_MARKER, FORMAT, PICTURES_FOLDER, REJECTS_FOLDER, source_name
from pixrec.schema import (
    EVENT,
    IMAGE,
    IMAGE_URI,
    IMAGE_URIS,
    ITEMS,
    MISSING,
    OK,
    REASON,
    REJECTED,
    REJECTS,
    SOURCE,
)

Source = Literal["tables", "amazon2023"]
Step = Callable[[dict[str, Any]], Answer]

KIND = "data set"


def prepare(
    items_uri: str | Sequence[str] | None,
    interactions_uri: str | Sequence[str],
    out_uri: str,
    config: PrepareConfig,
    progress: Progress,
    source: Source = "tables",
) -> dict[str, Any]:
    """Make the prepared data set `out_uri` and return the content of its dataset.json.

    Either table may be several, whose rows follow each other; an event that several interactions tables hold counts
    once.
    Everything that can be wrong with tables of up to `EVENTS_PER_PARTITION` events is found before Ray is started.
    Local URIs, and the pictures' paths, must be the same on every node. A run that was killed is gone on with by the
    next of the same arguments. Raises InputError, OutputError.
    """
    storage.check_writable(out_uri, DATASET_MARKER, KIND)
    inputs = {"source": source, "items": items_uri, "interactions": interactions_uri}
    items, events = _each(items_uri), _each(interactions_uri)
    if source == "tables":
        _item_files(items)
        _interaction_files(events, config)
    elif len(items) > 1 or len(events) > 1:
        raise errors.InputError(f"source {source} takes one file of items and one of interactions")
    key = input_key(inputs, config)
    with (
        storage.work_folder(storage.absolute(out_uri), key, DATASET_MARKER, KIND) as work,
        contextlib.ExitStack() as stack,
    ):
        raw = _raw(inputs, work, progress)
        files = _interaction_files(_each(raw.interactions), config)
        plan = Plan(
            work,
            config,
            partitions.num_partitions(sum(group.rows for file in files for group in storage.row_groups(file))),
            " and ".join(items) or None,
            " and ".join(events),
            # the raw reviews hold some twice, word for word, and two tables may overlap; one table's are all meant
            drop_repeats=source != "tables" or len(events) > 1,
        )
        if plan.partitions > 1:
            from pixrec.cluster.session import connect

            stack.enter_context(connect())
        return _prepare(raw, files, plan, inputs, storage.absolute(out_uri), progress)


def _raw(inputs: dict[str, Any], work: str, progress: Progress) -> amazon2023.Normalised:
    """The two tables, and the lines that are in neither."""
    if inputs["source"] == "tables":
        return amazon2023.Normalised(inputs["items"], inputs["interactions"], REJECTS.empty_table())
    folder = storage.join(work, "raw")
    rejected = storage.join(folder, "rejects", "lines.parquet")  # written last
    if storage.exists(rejected):
        items = storage.join(folder, "items.parquet") if inputs["items"] is not None else None
        return amazon2023.Normalised(items, storage.join(folder, "interactions.parquet"), storage.read_table(rejected))
    made = amazon2023.to_tables(inputs["items"], inputs["interactions"], folder, progress)
    storage.write_table(rejected, made.rejects)
    return made


def _prepare(
    raw: amazon2023.Normalised,
    events_files: list[str],
    plan: Plan,
    inputs: dict[str, Any],
    out_uri: str,
    progress: Progress,
) -> dict[str, Any]:
    config, run = plan.config, _Runner(plan, progress)
    storage.write_table(slices.table_rejects(plan.data), raw.rejects)
    files = _item_files(_each(raw.items))
    read, num_items = _read_ids(run, files, events_files)
    events = _read_events(run, events_files)
    parts = [asdict(Number(number)) for number in range(plan.partitions)]
    run.plan = plan = dataclasses.replace(plan, kinds=events.kinds)
    ordered = run("order", "ordering events", partitions.order_events, parts, files=events.files)
    survivors, times = _core(run, parts, num_items)
    split = interactions.split_by(int(survivors.sum()), functools.partial(_at_ranks, run, parts, times), config)
    cold = 0
    if config.cold_item_share:
        mask = interactions.draw_cold_items(survivors, config)
        partitions.write_mask(plan, "cold", mask)
        cold = int(mask.sum())
    run.plan = plan = dataclasses.replace(plan, split=split)

    if raw.items is None:
        items = slices.write_bare_items(partitions.read_items(plan), plan.data)
    else:
        cache = _cache(out_uri, config)
        work = functools.partial(slices.prepare_slice, staging=plan.data, config=config, cache=cache)
        items = _prepare_slices(run, work, slices.slices(files))
    pictures.complete(storage.join(plan.data, PICTURES_FOLDER), len(items))
    written = run("sequences", "writing sequences", partitions.write_sequences, parts)
    users, kept = (sum(part[name] for part in written) for name in ("users", "events"))
    arrays = [asdict(Number(number)) for number in range(len(partitions.flat_arrays(plan)))]
    run("arrays", "writing sequences", partitions.join_array, arrays, users=users, events=kept)
    _drop_partial_files(plan.data)
    ids = (read if raw.items is not None else num_items, num_items)
    counts = _counts(raw, plan, ids, events, ordered, int(survivors.sum()), items, written)
    counts["cold"] = {"items": cold, "test_targets": sum(part["test_targets"] for part in written)}
    return _publish(plan, inputs, counts, items, written)


def _counts(
    raw: amazon2023.Normalised,
    plan: Plan,
    ids: tuple[int, int],
    events: _EventsRead,
    ordered: list[Answer],
    core: int,
    items: list[Answer],
    written: list[Answer],
) -> dict[str, Any]:
    """What dataset.json counts: `ids` are the rows of the items table and those that name an item, `core` the events
    left by the filters by count. Lines of raw files that became no row are rejects too."""
    lines = Counter(raw.rejects.column(SOURCE).to_pylist())
    users, kept = (sum(part[name] for part in written) for name in ("users", "events"))
    found = sum(part["events"] for part in ordered)
    bad_items = lines[ITEMS] + ids[0] - ids[1]
    return {
        "items": {"read": ids[1] + bad_items, "kept": sum(part["items"] for part in items), "rejected": bad_items},
        "images": {status: sum(part[status] for part in items) for status in (OK, MISSING, REJECTED)},
        "interactions": {
            "read": events.counts[interactions.READ] + lines[interactions.INTERACTIONS],
            "kept": kept,
            "rejected": events.counts["rejected"] + lines[interactions.INTERACTIONS],
            "filtered_rating": events.counts[interactions.BY_RATING],
            **({} if plan.wanted is None else {"filtered_event": events.counts[interactions.BY_EVENT]}),
            "filtered_repeats": sum(part["repeats"] for part in ordered),
            "filtered_kcore": found - core,
            "held_out_cold": core - kept,
        },
        "users": users,
    }


def _publish(
    plan: Plan, inputs: dict[str, Any], counts: dict[str, Any], items: list[Answer], written: list[Answer]
) -> dict[str, Any]:
    """Check the counts and write dataset.json, by which the folder becomes a data set; returns its content."""
    config = plan.config
    hashes = [digest for part in items for digest in (part["hash"], part["pictures"])]
    info = {
        "format": FORMAT,
        "pixrec_version": __version__,
        "decoder": DECODER,
        "name": config.name or source_name(_each(inputs["interactions"])[0]),
        "fingerprint": _fingerprint(config, hashes + [digest for part in written for digest in part["hashes"]]),
        **counts,
        "rejects": _count_rejects(plan.data),
        "split": plan.split,
        **({} if plan.kinds is None else {"events": _kinds_block(plan.kinds, config)}),
        "inputs": inputs,
        "config": to_dict(config),
        "item_parts": [part["items"] for part in items],
    }
    check_counts(info)
    storage.write_json(storage.join(plan.data, DATASET_MARKER), info)
    return info


class _Runner:
    """Runs the steps of a plan, each piece of the work once: in this process, or on Ray where the tables are large."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress = plan, progress

    def __call__(
        self, stage: str, words: str, step: Callable[..., Answer], rows: Sequence[dict[str, Any]], **more: Any
    ) -> list[Answer]:
        """The answers of `step` to all `rows`, in their order."""
        work = functools.partial(step, plan=self.plan, **more)
        found: list[Answer] = []
        for done, answer in enumerate(self.each(stage, work, rows, on_ray=self.plan.partitions > 1)):
            self.progress(words, done, len(rows))
            found.append(answer)
        by_number = partitions.answers(self._receipts(stage))
        return [by_number[row["number"]] for row in rows]

    def each(self, stage: str, work: Step, rows: Sequence[dict[str, Any]], *, on_ray: bool) -> Iterator[Answer]:
        """The answers of `work` to all `rows`, in any order, first those of an earlier run."""
        before = partitions.answers(self._receipts(stage))
        yield from (before[row["number"]] for row in rows if row["number"] in before)
        left = [row for row in rows if row["number"] not in before]
        once = functools.partial(partitions.once, step=work, receipts=self._receipts(stage))
        if left:
            yield from _on_ray(once, left, self.plan.config) if on_ray else map(once, left)

    def _receipts(self, stage: str) -> str:
        return storage.join(self.plan.work, "done", stage)


@dataclass(frozen=True)
class _EventsRead:
    """What was found in the interactions: counts by name, how many files each piece went into, kinds of events."""

    counts: Counter[str]
    files: list[int]
    kinds: tuple[str, ...] | None


def _read_ids(run: _Runner, files: list[str], events_files: list[str]) -> tuple[int, int]:
    """How many rows the items table has, and how many items there are, which are numbered from here on."""
    read = 0
    if run.plan.items is not None:
        pieces = [asdict(piece) for piece in partitions.pieces(files)]
        read = sum(part["read"] for part in run("ids", "reading items", partitions.read_ids, pieces))
    else:
        pieces = [asdict(piece) for piece in partitions.pieces(events_files)]
        run("ids", "reading items", partitions.see_ids, pieces)
    (indexed,) = run("index", "reading items", partitions.index_ids, [asdict(Number(0))], read=read)
    return read, indexed["items"]


def _read_events(run: _Runner, files: list[str]) -> _EventsRead:
    plan = run.plan
    pieces = [asdict(piece) for piece in partitions.pieces(files)]
    found = run("events", "reading interactions", partitions.read_events, pieces)
    counts = Counter[str]()
    for part in found:
        counts.update({name: value for name, value in part.items() if isinstance(value, int)})
    interactions.check_usable(counts, plan.interactions, min_rating=plan.config.min_rating)
    kinds = None
    if EVENT in storage.read_schema(files[0]).names:
        kinds = tuple(sorted({kind for part in found for kind in part["kinds"]}))
        interactions.check_kinds(kinds, plan.config, plan.interactions)
        kinds = tuple(kind for kind in kinds if plan.wanted is None or kind in plan.wanted)
    return _EventsRead(counts, [part["files"] for part in found], kinds)


def _core(run: _Runner, parts: list[dict[str, Any]], num_items: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The events (N,) that each item keeps, and when the first and the last event was."""
    times: tuple[int, int] = (0, 0)
    rounds = itertools.count()

    def count(dead: np.ndarray) -> np.ndarray:
        nonlocal times
        number = next(rounds)
        partitions.write_mask(run.plan, f"dead-{number}", dead)
        found = run(f"core-{number}", "filtering events", partitions.count_survivors, parts, round=number)
        moments = [part[end] for part in found for end in ("low", "high") if end in part]
        times = (min(moments, default=0), max(moments, default=0))
        return partitions.sum_counts(run.plan, f"round-{number}")

    config = run.plan.config
    dead, counts = interactions.core(count, num_items, config.min_user_events, config.min_item_events)
    partitions.write_mask(run.plan, "dead", dead)
    return counts, times


def _at_ranks(run: _Runner, parts: list[dict[str, Any]], times: tuple[int, int], ranks: list[int]) -> list[int]:
    """The timestamps of some ranks among all events that are kept."""
    rounds = itertools.count()

    def histogram(windows: Sequence[interactions.Window]) -> list[np.ndarray]:
        found = run(f"times-{next(rounds)}", "filtering events", partitions.count_times, parts, windows=windows)
        return [np.sum([part["bins"][at] for part in found], axis=0) for at in range(len(windows))]

    return interactions.order_statistics(ranks, *times, histogram)


def _kinds_block(kinds: tuple[str, ...], config: PrepareConfig) -> dict[str, list[str]]:
    chosen = {"history": config.history_events, "target": config.target_events}
    return {"kinds": [*kinds], **{name: [*(kinds if some is None else some)] for name, some in chosen.items()}}


def check_counts(info: dict[str, Any]) -> None:
    """Assert that what was read is what was kept plus what was left out, for items, pictures and events."""
    items, images, events = info["items"], info["images"], info["interactions"]
    assert items["read"] == items["kept"] + items["rejected"], items
    assert items["kept"] == sum(images.values()), (items, images)
    assert events["read"] == sum(events[name] for name in events if name != "read"), events
    assert 0 < info["users"] <= events["kept"], info["users"]


def _each(uris: str | Sequence[str] | None) -> list[str]:
    return [] if uris is None else [uris] if isinstance(uris, str) else [*uris]


def _item_files(uris: Sequence[str]) -> list[str]:
    files = [storage.absolute(file) for uri in uris for file in storage.table_files(uri)]
    schemas = {file: storage.read_schema(file) for file in files}
    for file, schema in schemas.items():
        tables.check_items_schema(schema, file)
    if files:
        tables.check_items_agree(schemas.values(), " and ".join(uris))
    return files


def _interaction_files(uris: Sequence[str], config: PrepareConfig) -> list[str]:
    files = [storage.absolute(file) for uri in uris for file in storage.table_files(uri)]
    needs_event = next((name for name in ("history_events", "target_events") if getattr(config, name)), None)
    schemas = {file: storage.read_schema(file) for file in files}
    for file, schema in schemas.items():
        tables.check_interactions_schema(schema, file, min_rating=config.min_rating, needs_event=needs_event)
    if len({EVENT in schema.names for schema in schemas.values()}) > 1:
        where = " and ".join(uris)
        raise errors.InputError(f"{where}: some of its files have a column {EVENT!r} and some have none; add it to all")
    return files


def _prepare_slices(run: _Runner, work: Step, pieces: list[slices.Slice]) -> list[Answer]:
    """What `work`, a `prepare_slice`, says of each slice, in order; on Ray when there are pictures to decode."""
    names = {name for file in {piece.file for piece in pieces} for name in storage.read_schema(file).names}
    on_ray = bool(names & {IMAGE, IMAGE_URI, IMAGE_URIS})
    total = sum(piece.stop - piece.start for piece in pieces)
    done, rejected, rate, found = 0, 0, Rate(), {}
    run.progress("preparing items", done, total)
    for result in run.each("items", work, [asdict(piece) for piece in pieces], on_ray=on_ray):
        found[result["number"]] = result
        done += pieces[result["number"]].stop - pieces[result["number"]].start
        rejected += result[REJECTED]
        run.progress("preparing items", done, total, f"{rate.add(result[OK], 'pictures/s')}, {rejected} rejected")
    return [found[number] for number in sorted(found)]


def _on_ray(work: Step, rows: list[dict[str, Any]], config: PrepareConfig) -> Iterator[Answer]:
    import ray

    from pixrec.cluster.session import connect

    with connect():
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        answers = data.map(functools.partial(_answer, work=work), num_cpus=config.num_cpus_per_task)
        for row in answers.iter_rows():
            answer = json.loads(row["answer"])
            errors.raise_fault(answer.get("fault"))
            yield answer


def _answer(row: dict[str, Any], *, work: Step) -> dict[str, str]:
    """What `work` says of the row, or its `fault`: Ray would hand the driver a traceback in its place."""
    try:
        answer = work(row)
    except errors.PixRecError as error:
        answer = {"fault": errors.fault_text(error)}
    return {"answer": json.dumps(answer)}


def _cache(out_uri: str, config: PrepareConfig) -> str | None:
    return f"{storage.absolute(out_uri)}.pictures" if config.fetch_cache == "auto" else config.fetch_cache


def _drop_partial_files(staging: str) -> None:
    """A worker that was killed while it wrote leaves a part of a file under another name."""
    for file in storage.list_files(staging):
        if ".partial-" in storage.name(file):
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
_OF_KINDS = {"history_events", "target_events"}


def _fingerprint(config: PrepareConfig, hashes: list[str]) -> str:
    """Hash of what was written and of the settings behind it."""
    without = _NOT_CONTENT if config.cold_item_share else _NOT_CONTENT | _OF_COLD_ITEMS
    without |= {name for name in _OF_KINDS if getattr(config, name) is None}
    settings = {
        name: value for name, value in to_dict(config).items() if name not in without and not name.startswith("fetch_")
    }
    return hashlib.blake2b(json.dumps([settings, hashes]).encode(), digest_size=16).hexdigest()


def input_key(inputs: dict[str, Any], config: PrepareConfig) -> str:
    """Hash of the files that are read and of the settings: runs of one key make the same data set."""
    files = []
    for uris in (inputs["items"], inputs["interactions"]):
        listed = []
        for uri in _each(uris):
            if not storage.exists(uri):
                raise errors.InputError(f"{uri}: no such file or folder")
            listed += storage.list_files(uri) if storage.is_folder(uri) else [uri]
        files.append([[file, storage.stamp(file)] for file in listed])
    facts = [FORMAT, __version__, DECODER, inputs, files, to_dict(config)]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
