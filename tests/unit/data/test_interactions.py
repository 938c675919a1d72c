"""Interactions into sequences: what is rejected, what a core is, how time is split, what is held out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from pixrec.config import PrepareConfig
from pixrec.data import interactions
from pixrec.data.ids import IdIndex
from pixrec.errors import InputError
from pixrec.schema import REJECTS

EVENTS = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
CATALOG = pa.array(["a", "b", "c"], pa.large_string())


def events(rows: list[tuple], *extra: str) -> pa.Table:
    names = [*EVENTS.names, *extra]
    columns = list(zip(*rows, strict=True)) if rows else [[] for _ in names]
    types = [*EVENTS.types, *[pa.float64()] * len(extra)]
    return pa.table({name: pa.array(column, kind) for name, column, kind in zip(names, columns, types, strict=True)})


class Found(NamedTuple):
    """A whole table sorted out as one slice, and its catalog."""

    interactions: interactions.Interactions
    rejects: pa.Table
    counts: dict[str, int]
    item_ids: pa.Array


def sort_out(table: pa.Table, catalog: pa.Array | None, where: str, **options) -> Found:
    item_ids = interactions.seen_items(table, where) if catalog is None else catalog
    found = interactions.usable_interactions(table, IdIndex.of(item_ids).rows_of, where, **options)
    interactions.check_usable(found.counts, where, min_rating=options.get("min_rating"))
    return Found(*found, item_ids)


def usable(rows: list[tuple], catalog: pa.Array | None = CATALOG, **options) -> Found:
    return sort_out(events(rows), catalog, "events.parquet", **options)


def in_order(found: Found) -> interactions.Ordered:
    return interactions.in_order(found.interactions)


def spelt(found: Found, kept: interactions.Ordered | None = None) -> list[dict[str, Any]]:
    kept = in_order(found) if kept is None else kept
    return [row for table in interactions.sequences(kept, found.item_ids) for row in table.to_pylist()]


def test_unusable_events_are_rejected_one_by_one():
    found = usable(
        [
            ("u", "a", 1),
            (None, "a", 2),
            ("u", "", 3),
            ("u", "b", None),
            ("u", "nowhere", 5),
            ("v", "c", 6),
            ("", "z", 7),
        ]
    )
    assert [(row["key"].partition(":")[0], row["reason"]) for row in found.rejects.to_pylist()] == [
        ("row 1", "user_id is empty"),
        ("row 2", "item_id is empty"),
        ("row 3", "timestamp is empty"),
        ("row 4", "item is not in the items table"),
        ("row 6", "user_id is empty"),
    ]
    assert found.rejects.to_pylist()[3]["key"] == "row 4: user_id u, item_id nowhere"
    assert set(found.rejects.column("source").to_pylist()) == {"interactions"}
    assert spelt(found) == [
        {"user_id": "u", "item_ids": ["a"], "timestamps": [1]},
        {"user_id": "v", "item_ids": ["c"], "timestamps": [6]},
    ]


@pytest.mark.parametrize(
    ("rows", "catalog", "message"),
    [
        ([], CATALOG, "events.parquet: the interactions table is empty"),
        ([("u", "x", 1), ("v", "y", 2)], CATALOG, "none of its 2 events names an item of the items table"),
        ([(None, "a", 1), ("v", "a", None)], CATALOG, "none of its 2 events has user_id, item_id and timestamp"),
        ([(None, "a", 1)], None, "none of its 1 events has user_id, item_id and timestamp"),
        ([(None, "a", 1), ("u", "x", 1)], CATALOG, "none of its 2 events names an item"),
    ],
)
def test_interactions_of_which_none_is_usable(rows: list, catalog: pa.Array | None, message: str):
    with pytest.raises(InputError, match=message):
        usable(rows, catalog)


def test_a_null_typed_column_is_empty_throughout():
    table = pa.table({"user_id": ["u"], "item_id": ["a"], "timestamp": pa.nulls(1)})
    with pytest.raises(InputError, match="none of its 1 events has"):
        sort_out(table, CATALOG, "events")


def test_without_a_catalog_it_is_the_ids_seen():
    found = usable([("u", "q", 1), (None, "lost", 2), ("v", "p", 3), ("u", "q", 4)], None)
    assert found.item_ids.to_pylist() == ["q", "p"]
    assert len(found.rejects) == 1


def test_min_rating_leaves_out_low_and_unrated_events():
    rows = [("u", "a", 1, 5.0), ("u", "b", 2, 2.0), ("u", "c", 3, None), ("u", "c", 4, 3.0), (None, "c", 4, 3.0)]
    table = events(rows, "rating")
    found = sort_out(table, CATALOG, "events", min_rating=3.0)
    assert (len(found.interactions), found.counts["filtered_rating"], len(found.rejects)) == (2, 2, 1)
    assert spelt(found)[0]["item_ids"] == ["a", "c"]
    with pytest.raises(InputError, match=r"no event is rated prepare\.min_rating 9 or above"):
        sort_out(table, CATALOG, "events", min_rating=9)


def test_whole_number_ratings_and_small_times():
    table = pa.table(
        {"user_id": ["u"], "item_id": ["a"], "timestamp": pa.array([7], pa.int32()), "rating": pa.array([4], pa.int8())}
    )
    assert len(sort_out(table, CATALOG, "events", min_rating=4).interactions) == 1


def test_a_time_beyond_int64():
    table = pa.table({"user_id": ["u"], "item_id": ["a"], "timestamp": pa.array([2**63], pa.uint64())})
    with pytest.raises(InputError, match="'timestamp' holds a value beyond int64"):
        sort_out(table, CATALOG, "events")


def test_sequences_are_in_time_order_and_equal_times_in_input_order():
    rows = [("v", "a", 9), ("u", "c", 5), ("u", "b", 5), ("v", "b", -1), ("u", "a", 5), ("u", "b", 4)]
    assert spelt(usable(rows)) == [
        {"user_id": "v", "item_ids": ["b", "a"], "timestamps": [-1, 9]},
        {"user_id": "u", "item_ids": ["b", "c", "b", "a"], "timestamps": [4, 5, 5, 5]},
    ]


def test_sequences_come_in_parts_that_split_no_user(monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(0)
    rows = [(f"u{random.integers(20)}", "abc"[random.integers(3)], int(random.integers(9))) for _ in range(200)]
    kept = usable(rows)
    whole = spelt(kept)
    monkeypatch.setattr(interactions, "_EVENTS_PER_PART", 30)
    parts = list(interactions.sequences(in_order(kept), kept.item_ids))
    assert len(parts) > 3
    assert spelt(kept) == whole
    assert len({row["user_id"] for row in whole}) == len(whole)


def plain_core(pairs: list[tuple[str, str]], min_user: int, min_item: int) -> list[tuple[str, str]]:
    """The definition, slowly."""
    while True:
        users, items = [user for user, _ in pairs], [item for _, item in pairs]
        kept = [(u, i) for u, i in pairs if users.count(u) >= min_user and items.count(i) >= min_item]
        if kept == pairs:
            return kept
        pairs = kept


def core(found: Found, min_user: int, min_item: int) -> interactions.Ordered:
    whole, num_items = in_order(found), len(found.item_ids)

    def count(dead: np.ndarray) -> np.ndarray:
        return np.bincount(whole.item[interactions.survivors(whole, dead, min_user)], minlength=num_items)

    dead, counts = interactions.core(count, num_items, min_user, min_item)
    kept = whole.only(interactions.survivors(whole, dead, min_user))
    assert np.bincount(kept.item, minlength=num_items).tolist() == counts.tolist()
    return kept


@pytest.mark.parametrize(("min_user", "min_item"), [(1, 1), (3, 1), (1, 4), (3, 4), (4, 6)])
def test_core_is_repeated_until_stable(min_user: int, min_item: int):
    random = np.random.default_rng(3)
    skewed = (random.random((150, 2)) ** 2 * [30, 20]).astype(int)
    pairs = [(f"u{user}", f"i{item}") for user, item in skewed]
    found = usable([(user, item, row) for row, (user, item) in enumerate(pairs)], None)
    kept = core(found, min_user, min_item)
    pairs_kept = [
        (time, row["user_id"], item)
        for row in spelt(found, kept)
        for time, item in zip(row["timestamps"], row["item_ids"], strict=True)
    ]
    assert [pair[1:] for pair in sorted(pairs_kept)] == plain_core(pairs, min_user, min_item)


def test_a_core_of_nobody_names_the_keys():
    with pytest.raises(InputError, match=r"prepare\.min_user_events 2 and prepare\.min_item_events 1; lower them"):
        core(usable([("u", "a", 1), ("v", "a", 1)]), 2, 1)


def test_split_block():
    times = np.random.default_rng(0).permutation(100)
    assert interactions.split_block(times, PrepareConfig()) == {"kind": "leave_one_out"}
    temporal = PrepareConfig(split="temporal", temporal_valid_fraction=0.25, temporal_test_fraction=0.125)
    assert interactions.split_block(times, temporal) == {"kind": "temporal", "valid_start_ms": 62, "test_start_ms": 87}


@pytest.mark.parametrize("times", [[5] * 100, [1] * 95 + [2] * 5, [1] + [2] * 99])
def test_a_temporal_split_needs_three_periods(times: list[int]):
    with pytest.raises(InputError, match=r"too few different times.*set prepare\.split to leave_one_out"):
        interactions.split_block(np.array(times), PrepareConfig(split="temporal"))


def test_of_repeated_events_the_first_stays():
    rows = [("u", "a", 1), ("u", "a", 1), ("v", "a", 1), ("u", "b", 1), ("u", "a", 2), ("u", "a", 1), ("v", "a", 1)]
    found = usable(rows)
    whole = in_order(found)
    kept = whole.only(interactions.is_first(whole))
    assert spelt(found, kept) == [
        {"user_id": "u", "item_ids": ["a", "b", "a"], "timestamps": [1, 1, 2]},
        {"user_id": "v", "item_ids": ["a"], "timestamps": [1]},
    ]
    assert interactions.is_first(kept).tolist() == [True] * 4


def test_events_of_two_kinds_are_no_repeats():
    table = pa.table({"user_id": ["u"] * 4, "item_id": ["a"] * 4, "timestamp": [1] * 4, "event": [*"vbvb"]})
    found = interactions.usable_interactions(table, lambda ids: np.zeros(len(ids), np.int32), "t").interactions
    whole = interactions.in_order(found)
    assert interactions.is_first(whole).tolist() == [True, True, False, False]


def test_rejects_name_row_user_and_item():
    table = usable([("u", "a", 1), (None, "b", 2), ("v", None, 3), ("w", "x", 4)]).rejects
    assert table.schema == REJECTS
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("interactions", "row 1: user_id None, item_id b", "user_id is empty"),
        ("interactions", "row 2: user_id v, item_id None", "item_id is empty"),
        ("interactions", "row 3: user_id w, item_id x", "item is not in the items table"),
    ]


class Held(NamedTuple):
    interactions: interactions.Ordered
    items: int
    test_targets: int


def held_out(rows: list[tuple], **settings) -> tuple[Held, dict[str, list[str]]]:
    """What stays of `rows`, as the events and as each user's items in order."""
    config = PrepareConfig(**{"cold_item_share": 0.25} | settings)
    found = usable(rows, None)
    whole, split = in_order(found), interactions.split_block(found.interactions.timestamp, config)
    if not config.cold_item_share:
        return Held(whole, 0, 0), {row["user_id"]: row["item_ids"] for row in spelt(found)}
    cold = interactions.draw_cold_items(np.bincount(whole.item), config)
    keep, test_targets = interactions.hold_out_items(whole, cold, split)
    kept = whole.only(keep)
    return (
        Held(kept, int(cold.sum()), test_targets),
        {row["user_id"]: row["item_ids"] for row in spelt(found, kept)},
    )


