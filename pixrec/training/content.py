"""The item vectors that a compact tower learns on: computed once by all workers together, then mapped by each.

They stand still while the tower is trained. A large table lies in a file that the workers of a node share, named after
the model that made it and the items, so a run that goes on after its workers died finds it there. A small one is held
in memory. Knows no Ray.

Shapes: N items of the catalog · C width of their vectors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pixrec import storage
from pixrec.artifact import Model, fingerprint
from pixrec.config import Config
from pixrec.index import shared_tensor
from pixrec.model.catalog import Catalog
from pixrec.model.parallel import rank_and_size
from pixrec.training.validation import item_table

MAPPED_FROM = 2**26
"""Bytes of a table from which on it is mapped rather than held by each worker."""
ROWS_AT_A_TIME = 65_536


def content_table(model: Model, catalog: Catalog, config: Config, width: int) -> Tensor:
    """Content vectors (N, C) float32 of the whole catalog, on the processor, to be read only.

    A collective where torch.distributed is initialised: the workers compute the vectors between them.
    """
    total = len(catalog)
    if 4 * total * width < MAPPED_FROM:
        return torch.from_numpy(item_table(model.tower, catalog, config))
    place = storage.node_place(f"content-{fingerprint(model)}-{catalog.table.row_of.digest}.npy")
    if not _by_all(os.path.exists(place)):
        _write(place, model, catalog, config, width)
    return shared_tensor(storage.map_array(place))


def blocks(total: int) -> Iterator[slice]:
    """0 … total in pieces of ROWS_AT_A_TIME."""
    for start in range(0, total, ROWS_AT_A_TIME):
        yield slice(start, min(total, start + ROWS_AT_A_TIME))


def _write(place: str, model: Model, catalog: Catalog, config: Config, width: int) -> None:
    """The first worker of each node writes what all of them compute, a block at a time."""
    writes = int(os.environ.get("LOCAL_RANK", rank_and_size()[0])) == 0
    partial = f"{place}.partial-{os.getpid()}"
    shape = len(catalog), width
    table = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape) if writes else None
    try:
        for block in blocks(len(catalog)):
            made = item_table(model.tower, catalog, config, rows=np.arange(block.start, block.stop))
            if table is not None:
                table[block] = made
        if table is not None:
            table.flush()
            os.replace(partial, place)
    finally:
        if writes and os.path.exists(partial):
            os.unlink(partial)
    if rank_and_size()[1] > 1:
        dist.barrier()


def _by_all(found: bool) -> bool:
    if rank_and_size()[1] == 1:
        return found
    flag = torch.tensor([float(found)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
