from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import tiny_dataset

from pixrec import storage
from pixrec.data.arrays import write_arrays, write_flat
from pixrec.data.sequences import Dataset, load_dataset, sample_users, source_name
from pixrec.errors import ArtifactError, InputError

LEAVE_ONE_OUT = {"kind": "leave_one_out"}
TEMPORAL = {"kind": "temporal", "valid_start_ms": 100, "test_start_ms": 200}


ITEM_IDS = list("abcdef")


def dataset(folder: Path, users: dict[str, list[tuple[str, int]]], split: dict, **more) -> Dataset:
    uri = str(folder)
    events = [event for user in users.values() for event in user]
    offsets = np.cumsum([0, *map(len, users.values())])
    storage.write_table(storage.join(uri, "items", "part-0.parquet"), pa.table({"item_id": ITEM_IDS}))
    write_arrays(
        uri,
        item_ids=ITEM_IDS,
        has_image=np.zeros(6, bool),
        training_count=np.zeros(6),
        user_ids=list(users),
        user_offset=offsets,
        item_row=np.array([ITEM_IDS.index(item) for item, _ in events], np.int32),
        timestamp=np.array([time for _, time in events], np.int64),
    )
    storage.write_json(storage.join(uri, "dataset.json"), {"format": 2, "split": split, "fingerprint": "f"})
    return load_dataset(uri)


def spelt(data: Dataset, rows: np.ndarray) -> str:
    return "".join(data.items.item_ids[row] for row in rows)


def held_out(data: Dataset, part) -> dict[str, tuple[str, str]]:
    users, histories, targets, _ = data.held_out(part)
    assert targets.shape == (len(users),)
    return {
        user: (spelt(data, history), data.items.item_ids[target])
        for user, history, target in zip(users, histories, targets, strict=True)
    }


def at(items: str, *times: int) -> list[tuple[str, int]]:
    return list(zip(items, times or range(len(items)), strict=True))


def test_leave_one_out(tmp_path: Path):
    users = {"one": at("a"), "two": at("ab"), "three": at("abc"), "five": at("abcda")}
    data = dataset(tmp_path, users, LEAVE_ONE_OUT)
    assert [spelt(data, history) for history in data.training_histories()] == ["a", "a", "a", "abc"]
    assert held_out(data, "valid") == {"three": ("a", "b"), "five": ("abc", "d")}
    assert held_out(data, "test") == {"two": ("a", "b"), "three": ("ab", "c"), "five": ("abcd", "a")}
    assert data.training_counts().tolist() == [4, 1, 1, 0, 0, 0]


def test_temporal(tmp_path: Path):
    users = {
        "all periods": at("abcdef", 10, 20, 110, 120, 210, 220),
        "new in validation": at("abc", 100, 150, 199),
        "new in test": at("ab", 200, 300),
        "single in test": at("a", 250),
        "training only": at("ab", 1, 99),
        "no test": at("abc", 1, 2, 150),
    }
    data = dataset(tmp_path, users, TEMPORAL)
    assert [spelt(data, history) for history in data.training_histories()] == ["ab", "ab", "ab"]
    assert held_out(data, "valid") == {
        "all periods": ("abc", "d"),
        "new in validation": ("ab", "c"),
        "no test": ("ab", "c"),
    }
    assert held_out(data, "test") == {"all periods": ("abcde", "f"), "new in test": ("a", "b")}
    assert data.training_counts().tolist() == [3, 3, 0, 0, 0, 0]


def test_training_marks_the_events_of_target_kinds_where_its_histories_hold_any(tmp_path: Path):
    data = dataset(tmp_path, {"one": at("abcdef"), "two": at("abcd")}, LEAVE_ONE_OUT)
    assert data.training_histories().marks is None
    kinds = {"is_target": np.array([0, 1, 0, 1, 1, 0, 1, 0, 1, 1], bool)}
    events = dataclasses.replace(data.events, **kinds)
    histories = dataclasses.replace(data, events=events).training_histories()
    assert [spelt(data, history) for history in histories] == ["abc", "ab"]
    assert [marks.tolist() for marks in histories.marks] == [[False, True, False], [True, False]]
    events = dataclasses.replace(data.events, **kinds, is_history=~kinds["is_target"])  # targets that no history holds
    histories = dataclasses.replace(data, events=events).training_histories()
    assert [spelt(data, history) for history in histories] == ["ac", "b"]
    assert histories.marks is None


