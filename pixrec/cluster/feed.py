"""A training worker fed by Ray Data: CPU tasks make the Reads of its steps (`pixrec.training.reading`), in order.

Each worker has a pipeline of its own, one task a step, whose order is that of the steps; so what a worker reads is a
matter of its rank, and of no timing. (`streaming_split` hands a block to whichever worker asks first.) Readers open the
data set themselves and get the encoder, which holds the tokenizer, over the object store. A Read comes back as one
binary value, safetensors. A reader that is killed is replaced by Ray, and its steps are read again. Where the cluster
has no CPU for readers, as after the loss of a node, a worker reads for itself after a while: the Reads are the same.
"""

from __future__ import annotations

import functools
import itertools
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources

from pixrec.config import Config, TrainConfig, dump_config, load_config
from pixrec.data.joined import join_datasets
from pixrec.data.sequences import load_dataset
from pixrec.model.catalog import Catalog
from pixrec.training.reading import Collator, Read, Reader
from pixrec.training.windows import ShiftedWindows

if TYPE_CHECKING:
    from pixrec.training.interleaved import InterleavedTrainer

_STEPS_PER_PIPELINE = 2048
"""Ray Data holds a description of every task that it will ever start."""
_AHEAD, _MOST_READERS = 2, 16
READING = "reads of Ray Data"
"""Name of the threads that wait for them."""


_Item = TypeVar("_Item")


class ReaderJob(NamedTuple):
    """What a reader needs to know."""

    data: tuple[str, ...]
    config: str
    shared: Any
    """in the object store: the item encoder, and the stored picture tokens or None"""
    rank: int
    world_size: int


def uses_ray_data(settings: TrainConfig) -> bool:
    """What `train.feed` comes to on this cluster."""
    if settings.feed != "auto":
        return settings.feed == "ray_data"
    return settings.use_gpu or sum(node["Alive"] for node in ray.nodes()) > 1


def feed_by_ray_data(trainer: InterleavedTrainer, data: Sequence[str], config: Config) -> None:
    """Let Ray Data read what `trainer` reads, of the data sets at `data`."""
    catalog = trainer.collate.catalog
    shared = ray.put((catalog.encoder, catalog.tokens))
    job = ReaderJob(tuple(data), dump_config(config), shared, trainer.rank, trainer.world_size)
    readers = readers_per_worker(config.train, trainer.world_size)
    step_bytes = _about_bytes(trainer, config)
    pin, for_itself, patience = trainer.device.type == "cuda", trainer.feed, config.train.reader_wait_seconds

    def feed(first: int) -> Iterator[Read]:
        for start in range(first, trainer.limit, _STEPS_PER_PIPELINE):
            stop, step = min(start + _STEPS_PER_PIPELINE, trainer.limit), start
            reads = pipeline(job, start, stop, readers, step_bytes, config.train)
            blocks = reads.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=_AHEAD)
            for block in while_prompt(cast(Iterator[pa.Table], blocks), patience):
                yield Read.from_bytes(memoryview(block.column("read")[0].as_buffer()), pin)
                step += 1
            if step < stop:
                print(
                    f"Ray Data read nothing for {patience:g} s (train.reader_wait_seconds), as where no CPU is free: "
                    f"worker {trainer.rank} reads the steps {step} to {stop} for itself",
                    file=sys.stderr,
                    flush=True,
                )
                yield from itertools.islice(for_itself(step), stop - step)

    trainer.feed = feed


def while_prompt(values: Iterable[_Item], seconds: float) -> Iterator[_Item]:
    """The values in order, up to the first that keeps the caller waiting for longer than `seconds`."""
    made: queue.Queue[tuple[str, Any]] = queue.Queue(1)
    left = threading.Event()

    def make() -> None:
        try:
            for value in values:
                made.put(("value", value))
                if left.is_set():
                    return
        except Exception as error:
            made.put(("error", error))
        else:
            made.put(("end", None))

    threading.Thread(target=make, daemon=True, name=READING).start()
    try:
        while True:
            kind, value = made.get(timeout=seconds)
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    except queue.Empty:
        return
    finally:
        left.set()
        while not made.empty():  # so that the thread, which may wait for room, sees that nobody takes any more
            made.get_nowait()


def pipeline(
    job: ReaderJob, start: int, stop: int, readers: int, step_bytes: int, settings: TrainConfig
) -> ray.data.Dataset:
    """The Reads of the steps `start` to `stop`, a row each, in order.

    Up to `readers` are made at a time, and about twice as many are held until they are asked for: Ray Data starts no
    task for which there is no room, and is given room for so many of `step_bytes`.
    """
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # hand on every Read as it is made
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        cpu=readers * settings.cpus_per_reader, object_store_memory=2 * (readers + _AHEAD) * step_bytes
    )
    with ray.data.DataContext.current(context):
        steps = ray.data.range(stop - start, override_num_blocks=stop - start)
        return steps.map_batches(
            functools.partial(make_reads, job=job, start=start),
            batch_size=1,
            batch_format="numpy",
            num_cpus=settings.cpus_per_reader,
            concurrency=min(readers, stop - start),
        )


def make_reads(steps: dict[str, np.ndarray], job: ReaderJob, start: int) -> pa.Table:
    """The Reads of some steps, in a reader's process, which keeps what it has opened for the next ones."""
    reader = _reader(job.data, job.config, job.shared)
    made = [reader.read(start + int(step), job.rank, job.world_size).to_bytes() for step in steps["id"]]
    return pa.table({"read": pa.array(made, pa.large_binary())})


@functools.lru_cache(maxsize=1)
def _reader(data: tuple[str, ...], settings: str, shared: Any) -> Reader:
    config = load_config(settings)
    joined = join_datasets([load_dataset(uri) for uri in data])
    encoder, tokens = ray.get(shared)
    source = ShiftedWindows(joined.histories, config.model.max_history_items, config.train)
    catalog = Catalog(joined.items, encoder, cache_bytes=0, tokens=tokens)
    return Reader(source, Collator(catalog, joined.counts, config, source.examples_per_step))


def readers_per_worker(settings: TrainConfig, world_size: int) -> int:
    """Reads that are made at a time for one worker: as `train` says, or as many as the CPUs beside the workers allow.

    A reader that is not needed takes none of them: no Read is begun while enough lie ready.
    """
    if settings.readers_per_worker is not None:
        return settings.readers_per_worker
    free = ray.cluster_resources().get("CPU", 1.0) - world_size * settings.cpus_per_worker
    return max(1, min(_MOST_READERS, int(free / world_size / settings.cpus_per_reader)))


def _about_bytes(trainer: InterleavedTrainer, config: Config) -> int:
    """About how many bytes a Read is: of each item its picture and tokens, of each history its tokens."""
    windows, encoder = (
        trainer.source.step(trainer.step, trainer.rank, trainer.world_size),
        trainer.collate.catalog.encoder,
    )
    shown, events = len(np.unique(np.concatenate(windows))), sum(map(len, windows))
    tokens = encoder.tokens_per_picture + config.model.max_text_tokens + 8
    return shown * 3 * encoder.image_size_px**2 + 48 * tokens * (shown + events)
