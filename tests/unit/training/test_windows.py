"""How histories are cut and dealt: the batches of both ways, and that they are what loops over histories would give."""

import dataclasses

import numpy as np
import pytest
from fakes import tiny_dataset

from pixrec.config import SequenceConfig, TrainConfig
from pixrec.data.sequences import Histories
from pixrec.errors import InputError
from pixrec.training.windows import POOL_STEPS, RecentWindows, ShiftedWindows, targets_of, timed

FAST = SequenceConfig(histories_per_step=4)


def test_every_event_is_a_target_once_an_epoch_when_windows_fit():
    histories = [np.arange(10 * i, 10 * i + n) for i, n in enumerate((2, 5, 3))]
    source = ShiftedWindows(histories, 4, TrainConfig(histories_per_step=3, num_workers=1))
    windows = source.step(0)
    assert sorted(len(w) - 1 for w in windows) == [1, 2, 4]
    assert source.steps_per_epoch == 1


def test_long_histories_are_cut_into_windows_that_move_from_epoch_to_epoch():
    source = ShiftedWindows([np.arange(50)], 4, TrainConfig(histories_per_step=1, num_workers=1, alpha=0, beta=0))
    epochs = [
        [tuple(source.step(e * source.steps_per_epoch + s)[0]) for s in range(source.steps_per_epoch)] for e in (0, 1)
    ]
    assert all(2 <= len(w) <= 5 and list(w) == list(range(w[0], w[-1] + 1)) for epoch in epochs for w in epoch)
    assert set(epochs[0]) != set(epochs[1])


@pytest.mark.parametrize("length", [12, 13, 20, 21, 45])
def test_the_newest_events_are_always_targets_and_older_ones_have_their_turn(length):
    """Windows of 10: what is cut moves, and never the newest event."""
    config = TrainConfig(histories_per_step=1, num_workers=1, alpha=0, beta=0)
    source, epochs = ShiftedWindows([np.arange(length)], 10, config), 200
    turns = np.zeros(length, int)
    for epoch in range(epochs):
        windows = [source.step(epoch * source.steps_per_epoch + step)[0] for step in range(source.steps_per_epoch)]
        turns[np.unique(np.concatenate([window[1:] for window in windows]))] += 1
    assert turns[0] == 0
    assert (turns[-10:] == epochs).all()
    assert (turns[1:] > 0).all()
    assert (np.diff(turns[1:]) >= 0).all(), "the older, the less often"


def test_a_batch_is_a_function_of_the_step_and_workers_share_it():
    histories = [np.arange(i, i + 4) for i in range(20)]
    config = TrainConfig(histories_per_step=6, num_workers=2)
    first, second = ShiftedWindows(histories, 4, config), ShiftedWindows(histories, 4, config)
    whole = [tuple(w) for w in first.step(17)]
    assert [tuple(w) for w in second.step(17)] == whole
    shared = [[tuple(w) for w in first.step(17, rank, 2)] for rank in (0, 1)]
    assert sorted(shared[0] + shared[1]) == sorted(whole)


def test_buckets_of_like_length_hold_every_history_once_and_pad_less():
    rng = np.random.default_rng(0)
    histories = [np.arange(100 * i, 100 * i + rng.integers(2, 9)) for i in range(96)]

    def epoch(bucket_steps, number=0):
        config = TrainConfig(histories_per_step=8, num_workers=1, bucket_steps=bucket_steps)
        source = ShiftedWindows(histories, 10, config)
        return [source.step(number * source.steps_per_epoch + step) for step in range(source.steps_per_epoch)]

    def padding(batches):
        return 1 - sum(len(w) for b in batches for w in b) / sum(8 * max(map(len, b)) for b in batches)

    drawn, alike = epoch(1), epoch(12)
    assert sorted(int(w[0]) for b in alike for w in b) == [100 * i for i in range(96)]
    assert padding(alike) < 0.4 * padding(drawn)
    longest = [max(map(len, batch)) for batch in alike]
    assert longest != sorted(longest)
    assert [int(w[0]) for w in epoch(12, 1)[0]] != [int(w[0]) for w in alike[0]]


def test_nothing_to_learn_is_said_where_windows_are_shifted():
    with pytest.raises(InputError, match="two events"):
        ShiftedWindows([np.array([1]), np.array([2])], 4, TrainConfig())


