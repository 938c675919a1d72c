"""Several data sets as one: whose items and events are whose, and that nothing held out gets in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from fakes import tiny_dataset, tiny_items, write_prepared

from pixrec import storage
from pixrec.data.items import ItemTable, load_texts
from pixrec.data.joined import count_leaks, join_datasets
from pixrec.data.sequences import Dataset


def other_items() -> ItemTable:
    """Eight items whose ids are those of others in `tiny_items`, with a column of their own and without prices."""
    table = tiny_items(8)._table.drop_columns(["year", "price"])
    titles = pa.array([f"Circle {row}" for row in range(8)])
    return ItemTable(table.set_column(1, "title", titles).append_column("material", pa.array(["tin"] * 8)))


def renumbered(dataset: Dataset, first: int) -> Dataset:
    """Events that carry their own number, from `first`, in place of a row: an item may come back, an event cannot."""
    rows = np.arange(first, first + len(dataset.events.rows))
    return dataclasses.replace(dataset, events=dataclasses.replace(dataset.events, rows=rows))


def test_catalogs_and_histories_stand_one_after_the_other():
    first, second = tiny_dataset(num_events=6), tiny_dataset(other_items(), num_users=4, num_events=5)
    joined = join_datasets([first, second])
    assert joined.items.item_ids[:2] == ["0:i00", "0:i01"]
    assert joined.items.item_ids[12:14] == ["1:i00", "1:i01"]
    assert len(joined.items.row_of) == 20
    for row in range(8):
        assert joined.items.text(12 + row) == second.items.text(row)
        assert joined.items.image(12 + row) == second.items.image(row)
        assert joined.items.content_hash(12 + row) == second.items.content_hash(row)
    assert joined.items.text(3) == first.items.text(3)
    assert joined.items.with_image.all()
    shifted = [history + 12 for history in second.training_histories()]
    for found, wanted in zip(joined.histories, [*first.training_histories(), *shifted], strict=True):
        assert found.tolist() == wanted.tolist()
    assert joined.counts.tolist() == [*first.training_counts(), *second.training_counts()]
    assert joined.counts.sum() == sum(map(len, joined.histories))
    valid = second.held_out("valid")
    assert joined.valid.targets[10:].tolist() == (valid.targets + 12).tolist()
    assert [h.tolist() for h in joined.valid.histories[10:]] == [(h + 12).tolist() for h in valid.histories]
    assert len(joined.valid.user_ids) == 14


def test_one_data_set_stays_as_it_is():
    dataset = tiny_dataset()
    joined = join_datasets([dataset])
    assert joined.items is dataset.items
    assert [h.tolist() for h in joined.histories] == [h.tolist() for h in dataset.training_histories()]
    assert joined.counts.tolist() == dataset.training_counts().tolist()
    assert joined.valid.targets.tolist() == dataset.held_out("valid").targets.tolist()


def test_each_set_keeps_its_own_split_and_no_test_event_gets_in():
    """With --data itself among the sets: of it too, training gets the training events alone."""
    target = tiny_dataset(tiny_items(200), num_events=9, split="temporal")
    other = tiny_dataset(tiny_items(200), num_events=7)
    bounds = (0, 100)  # numbers below the sizes of the catalogs, so that they can stand for rows
    numbered = [renumbered(dataset, first) for dataset, first in zip((target, other), bounds, strict=True)]
    joined = join_datasets(numbered)
    trained = set(np.concatenate(joined.histories).tolist())
    shown = trained | set(joined.valid.targets.tolist()) | set(np.concatenate(joined.valid.histories).tolist())
    for dataset, start in zip(numbered, (0, 200), strict=True):
        visible = dataset.events.rows[dataset.training_visible()] + start
        assert set(visible.tolist()) == {row for row in trained if start <= row < start + 200}
        assert not shown & set((dataset.held_out("test").targets + start).tolist())
        assert not trained & set((dataset.held_out("valid").targets + start).tolist())


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_held_out_events_of_the_target_are_found_in_another_preparation(split):
    target = tiny_dataset(num_events=6, split=split)
    assert count_leaks(target, target) == 0
    longer = tiny_dataset(num_events=12)  # the same first six events, and six later ones
    held_out = int((~target.training_visible()).sum())
    assert count_leaks(target, longer) == held_out > 0
    fewer = tiny_dataset(num_events=4)
    assert count_leaks(target, fewer) == 0


def test_equal_ids_of_other_items_are_no_leak():
    target = tiny_dataset(tiny_items(8), num_events=6)
    assert count_leaks(target, tiny_dataset(tiny_items(8), num_events=12)) > 0
    assert count_leaks(target, tiny_dataset(other_items(), num_events=12)) == 0


def test_an_event_is_known_by_user_item_and_time():
    target, longer = tiny_dataset(num_events=6), tiny_dataset(num_events=12)
    events = longer.events
    for changed in (
        {"user_ids": [f"other-{user}" for user in events.user_ids]},
        {"timestamps": events.timestamps + 1},
        {"rows": (events.rows + 1) % 12},
    ):
        assert count_leaks(target, dataclasses.replace(longer, events=dataclasses.replace(events, **changed))) == 0


def test_texts_are_read_without_the_pictures(tmp_path, monkeypatch):
    dataset = write_prepared(tmp_path / "data", tiny_dataset(other_items(), num_users=4))
    asked, stream = [], storage.stream_table
    monkeypatch.setattr(storage, "stream_table", lambda u, columns, n: asked.append(columns) or stream(u, columns, n))
    texts = [dataset.items.text(row) for row in range(8)]
    assert load_texts(dataset.uri) == texts
    assert load_texts(dataset.uri, 3) == [texts[0], texts[2], texts[5]]
    assert asked == [["item_id", "title", "brand", "category", "price", "description"]] * 2


def test_marks_of_targets_are_joined_too():
    first, second = tiny_dataset(num_events=6), tiny_dataset(other_items(), num_users=4, num_events=5)
    is_target = np.arange(len(second.events.rows)) % 2 == 0
    second = dataclasses.replace(second, events=dataclasses.replace(second.events, is_target=is_target))
    marks = [mark.tolist() for mark in join_datasets([first, second]).histories.marks]
    assert marks[:10] == [[True] * 4] * 10
    assert marks[10:] == [mark.tolist() for mark in second.training_histories().marks]