def test_equal_times_stay_on_one_side_of_a_cut(tmp_path: Path):
    data = dataset(tmp_path, {"u": at("abcdef", 99, 99, 100, 100, 200, 200)}, TEMPORAL)
    assert [spelt(data, history) for history in data.training_histories()] == ["ab"]
    assert held_out(data, "valid") == {"u": ("abc", "d")}
    assert held_out(data, "test") == {"u": ("abcde", "f")}


@pytest.mark.parametrize("split", [LEAVE_ONE_OUT, TEMPORAL])
def test_training_sees_no_held_out_event(tmp_path: Path, split: dict):
    """Every event is told apart by its place in its user's sequence: training's end lies before every target."""
    random = np.random.default_rng(0)
    users = {}
    for user in range(300):
        times = np.sort(random.integers(0, 300, size=random.integers(1, 8)))
        users[str(user)] = [("abcdef"[random.integers(6)], int(time)) for time in times]
    data = dataset(tmp_path, users, split)
    seen = dict(zip(users, data._training_lengths().tolist(), strict=True))
    assert sum(seen.values()) == data.training_counts().sum()
    assert sorted(map(len, data.training_histories())) == sorted(length for length in seen.values() if length)
    for part in ("valid", "test"):
        held = data.held_out(part)
        assert held.user_ids
        for user, history, target in zip(held.user_ids, held.histories, held.targets, strict=True):
            position = len(history)
            assert position >= max(1, seen[user])
            assert users[user][position][0] == data.items.item_ids[target]
            assert spelt(data, history) == "".join(item for item, _ in users[user][:position])
    histories = {part: dict(zip(*data.held_out(part)[:2], strict=True)) for part in ("valid", "test")}
    for user in histories["valid"].keys() & histories["test"].keys():
        assert len(histories["valid"][user]) < len(histories["test"][user])


def test_an_incomplete_folder_is_no_data_set(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"holds no dataset\.json.*pixrec prepare"):
        load_dataset(str(tmp_path))
    storage.write_json(str(tmp_path / "dataset.json"), {"format": 2, "split": LEAVE_ONE_OUT, "fingerprint": "f"})
    with pytest.raises(ArtifactError, match="no complete data set"):
        load_dataset(str(tmp_path))
    storage.write_bytes(str(tmp_path / "dataset.json"), b"[]")
    with pytest.raises(ArtifactError, match=r"dataset\.json is damaged: it says nothing of split"):
        load_dataset(str(tmp_path))


def test_an_array_that_is_gone_or_damaged_is_no_data_set(tmp_path: Path):
    dataset(tmp_path, {"u": at("abc")}, LEAVE_ONE_OUT)
    for name in ("timestamp.npy", "user_id.arrow"):
        file = tmp_path / "arrays" / name
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ArtifactError, match=f"no complete data set .*{name}.* pixrec prepare"):
            load_dataset(str(tmp_path))
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ArtifactError, match=f"{name} is damaged.*make the artifact again"):
            load_dataset(str(tmp_path))
        file.write_bytes(content)
    assert len(load_dataset(str(tmp_path)).events.rows) == 3


def test_items_that_lost_their_ids_are_no_items(tmp_path: Path):
    data = dataset(tmp_path, {"u": at("abc")}, LEAVE_ONE_OUT)
    file = storage.list_files(str(tmp_path / "items"), ".parquet")[0]
    storage.write_table(file, pa.table({"title": ["t"] * 6}))
    with pytest.raises(ArtifactError, match=r"no complete data set .*item_id.* pixrec prepare"):
        data.items.text(0)


def test_arrays_must_agree(tmp_path: Path):
    data = dataset(tmp_path, {"u": at("abc")}, LEAVE_ONE_OUT)
    write_flat(str(tmp_path / "arrays"), "item_row", 2, [data.events.rows[:2]])
    with pytest.raises(ArtifactError, match=r"names \[2, 3\] events of 1 users"):
        load_dataset(str(tmp_path))


