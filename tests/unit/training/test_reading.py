import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model

from pixrec.data.items import ItemTable
from pixrec.model.catalog import Catalog
from pixrec.training.reading import Collator, Read, Reader
from pixrec.training.windows import ShiftedWindows


def reader(*, cache_bytes=2_000_000_000, **train):
    config = tiny_config(
        model={"user_tower": "interleaved"}, train={"histories_per_step": 7, "modality_dropout": 0.3, **train}
    )
    dataset = tiny_dataset(tiny_items(with_pictures=range(8)), num_users=9, num_events=7)
    source = ShiftedWindows(dataset.training_histories(), config.model.max_history_items, config.train)
    catalog = Catalog(dataset.items, tiny_model(config, dataset.items).encoder, cache_bytes)
    return Reader(source, Collator(catalog, dataset.training_counts(), config, source.examples_per_step))


def content(read):
    """All that is in a Read but the time that it took."""
    return {name: value for name, value in safetensors.torch.load(read.to_bytes()).items() if name != "seconds"}


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("option", [{}, {"gradient_accumulation": 2}, {"micro_batch_histories": 2}])
def test_a_read_survives_the_way_to_another_process(option):
    read = reader(**option).read(3, 0, 1)
    data = read.to_bytes()
    again = Read.from_bytes(data)
    assert (again.step, again.seconds) == (3, read.seconds)
    assert len(again.passes) == len(read.passes) == option.get("gradient_accumulation", 1)
    assert (again.passes[0].histories is None) == ("micro_batch_histories" in option)
    same(content(again), content(read))
    again.passes[0].items.token_ids.zero_()  # memory of its own
    same(content(Read.from_bytes(memoryview(data))), content(read))


def test_a_read_is_a_function_of_its_step_alone():
    whole, other = reader(), reader(cache_bytes=0)
    reads = [content(read) for read in whole.feed(0, 1)(0)]
    assert len(reads) == whole.source.total_steps() > 3
    same(content(other.read(3, 0, 1)), reads[3])
    for read, expected in zip(other.feed(0, 1)(2), reads[2:], strict=True):
        same(content(read), expected)


def what_is_seen(passes):
    """Of one pass of several workers: what each item of each history shows, its text and its picture."""
    found = []
    for one in passes:
        rows = one.item_rows.tolist()
        text, shown = one.items.is_text.any(1).tolist(), (one.items.picture_slot >= 0).any(1).tolist()
        for window in one.windows:
            items = [rows.index(row) for row in window.tolist()]
            found.append(tuple((rows[at], text[at], shown[at]) for at in items))
    return sorted(found)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_number_of_workers_reads_the_same(accumulation):
    shared = reader(gradient_accumulation=accumulation, num_workers=3)
    dropped = set()
    for step in range(shared.source.total_steps()):
        alone = shared.read(step, 0, 1)
        for size in (2, 3):
            each = [shared.read(step, rank, size) for rank in range(size)]
            for i in range(accumulation):
                assert what_is_seen([read.passes[i] for read in each]) == what_is_seen([alone.passes[i]])
        dropped |= {item[1:] for one in alone.passes for history in what_is_seen([one]) for item in history}
    assert dropped == {(True, True), (True, False), (False, True)}, "texts and pictures are dropped"


def test_some_of_the_encoded_items_are_as_if_encoded_alone():
    collator = reader().collator
    encoder, rows = collator.catalog.encoder, np.arange(12)
    kept = ["both", "text", "image"] * 4
    items = collator.catalog.items(rows, kept)
    for chosen in ([3, 4, 5], [0], [11], [1, 10], [8, 2, 5]):
        alone = collator.catalog.items(rows[chosen], [kept[i] for i in chosen])
        found = encoder.select(items, np.array(chosen))
        same(vars(found), vars(alone))


def test_a_step_reads_its_pictures_at_once(monkeypatch):
    calls = []
    images = ItemTable.images
    monkeypatch.setattr(ItemTable, "images", lambda table, rows: calls.append(rows) or images(table, rows))
    step = reader(cache_bytes=0)
    read = step.read(0, 0, 1)
    assert calls == [read.passes[0].item_rows.tolist()]
    assert not step.collator.catalog._text_ids


def test_a_full_cache_loses_no_picture():
    """A kept picture that has to go for others of the same batch was lost."""
    catalog = reader(cache_bytes=1).collator.catalog
    for rows in ([7], [0, 7], [7, 3, 0], [1, 0]):
        assert len(catalog.items(np.array(rows)).pixels) == len(rows)


@pytest.mark.parametrize("parts", [None, 2])
def test_targets_alone_are_foretold(parts):
    """Of views and purchases: examples and text are the purchases', in one pass, in parts and in another process."""
    dataset = tiny_dataset(num_users=9, num_events=9)
    is_target = np.random.default_rng(0).random(len(dataset.events.rows)) < 0.4
    events = dataclasses.replace(dataset.events, is_target=is_target)
    histories = dataclasses.replace(dataset, events=events).training_histories()
    config = tiny_config(train={"histories_per_step": 7, "micro_batch_histories": parts})
    catalog = Catalog(dataset.items, tiny_model(config, dataset.items).encoder)
    source = ShiftedWindows(histories, config.model.max_history_items, config.train)
    made = Reader(source, Collator(catalog, dataset.training_counts(), config, source.examples_per_step)).read(1, 0, 1)
    one = Read.from_bytes(made.to_bytes()).passes[0]
    windows = source.step(1)
    expected = [int(row) for window, mark in zip(windows, windows.marks, strict=True) for row in window[1:][mark[1:]]]
    written = [one.histories]
    if parts:
        written = one.parts(catalog.encoder, parts, 4).histories
    found = [int(one.item_rows[place]) for h in written for place in h.target]
    assert sorted(found) == sorted(expected)
    for h in written:
        foretold = h.is_target.gather(1, h.position) & h.is_text
        assert torch.equal(h.target_text, foretold)
        assert (h.target_text & (h.position == 0)).sum() == 0
