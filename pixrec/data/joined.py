"""Several prepared data sets joined for a stage of training, and a check for leaks from one to another. Knows no model.

The joined data holds no test event of any set: each set's own split says which of its events are for training, and of
the events held out only those for validation are passed on. A user who occurs in two sets counts as two users, an item
in two sets as two items.

Shapes: S sets · N items of all sets · E events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pixrec.data.ids import IdIndex
from pixrec.data.items import ItemTable, join_items
from pixrec.data.sequences import Dataset, HeldOut, Histories
from pixrec.schema import ITEM_ID, TIMESTAMP, USER_ID

_EVENTS_AT_A_TIME = 1_000_000


@dataclass(frozen=True)
class TrainingData:
    """What a stage of training may see: rows are those of `items`, the catalogs of all sets in their order."""

    items: ItemTable
    histories: Sequence[np.ndarray]
    """training histories of the users of all sets, oldest first"""
    counts: np.ndarray
    """int64 (N,): training events of each item"""
    valid: HeldOut
    """validation events of all sets"""


def join_datasets(datasets: Sequence[Dataset]) -> TrainingData:
    """The training and validation events of S sets over their joined catalog; of one set, as they are."""
    if len(datasets) == 1:
        only = datasets[0]
        return TrainingData(only.items, only.training_histories(), only.training_counts(), only.held_out("valid"))
    starts = np.cumsum([0, *(len(dataset.items) for dataset in datasets)])[:-1]
    valid = [dataset.held_out("valid") for dataset in datasets]
    return TrainingData(
        join_items([dataset.items for dataset in datasets]),
        _joined([dataset.training_histories() for dataset in datasets], starts),
        np.concatenate([dataset.training_counts() for dataset in datasets]),
        HeldOut(
            [user for users in valid for user in users.user_ids],
            [history + start for users, start in zip(valid, starts, strict=True) for history in users.histories],
            np.concatenate([users.targets + start for users, start in zip(valid, starts, strict=True)]),
        ),
    )


def _joined(histories: Sequence[Histories], starts: np.ndarray) -> Histories:
    """Those of all sets, whose rows begin at `starts` (S,)."""
    values = np.concatenate([own.flat() + start for own, start in zip(histories, starts, strict=True)])
    ends = np.cumsum(np.concatenate([own.lengths for own in histories]))
    if all(own.is_target is None for own in histories):
        return Histories(values, np.append(0, ends)[:-1], ends)
    marks = [np.ones(own.lengths.sum(), bool) if own.marks is None else own.marks.flat() for own in histories]
    return Histories(values, np.append(0, ends)[:-1], ends, np.concatenate(marks))


def count_leaks(target: Dataset, other: Dataset) -> int:
    """How many held-out events of `target`, validation or test, are training events of `other`, another data set.

    Events are the same where user, item and time agree, items where id and text do. So an event that `other` holds
    under another id, text or time is not found: such a leak goes unnoticed.
    """
    user_of = IdIndex.of(pa.array(target.events.user_ids, pa.large_string()))
    users = user_of.rows_of(pa.array(other.events.user_ids, pa.large_string()))
    rows = target.items.rows_of(other.items.item_ids)
    held_out = _events(target, np.flatnonzero(~target.training_visible()))
    leaks: set[tuple[int, int, int]] = set()  # user, item and time, the two as rows of `target`
    visible = np.flatnonzero(other.training_visible())
    for start in range(0, len(visible), _EVENTS_AT_A_TIME):
        block = _events(other, visible[start : start + _EVENTS_AT_A_TIME], users, rows)
        shared = block.join(held_out, held_out.column_names, join_type="inner")
        leaks.update(zip(*(shared.column(name).to_pylist() for name in held_out.column_names), strict=True))
    item_ids = (target.items.item_ids[row] for _, row, _ in leaks)
    return sum(_text(target, item_id) == _text(other, item_id) for item_id in item_ids)


def _text(dataset: Dataset, item_id: str) -> str:
    return dataset.items.text(dataset.items.row_of[item_id])


def _events(
    dataset: Dataset, chosen: np.ndarray, users: np.ndarray | None = None, rows: np.ndarray | None = None
) -> pa.Table:
    """User, item and time of the events at `chosen`, users and items by row; by those of another set where `users` and
    `rows` say which they are there, and then only events that it could have."""
    events = dataset.events
    user, row = np.searchsorted(events.offsets, chosen, side="right") - 1, events.rows[chosen]
    user, row = user if users is None else users[user], row if rows is None else rows[row]
    known = (user >= 0) & (row >= 0)
    columns = {USER_ID: user[known], ITEM_ID: row[known], TIMESTAMP: events.timestamps[chosen][known]}
    return pa.table({name: pa.array(column, pa.int64()) for name, column in columns.items()})
