"""Approximate nearest-neighbour search by inner product, with faiss: the vectors cut into lists around centroids, of
which a search reads the nearest few. Knows vectors and rows, and one file; knows no item.

The lists hold the vectors compressed (`Codes`). What they propose is ranked again by the full vectors
(`pixrec.retrieval.search`), so that scores are exact and only who is proposed is not. Inverted lists and `pq` codes are
those of Jégou, Douze and Schmid, Product quantization for nearest neighbor search, PAMI 2011.

Shapes: B queries · N items · D width · L lists · C candidates.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from pixrec.errors import ArtifactError, PixRecError
from pixrec.index import stable_top

Codes = Literal["float16", "int8", "pq"]
_FACTORY = {"float16": "SQfp16", "int8": "SQ8", "pq": "PQ{parts}x8"}
_VALUES_PER_PART = 4  # of a vector, in one byte of `pq`
_TRAINED_ON = 64  # vectors for each list, as many as k-means needs for stable centroids
_ROUNDS = 10  # of k-means; more moved no recall that we saw
_ADDED_AT_A_TIME = 65536

EXTRA = "pip install 'pixrec[approximate]'"


def require_faiss(what: str) -> Any:
    """The module. Raises PixRecError, which says what needs it, where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise PixRecError(f"{what} needs faiss, which is not installed: {EXTRA}") from None
    return faiss


def num_lists(num_items: int) -> int:
    """L: the power of two nearest to 4 √N, so that finding the lists and reading some take about as long."""
    return 2 ** max(0, round(math.log2(4 * math.sqrt(max(1, num_items)))))