def test_no_held_out_event_reaches_training():
    dataset = tiny_dataset(num_events=6)
    source = ShiftedWindows(dataset.training_histories(), 4, TrainConfig(histories_per_step=4))
    seen = {tuple(w) for step in range(source.total_steps()) for w in source.step(step)}
    training = {tuple(h.tolist()) for h in dataset.training_histories()}
    assert all(len(t) == 4 for t in training)
    assert seen <= training


def test_every_event_but_the_first_is_a_target_and_the_newest_window_is_whole():
    histories = [np.arange(25), np.array([3, 4]), np.array([9])]
    source = RecentWindows(histories, 6, dataclasses.replace(FAST, histories_per_step=3), 0)
    targets = set()
    for epoch in range(8):
        windows = [w for batch in source.epoch(epoch) for w in batch]
        assert sum(np.array_equal(w, np.arange(18, 25)) for w in windows) == 1
        assert max(map(len, windows)) == 7
        assert all((np.diff(w) == 1).all() for w in windows)
        targets |= {int(t) for w in windows if len(w) != 2 or w[0] != 3 for t in w[1:]}
    assert targets >= set(range(1, 25))


def test_batches_are_a_function_of_seed_and_epoch():
    histories = [np.arange(n) for n in range(2, 30)]
    one, same, other = (RecentWindows(histories, 6, FAST, seed) for seed in (0, 0, 1))
    flat = [[w.tolist() for batch in source.epoch(3) for w in batch] for source in (one, same, other)]
    assert flat[0] == flat[1] != flat[2]


def test_nothing_to_learn_is_said():
    with pytest.raises(InputError, match="two events"):
        RecentWindows([np.array([1])], 6, FAST, 0)


def test_windows_carry_each_event_with_its_own_time():
    rows = [np.arange(25), np.array([3, 4])]
    source = RecentWindows([np.stack([r, 1000 * r], axis=1) for r in rows], 6, FAST, 0)
    plain = RecentWindows(rows, 6, FAST, 0)
    windows, expected = ([w for batch in s.epoch(1) for w in batch] for s in (source, plain))
    assert len(windows) == len(expected)
    for window, without in zip(windows, expected, strict=True):
        np.testing.assert_array_equal(window[:, 0], without)
        np.testing.assert_array_equal(window[:, 1], 1000 * without)


def of_all_lengths():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 99, n) for n in [*rng.integers(1, 60, 100), 1, 2, 3, 21, 22, 11, 12]]


