"""An index in parts: what a process that searches one of them holds, and who asks all of them and merges.

Knows no Ray but what a handle of a deployment is asked for.

Shapes: B queries · N items · D width · S shards.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pixrec import storage
from pixrec.artifact import load_content, load_index
from pixrec.config import ServeConfig
from pixrec.data.arrays import open_arrays
from pixrec.data.items import ItemTable, open_items, read_info
from pixrec.errors import ArtifactError
from pixrec.index import in_order
from pixrec.query import Filters
from pixrec.retrieval.approximate import Approximate
from pixrec.retrieval.search import Found, Searcher, row_ranges, search_shards
from pixrec.serving.backend import ShardsMissing, Versions

T = TypeVar("T")

logger = logging.getLogger("ray.serve.pixrec")

VERSIONS_KEPT = 3
"""Of a shard in memory: what is in use, a canary, and what was in use before, for batches that were encoded for it."""


class Shard:
    """What is searched of some rows of an index version. Holds no model."""

    def __init__(
        self,
        items: ItemTable,
        indexed: np.ndarray,
        searcher: Searcher,
        content: Searcher | None = None,
    ) -> None:
        """items: of the whole catalog; indexed: bool, which of the rows of `searcher` are of items of the index."""
        self._items, self._indexed = items, indexed
        self._searcher, self._content = searcher, content

    def search(self, vectors: np.ndarray, k: int, filters: Filters, of_content: bool, barred: np.ndarray) -> Found:
        """A `VectorSearch` (`pixrec.retrieval.ranking`) among the rows of this shard, numbered as in the index."""
        first = self._searcher.first_row
        allowed = self._indexed.copy()
        if filters:
            allowed &= self._items.filter_mask(filters)[first : first + len(allowed)]
        here = barred - first
        allowed[here[(here >= 0) & (here < len(allowed))]] = False
        return ((self._content if of_content else None) or self._searcher).search(vectors, k, allowed)


def load_shard(index: str, data: str, manifest: Mapping[str, Any], number: int, shards: int) -> Shard:
    """Shard `number` of so many of an index version, over the data set behind it; its vectors are mapped where those of
    the whole index are. Raises ArtifactError."""
    version = str(manifest["version"])
    items = open_items(data, open_arrays(data, str(read_info(data).get("fingerprint", ""))))
    found = load_index(index, str(manifest["model_fingerprint"]), items, version)
    places, rows = found.rows_among(items), row_ranges(len(items), shards)[number]
    indexed = np.zeros(len(items), dtype=bool)
    indexed[places] = True
    structure = found.structure() if found.structure else None
    if structure is not None and not np.array_equal(places, np.arange(len(items))):
        structure = structure.renumbered(places)
    if structure is not None and shards > 1:
        whole, name = structure, storage.join(index, f"shard {number} of {shards}")
        within = None if indexed.all() else np.flatnonzero(indexed[rows.start : rows.stop]).astype(np.int32)
        structure = storage.node_file(
            name,
            f"{version} {items.row_of.digest}",
            lambda path: whole.write_part(rows, path),
            lambda path: Approximate(path, whole.probes, within),
        )
    vectors, content = in_order(found.vectors, places, len(items)), load_content(index, found.manifest, items)
    return Shard(
        items,
        indexed[rows.start : rows.stop].copy(),
        Searcher(_part(vectors, rows), structure, rows.start),
        None if content is None else Searcher(_part(content, rows), first_row=rows.start),
    )


def _part(array: np.ndarray, rows: range) -> np.ndarray:
    """Some rows: of a mapped array as they lie there, else a copy, so that the rest can go."""
    part = array[rows.start : rows.stop]
    return part if isinstance(array.base, np.memmap) else part.copy()


class Held:
    """The versions of a shard that were asked for last: each is loaded when it is asked for, beside the others."""

    def __init__(self, load: Callable[[Versions], Shard]) -> None:
        self._load = load
        self._one_at_a_time, self._changing = threading.Lock(), threading.Lock()
        self._shards: OrderedDict[Versions, Shard] = OrderedDict()

    def get(self, versions: Versions) -> Shard | None:
        """What is loaded of these versions; None: nothing yet."""
        with self._changing:
            if versions in self._shards:
                self._shards.move_to_end(versions)
            return self._shards.get(versions)

    def of(self, versions: Versions) -> Shard:
        """What is loaded of these versions, or will be before this returns. Raises what loading raises."""
        with self._one_at_a_time:
            shard = self.get(versions) or self._load(versions)
            with self._changing:
                self._shards[versions] = shard
                while len(self._shards) > VERSIONS_KEPT:
                    self._shards.popitem(last=False)
            return shard

    def versions(self) -> list[Versions]:
        with self._changing:
            return list(self._shards)


class Shards:
    """All shards of an index, each a deployment known by its handle."""

    def __init__(self, handles: Sequence[Any], config: ServeConfig, lost: Callable[[int], None]) -> None:
        """lost: is told the number of each shard that gives no answer."""
        self.handles, self.config, self._lost = handles, config, lost
        self._down: set[int] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def of(self, versions: Versions) -> ShardSearch:
        """A search of these versions, to be called in another thread than that of the event loop, which calls this."""
        self._loop = asyncio.get_running_loop()
        return ShardSearch(self, versions)

    def hold(self, versions: Versions) -> None:
        """Have every replica of every shard load these versions, before anybody asks for them. One that does not answer
        is passed over: it loads them when asked. Raises ArtifactError where one cannot."""
        if self._loop is None:
            return  # nobody has asked for anything yet

        async def everywhere() -> list[Any]:
            seconds = self.config.load_timeout_seconds
            asked = [handle.broadcast("hold", versions) for handle in self.handles]
            answers = (one.results_async(timeout_s=seconds, return_exceptions=True) for one in asked)
            return await asyncio.gather(*answers, return_exceptions=True)

        for number, answers in enumerate(self.wait_for(everywhere())):
            for answer in answers if isinstance(answers, list) else [answers]:
                if isinstance(answer, str):
                    raise ArtifactError(f"shard {number} of the index cannot load it: {answer}")
                if isinstance(answer, BaseException):
                    logger.warning("shard %d was not told of index %s: %r", number, versions.index_version, answer)

    def told(self, number: int, error: Exception | None) -> None:
        """A shard has answered, or has not: what changes is logged, what fails is counted."""
        if error is not None:
            self._lost(number)
        if error is not None and number not in self._down:
            self._down.add(number)
            logger.warning("shard %d of the index gives no answer: %s", number, type(error).__name__)
        elif error is None and number in self._down:
            self._down.discard(number)
            logger.warning("shard %d of the index answers again", number)

    def wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class ShardSearch:
    """A `VectorSearch` (`pixrec.retrieval.ranking`) over all shards."""

    def __init__(self, shards: Shards, versions: Versions) -> None:
        self._shards, self._versions = shards, versions
        self.missing: set[int] = set()
        """Numbers of the shards that have not always answered."""

    def __call__(self, vectors: np.ndarray, k: int, filters: Filters, of_content: bool, barred: np.ndarray) -> Found:
        """Raises ShardsMissing where a shard gives no answer and one without it is not wanted, or none does."""
        handles, config = self._shards.handles, self._shards.config

        async def ask(handle: Any) -> Found:
            async with asyncio.timeout(config.shard_timeout_seconds):
                return await handle.search.remote(self._versions, vectors, k, filters, of_content, barred)

        def lost(number: int, error: Exception) -> None:
            self.missing.add(number)
            self._shards.told(number, error)

        parts = [_Asked(partial(self._shards.wait_for, ask(handle))) for handle in handles]
        try:
            merged = search_shards(parts, vectors, k, lost=lost)
        except ValueError:
            raise self._refusal() from None
        for number in set(range(len(handles))) - set(merged.missing):
            self._shards.told(number, None)
        if merged.missing and config.missing_shard == "refuse":
            raise self._refusal()
        return merged.scores, merged.rows

    def _refusal(self) -> ShardsMissing:
        numbers = ", ".join(map(str, sorted(self.missing)))
        return ShardsMissing(f"shard {numbers} of {len(self._shards.handles)} of the index gives no answer")


class _Asked(NamedTuple):
    """A shard and what it is asked."""

    answer: Callable[[], Found]

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Found:
        return self.answer()