def build(vectors: np.ndarray, codes: Codes, path: str, *, threads: int, seed: int = 0) -> str:
    """Write the structure of the vectors (N, D), which may be mapped, to a local file; returns its name in faiss.

    The centroids come from k-means on a sample of 64 vectors a list; the seed fixes it. Memory: the sample and the
    codes.
    """
    faiss = require_faiss("the structure for approximate search")
    num_items, width = vectors.shape
    lists = num_lists(num_items)
    name = f"IVF{lists},{_FACTORY[codes].format(parts=_parts(width))}"
    chosen = np.random.default_rng(seed).choice(num_items, min(num_items, _TRAINED_ON * lists), replace=False)
    with _threads(faiss, threads):
        index = faiss.index_factory(width, name, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.seed, index.cp.spherical = _ROUNDS, seed + 1, True
        if codes == "pq":
            index.do_polysemous_training = False  # seconds for each byte of a code, for a search that is not done here
        for clustering in (index.cp, *([index.pq.cp] if codes == "pq" else [])):
            clustering.min_points_per_centroid = 1  # few are no reason for a warning: small catalogs are for tests
        index.train(np.ascontiguousarray(vectors[np.sort(chosen)], np.float32))
        for first in range(0, num_items, _ADDED_AT_A_TIME):
            index.add(np.ascontiguousarray(vectors[first : first + _ADDED_AT_A_TIME], np.float32))
        faiss.write_index(index, path)
    return name


class Approximate:
    """A structure made by `build`, whose file is mapped: all processes of a node share its pages."""

    def __init__(self, path: str, probes: int, rows: np.ndarray | None = None) -> None:
        """probes: how many lists a search reads, and more of them under a filter.

        rows: int32 (N,), the row by which the caller knows each of the vectors that were built from; None: its number.
        """
        self._faiss = require_faiss(f"the index at {path}")
        self.probes, self._path, self._rows = probes, path, rows
        try:
            index = self._faiss.read_index(path, self._faiss.IO_FLAG_MMAP)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{path} is damaged: {reason}; run pixrec embed again") from None
        # Lists that nobody has read yet could be fetched by threads of their own, started for every search; the pages
        # are in memory after a while, and the threads would cost more than the search.
        self._faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
        self._index = index
        self._centroids = torch.from_numpy(index.quantizer.reconstruct_n(0, index.nlist))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def num_lists(self) -> int:
        return int(self._index.nlist)

    @property
    def proposed_each(self) -> int:
        """How many vectors to propose for each result that is wanted, to be ranked again by the full ones: more for
        codes of less than a byte a value."""
        return 4 if self._index.code_size >= self._index.d else 32

    def renumbered(self, rows: np.ndarray) -> Approximate:
        """The same, whose answers `rows` (N,) translate once more."""
        other = copy.copy(self)
        other._rows = rows if self._rows is None else rows[self._rows]
        return other

    def write_part(self, rows: range, path: str) -> None:
        """Write to a local file the structure of the vectors that the caller knows by these rows, in their order. The
        lists are the same, so a search that reads as many of them finds no less."""
        faiss, lists = self._faiss, self._faiss.downcast_InvertedLists(self._index.invlists)
        part, found = faiss.read_index(self._path, faiss.IO_FLAG_MMAP), 0
        kept = faiss.ArrayInvertedLists(self.num_lists, self._index.code_size)
        known_by = np.arange(len(self)) if self._rows is None else self._rows
        in_order = np.sort(known_by[(known_by >= rows.start) & (known_by < rows.stop)])
        for number in range(self.num_lists):
            size = lists.list_size(number)
            if not size:
                continue
            known = known_by[faiss.rev_swig_ptr(lists.get_ids(number), size)]
            inside = (known >= rows.start) & (known < rows.stop)
            codes = faiss.rev_swig_ptr(lists.get_codes(number), size * self._index.code_size).reshape(size, -1)[inside]
            ids = np.searchsorted(in_order, known[inside])
            if len(ids):
                kept.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(np.ascontiguousarray(codes)))
                found += len(ids)
        part.replace_invlists(kept, True)
        kept.this.disown()  # it belongs to the part now
        part.ntotal = found
        faiss.write_index(part, path)

    def with_probes(self, probes: int) -> Approximate:
        """The same, which reads so many lists."""
        other = copy.copy(self)
        other.probes = probes
        return other

    def candidates(self, queries: np.ndarray, count: int, allowed: np.ndarray | None = None) -> np.ndarray:
        """int64 (B, count): rows of vectors near to each query (B, D), in no order that counts; -1 where there are
        fewer.

        allowed: bool, by row: what may be proposed. The nearest lists are read until they hold as many allowed items
        as a search without a filter sees, wherever those lie.
        """
        faiss, index = self._faiss, self._index
        queries = np.ascontiguousarray(queries, np.float32)
        coarse = torch.from_numpy(queries) @ self._centroids.T
        parameters = faiss.SearchParametersIVF()
        if allowed is None:
            near, lists = stable_top(coarse, min(self.probes, self.num_lists))
        else:
            own = allowed if self._rows is None else allowed[self._rows]
            bits = np.packbits(own, bitorder="little")
            parameters.sel = faiss.IDSelectorBitmap(bits)
            near, lists = self._lists_with(coarse, np.bincount(self._list_of[own], minlength=self.num_lists))
        near_BP, lists_BP = near.contiguous().numpy(), lists.contiguous().numpy()
        parameters.nprobe = lists_BP.shape[1]
        scores = np.empty((len(queries), count), np.float32)
        found = np.empty((len(queries), count), np.int64)
        pointers = [faiss.swig_ptr(array) for array in (queries, lists_BP, near_BP, scores, found)]
        index.search_preassigned_c(len(queries), pointers[0], count, *pointers[1:], False, parameters)
        return found if self._rows is None else np.where(found < 0, found, self._rows[found])

    def _lists_with(self, coarse_BL: torch.Tensor, counts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest lists that hold together what a search wants to see, and their scores; -1 fills up."""
        near, lists = coarse_BL.sort(dim=1, descending=True, stable=True)
        held = torch.from_numpy(counts)[lists]
        before = held.cumsum(1) - held
        wanted = len(self) * self.probes / self.num_lists
        lists[(before >= wanted) | (held == 0)] = -1
        last = int((lists >= 0).any(0).nonzero().max()) + 1 if (lists >= 0).any() else 1
        return near[:, :last], lists[:, :last]

    @cached_property
    def _list_of(self) -> np.ndarray:
        """uint16 or int32 (N,): the list that holds each vector; read when the first filter comes."""
        held = self._faiss.downcast_InvertedLists(self._index.invlists)
        found = np.empty(len(self), np.uint16 if self.num_lists <= 2**16 else np.int32)
        for number in range(self.num_lists):
            size = held.list_size(number)
            if size:
                found[self._faiss.rev_swig_ptr(held.get_ids(number), size)] = number
        return found


def bytes_per_item(width: int, codes: Codes) -> int:
    """What the structure takes of memory for an item: its code and its row. Centroids come on top, 4 D L bytes."""
    return 8 + {"float16": 2 * width, "int8": width, "pq": _parts(width)}[codes]


def _parts(width: int) -> int:
    """Bytes of a `pq` code: of the numbers of which the width is a multiple, that nearest to a quarter."""
    divisors = [parts for parts in range(1, width + 1) if width % parts == 0]
    return min(divisors, key=lambda parts: (abs(parts * _VALUES_PER_PART - width), parts))


@contextlib.contextmanager
def _threads(faiss: Any, threads: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