WALKS = [(f"u{user}", f"i{(user * 7 + step * step) % 12}", step) for user in range(30) for step in range(8)]


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_held_out_items_are_test_targets_or_nothing(split: str):
    kept, sequences = held_out(WALKS, split=split)
    assert kept.items == 3
    whole = {row["user_id"]: row["item_ids"] for row in spelt(usable(WALKS, None))}
    cold = {item for items in whole.values() for item in items} - {
        i for items in sequences.values() for i in items[:-1]
    }
    assert len(cold) == 3
    for user, items in whole.items():
        expected = [item for item in items[:-1] if item not in cold] + items[-1:]
        assert sequences[user] == expected, "the last event stays, whatever its item"
    assert kept.test_targets == sum(items[-1] in cold for items in sequences.values()) > 0
    assert len(kept.interactions) == sum(map(len, sequences.values()))


def test_a_held_out_item_is_no_target_before_the_test_period():
    early = [(f"early{user}", f"i{(user + step) % 12}", step) for user in range(12) for step in range(4)]
    whole, sequences = held_out(WALKS + early)
    kept, timed = held_out(WALKS + early, split="temporal")
    cold = {f"i{row}" for row in range(12)} - {item for items in sequences.values() for item in items[:-1]}
    assert kept.items == whole.items == len(cold) == 3
    assert kept.test_targets == whole.test_targets - 3, "of the users who went early, three end at a held-out item"
    for user, items in timed.items():
        expected = [item for item in sequences[user] if item not in cold] if "early" in user else sequences[user]
        assert items == expected


