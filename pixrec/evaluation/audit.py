"""Proof, for the data set at hand, that no held-out event is visible to training.

The real code that hands out histories, windows and targets is run on a copy of the data set whose events carry their
own numbers in place of items: an item may come back, an event cannot. Knows events and time; knows no model.

Shapes: B users · E events.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

import pixrec
from pixrec.artifact import Index, Model
from pixrec.config import Config, SequenceConfig
from pixrec.data.joined import count_leaks
from pixrec.data.sequences import EVENTS_AT_A_TIME, Dataset, HeldOut, Histories, Part, load_dataset
from pixrec.errors import InputError, PixRecError
from pixrec.scorers import LOSS_OF
from pixrec.training.windows import RecentWindows, ShiftedWindows

MAX_STEPS = 2000
"""Training steps of the interleaved towers whose windows are looked at, spread over the first epoch; every history
they are cut from is."""
EPOCHS = 2
"""Epochs of a compact tower whose windows are looked at, all of them; later ones are cut from the same histories."""


class Learner(NamedTuple):
    """Somebody who trains: how it cuts its windows, here epoch by epoch, and whether it may see validation events, as a
    refit does."""

    name: str
    windows: Callable[[Histories], list[Histories]]
    on_validation: bool = False


class _View(NamedTuple):
    """What may be seen: event numbers in place of rows in `held_out`; `user_of` (E,) each event's user."""

    dataset: Dataset
    held_out: dict[Part, HeldOut]
    user_of: np.ndarray


def audit_dataset(dataset: Dataset, trained: Config, evaluated: Config) -> dict[str, Any]:
    """Check who sees which event; returns how much was checked.

    `trained` is the configuration of the model, `evaluated` that of the evaluation, which may train SASRec. Raises
    InputError when a test or validation target is in a training history or window (of those that may train on
    validation events: a test target), when a training event or a history handed to a scorer is not earlier than what
    is held out from it, or, under a temporal split, when training has an event of a period held out from it.
    """
    events, numbered = dataset.events, _numbered(dataset)
    parts: tuple[Part, Part] = ("valid", "test")
    user_of = np.repeat(np.arange(len(events.user_ids), dtype=np.int32), np.diff(events.offsets))
    view = _View(dataset, {part: numbered.held_out(part) for part in parts}, user_of)
    seen = _check_training(view, [numbered.training_histories()], "a training history")
    for part in parts:
        _check_histories(view, part)
    windows: dict[str, int] = {}
    for learner in learners(trained, evaluated):
        cut = learner.windows(_histories(numbered, learner))
        _check_training(view, cut, f"a training window of {learner.name}", on_validation=learner.on_validation)
        windows[learner.name] = sum(map(len, cut))
    counted = int(dataset.training_counts().sum())
    if counted != int(seen.sum()):
        raise InputError(f"leak: baselines count {counted} events, training sees {int(seen.sum())}")
    return {
        "leaks": 0,
        "training_events": int(seen.sum()),
        "training_windows_checked": sum(windows.values()),
        "windows_of": windows,
        "targets_checked": {part: len(users.targets) for part, users in view.held_out.items()},
    }


def audit_elsewhere(dataset: Dataset, model: Model) -> list[dict[str, Any]]:
    """What `model` was trained on apart from `dataset` as its last stage: the data sets of its earlier stages, and
    that of the last one where it is another.

    Of each one `stage` (empty: the last), `data` and whether it was `checked`; if so, how many training events and
    windows, and how many of those events lie at or after a temporal split's test (`events_after_test_start`: no test
    events, but of a time that the model is to foretell); if not, the `reason`. Raises InputError when a window of one
    has an event that `dataset` holds out (see `count_leaks` for what is not found), or that it holds out itself.
    """
    return [_audited(dataset, source) for source in _sources(model, dataset.info["fingerprint"])]


class _Source(NamedTuple):
    """A data set that a model was trained on: in which stage, where it lay, as what, by whom."""

    stage: str
    uri: str | None
    fingerprint: str
    learners: list[Learner]


def _sources(model: Model, evaluated: str) -> Iterator[_Source]:
    info, config = model.info, model.config
    settings = {stage.name: config.train.of_stage(stage) for stage in config.train.stages}
    for stage in info.get("stages", []):
        staged = dataclasses.replace(config, train=settings[stage["name"]])
        towers = [next(_model_learners(staged))]
        fingerprints = stage["data_fingerprints"]
        for uri, fingerprint in zip(stage.get("data", [None] * len(fingerprints)), fingerprints, strict=True):
            yield _Source(stage["name"], uri, fingerprint, towers)
    if info.get("data_fingerprint") not in (None, evaluated):
        yield _Source("", info.get("data"), info["data_fingerprint"], list(_model_learners(config)))