def test_a_data_set_of_another_format_names_the_cure(tmp_path: Path):
    storage.write_json(str(tmp_path / "dataset.json"), {"split": LEAVE_ONE_OUT, "fingerprint": "f"})
    with pytest.raises(ArtifactError, match="is of format 1, this pixrec reads format 2; run pixrec prepare again"):
        load_dataset(str(tmp_path))
    storage.write_json(str(tmp_path / "dataset.json"), {"format": 3, "split": LEAVE_ONE_OUT, "fingerprint": "f"})
    with pytest.raises(ArtifactError, match=r"is of format 3.*use the pixrec that made it"):
        load_dataset(str(tmp_path))


def test_events_are_mapped_and_ids_made_when_asked_for(tmp_path: Path):
    data = dataset(tmp_path, {"u": at("abc"), "v": at("de")}, LEAVE_ONE_OUT)
    assert isinstance(data.events.rows.base, np.memmap)
    assert data.events.rows.dtype == np.int32
    assert data.events.user_ids == ["u", "v"]
    assert data.events.user_ids[1] == "v"
    assert [*data.held_out("test").user_ids] == ["u", "v"]
    assert data.items.row_of["c"] == 2
    assert data.items.row_of.get("z") is None
    assert "z" not in data.items.row_of


@pytest.mark.parametrize("split", [LEAVE_ONE_OUT, TEMPORAL])
def test_timestamps_lie_beside_the_events_that_they_tell_of(tmp_path: Path, split: dict):
    random = np.random.default_rng(0)
    users = {
        str(user): [("abcdef"[random.integers(6)], int(time)) for time in np.sort(random.integers(0, 300, length))]
        for user, length in enumerate(random.integers(1, 8, 50))
    }
    data = dataset(tmp_path, users, split)
    for history, times in zip(data.training_histories(), data.training_timestamps(), strict=True):
        assert list(zip(spelt(data, history), times.tolist(), strict=True)) in [e[: len(times)] for e in users.values()]
    for part in ("valid", "test"):
        held = data.held_out(part)
        assert held.timestamps is not None
        for user, history, times in zip(held.user_ids, held.histories, held.timestamps, strict=True):
            assert list(zip(spelt(data, history), times.tolist(), strict=True)) == users[user][: len(history)]
        few = sample_users(held, 5, 0)
        assert few.timestamps is not None
        assert [few.timestamps[i].tolist() for i in range(5)] == [
            held.timestamps[held.user_ids.index(user)].tolist() for user in few.user_ids
        ]


@pytest.mark.parametrize("step", [1, 1000])
def test_timestamps_that_number_the_events_are_no_times(tmp_path: Path, step: int):
    """Also where a filter took an event out here and there, and where users begin at different moments."""
    users = {str(u): at("abcdef", *range(7 * u, 7 * u + 6 * step, step)) for u in range(9)}
    users["gap"] = at("abc", 0, step, 3 * step)
    data = dataset(tmp_path, users, LEAVE_ONE_OUT)
    assert not data.tells_time
    assert data.held_out("test").timestamps is None
    with pytest.raises(InputError, match=r"order of the events.*model\.compact\.time"):
        data.training_timestamps()


def test_events_of_one_moment_do_not_hide_that_the_others_have_times(tmp_path: Path):
    baskets = {str(u): at("abcdef", 5, 5, 5, 5, 5, 40 + 13 * u) for u in range(9)}
    assert dataset(tmp_path, baskets, LEAVE_ONE_OUT).tells_time


@pytest.mark.parametrize(
    ("interactions", "name"),
    [
        ("/shops/lamps/interactions.parquet", "lamps"),
        ("/shops/lamps/interactions", "lamps"),
        ("/raw/All_Beauty.jsonl.gz", "All_Beauty"),
        ("s3://shop/lamps/events/", "lamps"),
        ("s3://shop/ratings.csv", "shop"),
    ],
)
def test_a_data_set_is_called_after_its_source(interactions: str, name: str):
    assert source_name(interactions) == name


def test_a_data_set_without_a_name_is_called_as_its_folder():
    dataset = tiny_dataset(uri="/data/lamps")
    assert dataset.name == "lamps"
    assert dataclasses.replace(dataset, info={**dataset.info, "name": "Lamps & chairs"}).name == "Lamps & chairs"