def test_a_user_of_held_out_items_alone_leaves():
    """With nothing before it, a target would be taken for training."""
    rows = [(f"u{item}", f"i{item}", step) for item in range(8) for step in range(2)]
    kept, sequences = held_out(rows)
    assert (kept.items, kept.test_targets) == (2, 0)
    assert len(sequences) == 6


def test_the_draw_of_held_out_items_is_seeded():
    same, other = held_out(WALKS)[1], held_out(WALKS, seed=1)[1]
    assert held_out(WALKS)[1] == same != other
    untouched, _ = held_out(WALKS, cold_item_share=0.0)
    assert (len(untouched.interactions), untouched.items) == (len(WALKS), 0)


@pytest.mark.parametrize(
    ("share", "message"), [(0.01, "holds out 0 of 12 items; raise"), (0.99, "12 of 12 items; lower")]
)
def test_a_share_of_no_item_or_of_all_is_refused(share: float, message: str):
    with pytest.raises(InputError, match=f"prepare.cold_item_share {share} .*{message} it"):
        held_out(WALKS, cold_item_share=share)


@pytest.mark.parametrize("low", [-(2**63), -5, 1_600_000_000_000])
@pytest.mark.parametrize("spread", [1, 3, 70_000, 2**40, 2**63])
def test_order_statistics_are_those_of_sorting(low: int, spread: int):
    rng = np.random.default_rng(0)
    times = np.sort(np.array([min(low + int(x * spread), 2**63 - 1) for x in rng.random(500) ** 3], np.int64))
    shares = np.array_split(rng.permutation(times), 3)
    rounds = []

    def histogram(windows):
        rounds.append(windows)
        return [sum(interactions.count_bins(share, window) for share in shares) for window in windows]

    ranks = [0, 250, 251, 499]
    found = interactions.order_statistics(ranks, int(times[0]), int(times[-1]), histogram)
    assert found == times[ranks].tolist()
    assert len(rounds) <= 4