def _audited(dataset: Dataset, source: _Source) -> dict[str, Any]:
    facts = {"stage": source.stage, "data": source.uri}
    other = _reached(dataset, source)
    if isinstance(other, str):
        return {**facts, "checked": False, "reason": other}
    if other is not dataset and (leaks := count_leaks(dataset, other)):
        raise InputError(
            f"leak: {leaks} events held out by {dataset.uri} are training events of {other.uri}, which the model was "
            "trained on; evaluate on that data set, or train a model on this one"
        )
    visible, histories = other.training_visible(), _numbered(other).training_histories()
    windows = {learner.name: learner.windows(histories) for learner in source.learners}
    for name, cut in windows.items():
        for block in _blocks(cut):
            events = block.flat()
            _check(visible[events], events, other, f"is held out there and also in a training window of {name}")
    later, split = 0, dataset.info["split"]
    if split["kind"] == "temporal" and other.tells_time:
        later = int((other.events.timestamps[visible] >= split["test_start_ms"]).sum())
    return {
        **facts,
        "checked": True,
        "training_events": int(visible.sum()),
        "training_windows_checked": sum(len(epoch) for cut in windows.values() for epoch in cut),
        "events_after_test_start": later,
    }


def _reached(dataset: Dataset, source: _Source) -> Dataset | str:
    """The data set as it was trained on, or why it cannot be had."""
    if source.fingerprint == dataset.info["fingerprint"]:
        return dataset
    if source.uri is None:
        return "model.json does not say where it lay"
    try:
        found = load_dataset(source.uri)
    except PixRecError:
        return "it can no longer be read there"
    return found if found.info["fingerprint"] == source.fingerprint else "it was prepared again since"


def _numbered(dataset: Dataset) -> Dataset:
    """The data set with the events' own numbers in place of items."""
    events = dataset.events
    dtype = np.int32 if len(events.rows) < 2**31 else np.int64
    return dataclasses.replace(
        dataset, events=dataclasses.replace(events, rows=np.arange(len(events.rows), dtype=dtype))
    )


def _model_learners(trained: Config) -> Iterator[Learner]:
    """The towers, and their compact user tower where there is one."""
    yield Learner("the towers", lambda h: _batch_windows(h, trained))
    compact, longest = trained.train.compact, trained.model.compact.max_history_items
    if trained.model.user_tower == "compact":
        yield Learner("the compact tower", lambda h: _sequence_windows(h, longest, compact, trained.train.seed))


def learners(trained: Config, evaluated: Config) -> Iterator[Learner]:
    """Who trains for an evaluation: the towers, their compact user tower, the SASRec of `evaluate.scorers`."""
    yield from _model_learners(trained)
    sasrec = evaluated.sasrec
    if LOSS_OF.keys() & {*evaluated.evaluate.scorers, *evaluated.evaluate.fused}:
        for name, on_validation in (("sasrec", False), ("the refitted sasrec", True))[: 1 + sasrec.refit]:
            yield Learner(
                name,
                lambda h: _sequence_windows(h, sasrec.tower.max_history_items, sasrec.training, sasrec.seed),
                on_validation,
            )


def _histories(dataset: Dataset, learner: Learner) -> Histories:
    return dataset.training_histories(with_validation=True) if learner.on_validation else dataset.training_histories()


def _batch_windows(histories: Histories, config: Config) -> list[Histories]:
    """The windows of the first epoch as the towers' training cuts them, at most those of MAX_STEPS steps."""
    if not (histories.lengths >= 2).any():
        return []
    source = ShiftedWindows(histories, config.model.max_history_items, config.train)
    steps = np.unique(np.linspace(0, source.steps_per_epoch - 1, min(source.steps_per_epoch, MAX_STEPS)).astype(int))
    return [Histories.of([window for step in steps for window in source.step(int(step))])]


def _sequence_windows(histories: Histories, longest: int, config: SequenceConfig, seed: int) -> list[Histories]:
    """The windows of the first epochs as the training of a compact tower cuts them."""
    if not (histories.lengths >= 2).any():
        return []
    source = RecentWindows(histories, longest, config, seed)
    return [source.epoch(epoch).windows for epoch in range(EPOCHS)]


