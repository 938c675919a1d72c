"""Tables worked on in many pieces and partitions: the same data set, and after a kill as well."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_shop import everything_below, silent

from benchmarks.faults.prepare_kill import contents
from pixrec.cluster import prepare as module
from pixrec.cluster.prepare import check_counts, prepare
from pixrec.config import PrepareConfig
from pixrec.data import partitions
from pixrec.data.sequences import load_dataset
from pixrec.errors import InputError

pytestmark = pytest.mark.usefixtures("slices_here")


def write_log(folder: Path, *, events: int = 3000, kinds: bool = False) -> tuple[str, str]:
    """Items and a log with repeats, unknown items, empty cells and equal times, in row groups of odd sizes."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    items = [f"i{row}" for row in rng.permutation(90)]
    columns: dict[str, Any] = {
        "user_id": [f"user {u}" if u else None for u in (rng.random(events) ** 2 * 150).astype(int)],
        "item_id": [f"i{i}" for i in (rng.random(events) ** 2 * 100).astype(int)],
        "timestamp": rng.integers(0, 500, events) - 250,
        "rating": rng.integers(1, 6, events).astype(float),
    }
    if kinds:
        chosen = rng.choice(4, events, p=[0.6, 0.2, 0.19, 0.01])
        columns["event"] = [["view", "cart", "purchase", None][kind] for kind in chosen]
    pq.write_table(pa.table({"item_id": items, "title": items}), folder / "items.parquet", row_group_size=40)
    for number, (start, stop) in enumerate([(0, events // 3), (events // 3, events)]):
        part = pa.table(columns).slice(start, stop - start)
        pq.write_table(part, folder / f"log-{number}.parquet", row_group_size=170)
    return str(folder / "items.parquet"), str(folder)


@pytest.fixture
def log(tmp_path: Path) -> tuple[str, str]:
    items, folder = write_log(tmp_path / "in")
    os.rename(items, tmp_path / "items.parquet")
    return str(tmp_path / "items.parquet"), folder


CONFIG = PrepareConfig(min_user_events=8, min_item_events=12, min_rating=2.0, split="temporal", cold_item_share=0.1)


def histories(uri: Path) -> dict[str, tuple]:
    data = load_dataset(str(uri))
    rows, offsets = data.events.rows, data.events.offsets
    return {
        user: (tuple(rows[start:end].tolist()), tuple(data.events.timestamps[start:end].tolist()))
        for user, start, end in zip(data.events.user_ids, offsets[:-1], offsets[1:], strict=True)
    }


def small_pieces(monkeypatch: pytest.MonkeyPatch, *, partition: int = 500) -> None:
    monkeypatch.setattr(partitions, "EVENTS_PER_PARTITION", partition)
    monkeypatch.setattr(partitions, "ROWS_PER_PIECE", 300)


@pytest.mark.parametrize("with_items", [True, False])
def test_partitions_change_nothing_but_the_order_of_users(
    log: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_items: bool
):
    items = log[0] if with_items else None
    whole = prepare(items, log[1], str(tmp_path / "whole"), CONFIG, silent)
    small_pieces(monkeypatch)
    parted = prepare(items, log[1], str(tmp_path / "parted"), CONFIG, silent)
    check_counts(parted)
    assert min(value for name, value in parted["interactions"].items() if name != "filtered_repeats") > 0
    for name in ("items", "interactions", "cold", "users", "split", "rejects"):
        assert parted[name] == whole[name], name
    assert len(list((tmp_path / "parted" / "sequences").iterdir())) == 6 > 1
    assert histories(tmp_path / "parted") == histories(tmp_path / "whole")
    one, other = (load_dataset(str(tmp_path / name)) for name in ("whole", "parted"))
    assert one.items.item_ids == other.items.item_ids
    assert one.training_counts().tolist() == other.training_counts().tolist()
    for name in ("training_count", "has_image"):
        arrays = [np.load(tmp_path / place / "arrays" / f"{name}.npy") for place in ("whole", "parted")]
        np.testing.assert_array_equal(*arrays)
    assert arrays[0].any() == one.items.with_image.any()
    rejects = [pq.read_table(tmp_path / name / "rejects").sort_by("key") for name in ("whole", "parted")]
    assert rejects[0].equals(rejects[1])
    assert len(rejects[0]) == whole["interactions"]["rejected"] > 0


def test_sequences_and_arrays_say_the_same(log: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_pieces(monkeypatch)
    prepare(*log, str(tmp_path / "out"), CONFIG, silent)
    data = load_dataset(str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out" / "sequences")
    assert data.events.user_ids == table.column("user_id").to_pylist()
    ids = np.array(data.items.item_ids)
    assert [ids[h].tolist() for h in np.split(data.events.rows, data.events.offsets[1:-1])] == table.column(
        "item_ids"
    ).to_pylist()
    assert data.events.timestamps.tolist() == [time for row in table.column("timestamps").to_pylist() for time in row]
    stored = np.load(tmp_path / "out" / "arrays" / "training_count.npy")
    assert stored.tolist() == data.training_counts().tolist()
    assert {row: data.items.row_of[item] for row, item in enumerate(data.items.item_ids)} == {r: r for r in range(90)}


def test_a_user_is_in_one_partition(log: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_pieces(monkeypatch, partition=100)
    info = prepare(*log, str(tmp_path / "out"), PrepareConfig(), silent)
    users = pq.read_table(tmp_path / "out" / "sequences").column("user_id").to_pylist()
    assert len(set(users)) == len(users) == info["users"]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is tidied up."""


@pytest.mark.parametrize("at", [1, 4, 9, 14, 20, 26, 30, 33])
def test_what_was_done_before_a_kill_is_not_done_again(
    log: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    small_pieces(monkeypatch)
    prepare(*log, str(tmp_path / "whole"), CONFIG, silent)
    done: list[str] = []
    once = partitions.once

    def counted(row: dict[str, Any], *, step: Any, receipts: str) -> dict[str, Any]:
        if len(done) == at:
            raise Killed
        done.append(f"{receipts} {row['number']}")
        return once(row, step=step, receipts=receipts)

    monkeypatch.setattr(partitions, "once", counted)
    with pytest.raises(Killed):
        prepare(*log, str(tmp_path / "killed"), CONFIG, silent)
    assert not (tmp_path / "killed").exists()
    before, at = len(done), 10**9
    prepare(*log, str(tmp_path / "killed"), CONFIG, silent)
    assert len(set(done)) == len(done) > before
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "items.parquet", "killed", "whole"]


def test_other_arguments_begin_anew(log: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "check_counts", lambda info: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(*log, str(tmp_path / "out"), CONFIG, silent)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.work-")]
    with pytest.raises(Killed):
        prepare(*log, str(tmp_path / "out"), PrepareConfig(), silent)
    now = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.work-")]
    assert len(left) == len(now) == 1
    assert left != now


def test_sigkill_and_again(log: tuple[str, str], tmp_path: Path):
    """A process of its own, killed when it has written something, then run again."""
    prepare(*log, str(tmp_path / "whole"), CONFIG, silent)
    script = (
        "import os, signal, sys\n"
        "from pixrec.cluster.prepare import prepare\n"
        "from pixrec.config import PrepareConfig\n"
        "def step(words, *_):\n"
        "    if words == sys.argv[4]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = PrepareConfig(min_user_events=8, min_item_events=12, min_rating=2.0, split='temporal',"
        " cold_item_share=0.1)\n"
        "prepare(*sys.argv[1:4], config, step)\n"
    )
    for words, code in (("ordering events", -signal.SIGKILL), ("writing sequences", -signal.SIGKILL), ("", 0)):
        run = subprocess.run([sys.executable, "-c", script, *log, str(tmp_path / "out"), words], timeout=120)
        assert run.returncode == code
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KINDS = PrepareConfig(history_events=("view", "purchase"), target_events=("purchase",), min_user_events=3)


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_kinds_of_events(tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch):
    small_pieces(monkeypatch)
    items, folder = write_log(tmp_path / "in", kinds=True)
    os.rename(items, tmp_path / "items.parquet")
    info = prepare(
        str(tmp_path / "items.parquet"), folder, str(tmp_path / "out"), dataclasses.replace(KINDS, split=split), silent
    )
    check_counts(info)
    assert info["events"] == {
        "kinds": ["purchase", "view"],
        "history": ["view", "purchase"],
        "target": ["purchase"],
    }
    assert info["interactions"]["filtered_event"] > 0
    assert info["rejects"]["interactions: event is empty"] > 0
    data = load_dataset(str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out" / "sequences").to_pylist()
    ids = data.items.item_ids
    start = (
        {"valid": 0, "test": 0}
        if split == "leave_one_out"
        else {p: info["split"][f"{p}_start_ms"] for p in ("valid", "test")}
    )
    for part in ("test", "valid"):
        held = data.held_out(part)
        assert len(held.targets) > 20
        found = dict(zip(held.user_ids, zip(held.histories, held.targets, strict=True), strict=True))
        for row in table:
            bought = [at for at, kind in enumerate(row["events"]) if kind == "purchase" and at]
            if split == "temporal":
                end = float("inf") if part == "test" else start["test"]
                bought = [at for at in bought if start[part] <= row["timestamps"][at] < end]
                target = bought[-1:]
            else:
                target = bought[-1:] if part == "test" else bought[-2:-1]
            if not target:
                assert row["user_id"] not in found
                continue
            history, at = found[row["user_id"]]
            assert ids[at] == row["item_ids"][target[0]]
            assert [ids[r] for r in history] == row["item_ids"][: target[0]]


def test_a_kind_that_no_event_has_is_refused(tmp_path: Path):
    items, folder = write_log(tmp_path / "in", kinds=True)
    os.rename(items, tmp_path / "items.parquet")
    config = PrepareConfig(target_events=("buy",))
    before = everything_below(tmp_path)
    with pytest.raises(InputError, match=r"no event is a 'buy', which prepare\.target_events names; there are: cart"):
        prepare(str(tmp_path / "items.parquet"), folder, str(tmp_path / "out"), config, silent)
    assert everything_below(tmp_path) == before


def test_kinds_need_their_column(log: tuple[str, str], tmp_path: Path):
    with pytest.raises(InputError, match=r"no column 'event', which prepare\.history_events needs"):
        prepare(*log, str(tmp_path / "out"), PrepareConfig(history_events=("view",)), silent)


def test_of_several_pictures_the_first_is_used(raw: Path, tmp_path: Path):
    uris = [["good.png", "cut.jpg"], ["cut.jpg", "good.png"], [], None]
    items = pa.table(
        {"item_id": list("abcd"), "title": list("abcd"), "image_uris": pa.array(uris, pa.list_(pa.string()))}
    )
    pq.write_table(items, raw / "some.parquet")
    events = pa.table({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [1, 2]})
    pq.write_table(events, tmp_path / "events.parquet")
    info = prepare(
        str(raw / "some.parquet"), str(tmp_path / "events.parquet"), str(tmp_path / "out"), PrepareConfig(), silent
    )
    assert info["images"] == {"ok": 1, "missing": 2, "rejected": 1}
    data = load_dataset(str(tmp_path / "out"))
    assert data.items.with_image.tolist() == [True, False, False, False]
    assert [data.items.fields(row)["image_uris"] for row in range(4)] == uris
    assert "image_uris" not in data.items.filter_fields