def test_a_user_is_dealt_to_one_partition_whatever_else_is_in_the_slice():
    random = np.random.default_rng(0)
    rows = [(f"u{random.integers(40)}", "abc"[random.integers(3)], step) for step in range(300)]
    whole, half = usable(rows).interactions, usable(rows[150:]).interactions
    homes: dict[str, int] = {}
    for found in (whole, half):
        shares = interactions.deal_out(found, 5)
        assert sum(map(len, shares)) == len(found)
        for number, share in enumerate(shares):
            assert np.all(np.diff(share.timestamp) > 0), "in input order"
            _, first = np.unique(share.user, return_index=True)
            assert np.all(np.diff(first) > 0), "users in order of appearance"
            for user in share.user_ids.to_pylist():
                assert homes.setdefault(user, number) == number
    assert set(homes.values()) == set(range(5))
    pieces = [interactions.deal_out(usable(part).interactions, 5) for part in (rows[:90], rows[90:])]
    for number, share in enumerate(interactions.deal_out(whole, 5)):
        gathered = interactions.gather([piece[number] for piece in pieces])
        assert gathered.user_ids.to_pylist() == share.user_ids.to_pylist()
        for name in ("user", "item", "timestamp"):
            assert getattr(gathered, name).tolist() == getattr(share, name).tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("spread", [1, 1000, 2**30])
def test_packed_sorting_is_stable_sorting(dtype: type, spread: int):
    values = np.random.default_rng(0).integers(-spread, spread, 2000).astype(dtype)
    assert interactions._stable_order(values).tolist() == np.argsort(values, kind="stable").tolist()
    far = np.array([2**62, -(2**62), 0, 2**62], np.int64)
    assert interactions._stable_order(far).tolist() == [1, 2, 0, 3]


def test_kinds_of_events_are_words_and_some_are_kept():
    rows = [("u", "a", 1), ("u", "b", 2), ("v", "c", 3), ("v", "a", 4)]
    table = events(rows).append_column("event", pa.array(["view", "buy", None, "view"]))
    found = sort_out(table, CATALOG, "events", wanted={"buy"})
    assert found.interactions.kinds == ("view", "buy")
    assert found.interactions.event.tolist() == [1]
    assert found.counts["filtered_event"] == 2
    assert [row["reason"] for row in found.rejects.to_pylist()] == ["event is empty"]
    words = {"user_id": ["u"] * 256, "item_id": ["a"] * 256, "timestamp": range(256)}
    many = pa.table({**words, "event": [str(number) for number in range(256)]})
    with pytest.raises(InputError, match="'event' holds more than 255 different words"):
        sort_out(many, CATALOG, "events")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_ids_of_every_kind_of_string(kind: pa.DataType):
    table = pa.table({name: pa.array(["a", None, "b", "a"]).cast(kind) for name in ("user_id", "item_id")})
    whole = pa.concat_tables([table, table.slice(2)]).append_column("timestamp", pa.array(range(6)))
    found = sort_out(whole, CATALOG, "events")
    assert spelt(found) == [
        {"user_id": "a", "item_ids": ["a"] * 3, "timestamps": [0, 3, 5]},
        {"user_id": "b", "item_ids": ["b"] * 2, "timestamps": [2, 4]},
    ]