def _blocks(pieces: Iterable[Histories]) -> Iterator[Histories]:
    return itertools.chain.from_iterable(Histories.of(one).blocks() for one in pieces)


def _check(good: np.ndarray, events: np.ndarray, dataset: Dataset, what: str) -> None:
    """Raise InputError naming the first of `events` (numbers) that is not `good`."""
    if good.all():
        return
    event = int(events[np.argmin(good)])
    user = dataset.events.user_ids[int(np.searchsorted(dataset.events.offsets, event, side="right")) - 1]
    item = dataset.items.item_ids[int(dataset.events.rows[event])]
    raise InputError(
        f"leak: {int((~good).sum())} events held out are visible too early; the first: item {item!r} of user {user!r} "
        f"{what}; prepare the data set {dataset.uri} again"
    )


def _check_histories(view: _View, part: Part) -> None:
    """A history holds events of its own user alone, all of them before the target."""
    dataset, users, user_of = view.dataset, view.held_out[part], view.user_of
    done = 0
    for block in Histories.of(users.histories).blocks():
        events, targets = block.flat(), np.repeat(users.targets[done : done + len(block)], block.lengths)
        _check(events < targets, events, dataset, f"is given to scorers before the {part} target that it follows")
        _check(user_of[events] == user_of[targets], events, dataset, "is given to scorers as another user's history")
        done += len(block)


def _check_training(view: _View, pieces: Iterable[Histories], where: str, *, on_validation: bool = False) -> np.ndarray:
    """Whether training may have the events of `pieces`, which are `where`; returns which these are, bool (E,).

    Training ends before the test (without `on_validation`: before the validation): for each user, and under a
    temporal split for all of them.
    """
    dataset, held_out, user_of = view
    timestamps, split = dataset.events.timestamps, dataset.info["split"]
    seen = np.zeros(len(timestamps), dtype=bool)
    for block in _blocks(pieces):
        seen[block.flat()] = True
    barred: tuple[Part, ...] = ("test",) if on_validation else ("valid", "test")
    for part in barred:
        targets = held_out[part].targets
        _check(~seen[targets], targets, dataset, f"is the {part} target and also in {where}")
    target_of, tested = np.full(len(dataset.events.user_ids), len(timestamps)), held_out["test"].targets
    target_of[user_of[tested]] = tested
    temporal = split["kind"] == "temporal"
    for at in range(0, len(seen), EVENTS_AT_A_TIME):
        visible = np.flatnonzero(seen[at : at + EVENTS_AT_A_TIME]) + at
        before = visible < target_of[user_of[visible]]
        _check(before, visible, dataset, f"follows the user's test target and is in {where}")
        if temporal:
            ends = split["test_start_ms"] if on_validation else min(split["valid_start_ms"], split["test_start_ms"])
            early = timestamps[visible] < ends
            _check(early, visible, dataset, f"lies in a period held out from training and is in {where}")
    if temporal:
        early = timestamps[tested] >= split["test_start_ms"]
        _check(early, tested, dataset, "is a test target from before the test period")
    return seen


def dataset_guards(dataset: Dataset) -> dict[str, float]:
    """The share of all users who cannot be measured, how many items `prepare` held out of training, and whether the
    timestamps are moments rather than an order of events only."""
    lengths = np.diff(dataset.events.offsets)
    return {
        "users_with_one_event_share": float((lengths == 1).mean()) if len(lengths) else 0.0,
        "held_out_items": dataset.info.get("cold", {"items": 0})["items"],
        "timestamps_tell_time": dataset.tells_time,
    }


def provenance(dataset: Dataset, model: Model | None, index: Index | None) -> dict[str, Any]:
    """What was measured, and whether the model was trained on this very data set (None: its model.json does not say).

    `stages`, where it was trained in several: the data sets before the last one. `audit_elsewhere` looks into those.
    """
    trained_on = model.info.get("data_fingerprint") if model else None
    stages = model.info.get("stages") if model else None
    return {
        "pixrec": pixrec.__version__,
        "model_fingerprint": model.fingerprint if model else None,
        "data_fingerprint": dataset.info["fingerprint"],
        "index_version": index.version if index else None,
        "trained_on_this_data": None if trained_on is None else trained_on == dataset.info["fingerprint"],
        **({"stages": stages} if stages else {}),
    }
