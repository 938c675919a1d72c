"""Somebody else's rankings, read from a Parquet table, as a scorer. Knows users and items by id; knows no model.

Shapes: B users · N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pixrec import storage
from pixrec.data.sequences import Users
from pixrec.errors import InputError
from pixrec.schema import ITEM_IDS, USER_ID
from pixrec.scorers.protocol import Scorer

MAX_LIST_ITEMS = 4_000_000  # a place in a longer list would not fit into a float32 score


class Predictions(Scorer):
    """Ranked lists of the users to be evaluated.

    A listed item scores by its place, any other -inf: it ranks behind all listed ones and ties with all that are not
    listed. Ties are ranked pessimistically, so that a target which is not listed comes last, and so does that of a user
    without a list. `counts` says what did not fit.
    """

    def __init__(self, name: str, user_of: dict[str, int], starts: np.ndarray, rows: np.ndarray, num_items: int,
                 counts: dict[str, int]) -> None:  # fmt: skip
        """user_of: the list of each user; list u holds `rows[starts[u] : starts[u + 1]]`, best first, each row once."""
        self.name, self.counts = name, counts
        self._user_of, self._starts, self._rows, self._num_items = user_of, starts, rows, num_items

    def scores(self, users: Users) -> torch.Tensor:
        """Scores (B, N) float32."""
        scores_BN = np.full((len(users.user_ids), self._num_items), -np.inf, dtype=np.float32)
        for scores, user_id in zip(scores_BN, users.user_ids, strict=True):
            user = self._user_of.get(user_id)
            if user is not None:
                rows = self._rows[self._starts[user] : self._starts[user + 1]]
                scores[rows] = -np.arange(len(rows), dtype=np.float32)
        return torch.from_numpy(scores_BN)


def load_predictions(uri: str, name: str, wanted_users: Sequence[str], item_ids: Sequence[str]) -> Predictions:
    """Read `user_id`, `item_ids` (ranked, best first) of the users in `wanted_users`.

    Counted, not refused: users that are not wanted (`users_unknown`), wanted users without a row (`users_missing`:
    they are misses), items that the catalog lacks (`items_unknown`: left out of the lists), repeats within a list
    (`items_repeated`: the first place counts). Raises InputError on missing columns, wrong types, a user with two
    rows, or where no user is wanted.
    """
    table = _checked(uri, storage.read_table(uri, None))
    users = table.column(USER_ID).cast(pa.string()).combine_chunks()
    place = pc.index_in(users, value_set=pa.array(wanted_users, pa.string()))
    repeated = users.value_counts().filter(pc.greater(users.value_counts().field("counts"), 1))
    if len(repeated):
        raise InputError(f"{uri}: {USER_ID} {repeated[0]['values'].as_py()!r} has several rows; keep one ranked list")
    known = place.is_valid()
    if not pc.any(known).as_py():
        raise InputError(
            f"{uri}: none of its {len(table)} users is a test user of the data set; check that {USER_ID} is spelt alike"
        )
    lists = cast(Any, table.column(ITEM_IDS).filter(known).combine_chunks())
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    if lengths.max(initial=0) > MAX_LIST_ITEMS:
        raise InputError(f"{uri}: a list of {lengths.max():,} items is too long; at most {MAX_LIST_ITEMS:,}")
    rows = pc.index_in(pc.list_flatten(lists).cast(pa.string()), value_set=pa.array(item_ids, pa.string()))
    in_catalog = rows.is_valid().to_numpy(zero_copy_only=False)
    user = np.repeat(np.arange(len(lists)), lengths)[in_catalog]
    row = rows.drop_null().to_numpy().astype(np.int64)
    _, first = np.unique(user * len(item_ids) + row, return_index=True)
    first.sort()  # back to the order of the lists
    counts = {
        "users": len(lists),
        "users_missing": len(wanted_users) - len(lists),
        "users_unknown": len(table) - len(lists),
        "items_unknown": int((~in_catalog).sum()),
        "items_repeated": len(row) - len(first),
    }
    starts = np.searchsorted(user[first], np.arange(len(lists) + 1))
    user_of = {user_id: i for i, user_id in enumerate(users.filter(known).to_pylist())}
    return Predictions(name, user_of, starts, row[first], len(item_ids), counts)


def _checked(uri: str, table: pa.Table) -> pa.Table:
    for column, words in ((USER_ID, "a string"), (ITEM_IDS, "a list of strings, best first")):
        if column not in table.column_names:
            has = ", ".join(table.column_names) or "none"
            raise InputError(f"{uri}: no column {column!r}, which must hold {words}; it has {has}")
    kind = table.schema.field(ITEM_IDS).type
    if not _is_text(table.schema.field(USER_ID).type):
        raise InputError(f"{uri}: column {USER_ID!r} is {table.schema.field(USER_ID).type}; cast it to string")
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not _is_text(kind.value_type):
        raise InputError(f"{uri}: column {ITEM_IDS!r} is {kind}, must be a list of strings; cast it")
    if not len(table):
        raise InputError(f"{uri}: the table is empty; give each test user a ranked list")
    return table


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
