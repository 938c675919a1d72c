"""Exact nearest-neighbour search among item vectors, by inner product. Knows vectors and rows; knows no model.

Shapes: B queries · N items · D width · k results.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

# At most QUERY_BLOCK × ITEM_BLOCK scores (64 MB) are alive at a time, however large B and N are.
QUERY_BLOCK = 256
ITEM_BLOCK = 65536
# BLAS sums the last few columns of a product in another order, so equal items could score a last bit apart there
# (seen at N = 1003); blocks filled up to a multiple of this many rows give equal items equal scores.
ROW_MULTIPLE = 64
# Among so many rows the largest score is found first, and then the largest of those.
CHUNK = ROW_MULTIPLE


@torch.no_grad()
def top_k(queries: Any, items: Any, k: int, rows: np.ndarray | None = None) -> tuple[Any, Any]:
    """The `k` items with the largest inner product for each query, exactly.

    queries (B, D) and items (N, D) are numpy arrays or tensors of any float type; scores are computed in float32.
    `rows`: the items to look among, ascending; the indices are of `items` all the same. Nothing of the size of `items`
    is copied.
    Returns scores (B, min(k, N)) float32, descending, and indices (B, min(k, N)) int64, of the kind `queries` is.
    Equal scores: the lower row first. Raises ValueError on k < 1, shapes that do not fit, or values that are not
    finite.
    """
    as_numpy = not isinstance(queries, torch.Tensor)
    queries_BD, items_ND = _tensor(queries), _tensor(items)
    if k < 1:
        raise ValueError(f"k is {k}: must be at least 1")
    if queries_BD.ndim != 2 or items_ND.ndim != 2 or queries_BD.shape[1] != items_ND.shape[1]:
        raise ValueError(
            f"queries {tuple(queries_BD.shape)} and items {tuple(items_ND.shape)} "
            "must be (B, D) and (N, D) of one width"
        )
    if not torch.isfinite(queries_BD).all():
        raise ValueError("queries hold a value that is not finite")
    chosen = None if rows is None else torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(items_ND.device)
    parts = [_search(block.float(), items_ND, k, chosen) for block in queries_BD.split(QUERY_BLOCK)]
    scores, indices = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if not torch.isfinite(scores).all():
        raise ValueError("items hold a value that is not finite")
    return (scores.cpu().numpy(), indices.cpu().numpy()) if as_numpy else (scores, indices)


def shared_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of the memory of an array, to be read only: that may be mapped, or belong to Arrow or to Ray."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))


def in_order(vectors: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
    """An array (num_rows, D) with vector i at `rows[i]`, zeros elsewhere: `vectors` themselves if they lie so."""
    if len(rows) == num_rows and np.array_equal(rows, np.arange(num_rows)):
        return vectors
    ordered = np.zeros((num_rows, vectors.shape[1]), dtype=vectors.dtype)
    ordered[rows] = vectors
    return ordered


def _tensor(array: Any) -> torch.Tensor:
    return array.detach() if isinstance(array, torch.Tensor) else shared_tensor(np.asarray(array))


def _search(
    queries_BD: torch.Tensor, items_ND: torch.Tensor, k: int, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_k` for one block of float32 queries, as many items at a time as leave room for their scores."""
    device, total, barred = queries_BD.device, len(items_ND), None
    if rows is not None:
        k = min(k, len(rows))
        if 2 * len(rows) > total:  # to read all vectors in turn is faster than to gather most of them
            barred, rows = torch.ones(total, dtype=torch.bool, device=device).index_fill_(0, rows.to(device), 0), None
        else:
            total = len(rows)
    k = min(k, total)
    scores = torch.empty(len(queries_BD), 0, device=device)
    indices = torch.empty(len(queries_BD), 0, dtype=torch.int64, device=device)
    span = max(1, QUERY_BLOCK // max(1, len(queries_BD))) * ITEM_BLOCK
    for first in range(0, total, span):
        last = min(first + span, total)
        found = _scores(queries_BD, items_ND, first, last, rows)
        if barred is not None:
            found[:, : last - first].masked_fill_(barred[first:last], -torch.inf)
        block_scores, block_rows = stable_top(found, k)
        # what was kept so far has the lower rows and stands first, so a stable sort keeps the order of ties
        scores, order = torch.cat([scores, block_scores], 1).sort(dim=1, descending=True, stable=True)
        indices = torch.cat([indices, block_rows + first], 1).gather(1, order)
        scores, indices = scores[:, :k], indices[:, :k]
    return scores, indices if rows is None else rows.to(device)[indices]


def _scores(
    queries_BD: torch.Tensor, items_ND: torch.Tensor, first: int, last: int, rows: torch.Tensor | None
) -> torch.Tensor:
    """Products with the items `first` to `last`, or those of the `rows` of items, filled up to whole CHUNKs with -inf.

    Vectors are read, gathered and cast an ITEM_BLOCK at a time.
    """
    count = last - first
    scores = torch.empty(len(queries_BD), count + -count % CHUNK, device=queries_BD.device)
    for start in range(0, count, ITEM_BLOCK):
        stop = min(start + ITEM_BLOCK, count)
        chosen = slice(first + start, first + stop)
        block = (items_ND[chosen] if rows is None else items_ND[rows[chosen]]).to(scores.device, torch.float32)
        _product(queries_BD, block, scores[:, start : stop + -stop % CHUNK])
    scores[:, count:] = -torch.inf
    return scores


def _product(queries_BD: torch.Tensor, items_ND: torch.Tensor, out_BN: torch.Tensor) -> None:
    """Into `out_BN`, whose number of columns is that of the items, filled up to whole CHUNKs."""
    if len(queries_BD) == 1 and out_BN.device.type == "cpu" and torch.get_num_threads() == 1:
        # One query is a matter of reading the vectors, which NumPy's loop does in less time than MKL's on one thread.
        np.einsum("nd,d->n", items_ND.numpy(), queries_BD[0].numpy(), out=out_BN[0, : len(items_ND)].numpy())
        return
    missing = out_BN.shape[1] - len(items_ND)
    padded = torch.nn.functional.pad(items_ND, (0, 0, 0, missing)) if missing else items_ND
    torch.mm(queries_BD, padded.T, out=out_BN)


def stable_top(scores_BN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.topk` of scores without NaN, with ties in row order, which torch itself does not promise."""
    N = scores_BN.shape[1]
    if k >= N:
        return scores_BN.sort(dim=1, descending=True, stable=True)
    if 4 * k * CHUNK <= N and N % CHUNK == 0 and scores_BN.is_contiguous():
        return _top_of_chunks(scores_BN, k)
    values, rows = scores_BN.topk(k + 1, dim=1)
    cut_in_a_tie = values[:, k - 1] == values[:, k]
    rows = rows[:, :k]
    if cut_in_a_tie.any():  # which of the equal ones were kept is arbitrary
        rows[cut_in_a_tie] = _first_of_the_tied(scores_BN[cut_in_a_tie], values[cut_in_a_tie, k - 1 : k], k)
    rows = rows.sort(dim=1).values
    values, order = scores_BN.gather(1, rows).sort(dim=1, descending=True, stable=True)
    return values, rows.gather(1, order)


def _top_of_chunks(scores_BN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`stable_top` by way of the largest score of each CHUNK of rows, which is found in one fast pass.

    The k chunks with the largest ones hold the answer: of two chunks with equal ones that with the lower rows is taken,
    so the largest scores of these k stand ahead of whatever the others hold.
    """
    B = len(scores_BN)
    chunks_BCW = scores_BN.unflatten(1, (-1, CHUNK))
    chosen = stable_top(chunks_BCW.amax(2), k)[1].sort(dim=1).values
    number = chosen + chunks_BCW.shape[1] * torch.arange(B, device=chosen.device)[:, None]
    candidates = scores_BN.view(-1, CHUNK).index_select(0, number.view(-1)).view(B, -1)
    values, places = stable_top(candidates, k)
    return values, chosen.gather(1, places // CHUNK) * CHUNK + places % CHUNK


def _first_of_the_tied(scores_BN: torch.Tensor, cut_B1: torch.Tensor, k: int) -> torch.Tensor:
    """Rows (B, k) of all scores above the cut, and of those equal to it the lowest rows, as many as fit."""
    above = scores_BN > cut_B1
    tied = scores_BN == cut_B1
    room = k - above.sum(dim=1, keepdim=True)
    kept = above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= room))
    return kept.nonzero()[:, 1].view(-1, k)