def shifted_by_loops(histories, most, config, step):
    """A step of `ShiftedWindows` in plain Python."""
    histories = [h for h in histories if len(h) >= 2]
    windows = [(h, end) for h in histories for end in range(len(h), 1, -most)]
    size, steps = config.histories_per_step, -(-len(windows) // config.histories_per_step)
    epoch, within = divmod(step, steps)
    rng = np.random.default_rng([config.seed, 1, epoch])
    order = np.resize(rng.permutation(len(windows)), steps * size)
    later = dict(zip(map(id, histories), rng.integers(0, most, len(histories)), strict=True))
    ends = [end + later[id(h)] if end < len(h) else end for h, end in windows]
    if (pool := config.bucket_steps * size) > size:
        dealt = []
        for start in range(0, len(order), pool):
            alike = sorted(order[start : start + pool], key=lambda w: min(ends[w], most + 1))
            dealt.append(rng.permutation(np.array(alike).reshape(-1, size)))
        order = np.concatenate(dealt).ravel()
    chosen = order[within * size : (within + 1) * size]
    return [windows[w][0][max(0, ends[w] - most - 1) : ends[w]].tolist() for w in chosen]


def recent_by_loops(histories, most, config, seed, epoch):
    """An epoch of `RecentWindows` in plain Python."""
    rng = np.random.default_rng([seed, 3, epoch])
    windows = []
    for history in [h for h in histories if len(h) >= 2]:
        windows.append(history[-most - 1 :].tolist())
        if len(history) > most + 1:
            ends = range(len(history) - int(rng.integers(1, most + 1)), 1, -most)
            windows += [history[max(0, end - most - 1) : end].tolist() for end in ends]
    size, order, batches = config.histories_per_step, rng.permutation(len(windows)), []
    for start in range(0, len(order), size * POOL_STEPS):
        near = sorted(order[start : start + size * POOL_STEPS], key=lambda i: len(windows[i]))
        batches += [near[i : i + size] for i in range(0, len(near), size)]
    return [[windows[i] for i in batches[b]] for b in rng.permutation(len(batches))]


@pytest.mark.parametrize("most", [1, 4, 10, 20])
@pytest.mark.parametrize("bucket_steps", [1, 4])
def test_shifted_windows_are_those_of_plain_loops(most, bucket_steps):
    config = TrainConfig(histories_per_step=9, num_workers=1, seed=3, bucket_steps=bucket_steps)
    source = ShiftedWindows(of_all_lengths(), most, config)
    for step in (0, 3, source.steps_per_epoch - 1, source.steps_per_epoch, 3 * source.steps_per_epoch + 2):
        assert [w.tolist() for w in source.step(step)] == shifted_by_loops(of_all_lengths(), most, config, step)


@pytest.mark.parametrize("most", [1, 4, 10, 20])
@pytest.mark.parametrize("size", [3, 128])
def test_recent_windows_are_those_of_plain_loops(most, size):
    config = SequenceConfig(histories_per_step=size)
    source = RecentWindows(of_all_lengths(), most, config, 4)
    for epoch in (0, 1, 7):
        found = [[w.tolist() for w in batch] for batch in source.epoch(epoch)]
        assert found == recent_by_loops(of_all_lengths(), most, config, 4, epoch)


def test_windows_are_views_of_the_one_array_of_events():
    histories = Histories.of(of_all_lengths())
    shifted = ShiftedWindows(histories, 4, TrainConfig(histories_per_step=8, num_workers=1))
    for window in [*shifted.step(0), *RecentWindows(histories, 4, FAST, 0).epoch(0)[0]]:
        assert np.shares_memory(window, histories.values)


def test_events_and_their_times_are_put_together_when_asked_for():
    rows, moments = np.arange(9), 1000 * np.arange(9)
    starts, ends = np.array([0, 5]), np.array([4, 9])
    pairs = timed(Histories(rows, starts, ends), Histories(moments, starts, ends))
    assert pairs[1].tolist() == [[row, 1000 * row] for row in range(5, 9)]
    with pytest.raises(ValueError, match="not those of the histories"):
        timed(Histories(rows, starts, ends), Histories(moments, starts, ends - 1))


def marked(*kinds):
    """Histories of "v" and "p", of which the latter are targets; events are numbered."""
    ends = np.cumsum([len(k) for k in kinds])
    is_target = np.array([kind == "p" for kind in "".join(kinds)])
    return Histories(np.arange(ends[-1]), np.append(0, ends)[:-1], ends, is_target)


def learned(windows):
    return [int(row) for w, marks in zip(windows, targets_of(windows), strict=True) for row in w[marks]]


def epoch_of(kind, histories, longest, epoch):
    if kind == "recent":
        return list(RecentWindows(histories, longest, FAST, 0).epoch(epoch))
    source = ShiftedWindows(histories, longest, TrainConfig(histories_per_step=2, num_workers=1))
    return [source.step(epoch * source.steps_per_epoch + step) for step in range(source.steps_per_epoch)]


@pytest.mark.parametrize("kind", ["shifted", "recent"])
def test_targets_are_events_of_their_kind_and_every_window_ends_with_one(kind):
    histories = marked("vvpvv", "pvv", "vp" + 30 * "v" + "pvvpvv", "vvv", 9 * "pv")
    expected = {2, 9, 40, 43, *range(51, 67, 2)}  # those that something precedes
    targets = set()
    for epoch in range(12):
        for windows in epoch_of(kind, histories, 4, epoch):
            assert all(histories.is_target[w[-1]] and 2 <= len(w) <= 5 for w in windows)
            assert learned(windows)
            targets |= set(learned(windows))
    assert targets == expected


@pytest.mark.parametrize("kind", ["shifted", "recent"])
def test_where_every_event_is_a_target_the_marks_change_nothing(kind):
    plain = Histories.of(of_all_lengths())
    marks = Histories(plain.values, plain.starts, plain.ends, np.ones(len(plain.values), bool))
    for epoch in (0, 3):
        for ours, theirs in zip(epoch_of(kind, marks, 10, epoch), epoch_of(kind, plain, 10, epoch), strict=True):
            assert [w.tolist() for w in ours] == [w.tolist() for w in theirs]
            assert learned(ours) == [int(row) for w in theirs for row in w[1:]]


def test_nothing_of_a_target_kind_to_learn_is_said():
    with pytest.raises(InputError, match=r"two events of which the later is of a kind of prepare\.target_events"):
        RecentWindows(marked("vv", "pv"), 4, FAST, 0)
