"""Proof, for the data set at hand, that no held-out event is visible to training.

The real code that hands out histories, windows and targets is run on a copy of the data set whose events carry their
own numbers in place of items: an item may come back, an event cannot. Knows events and time; knows no model.

Shapes: B users · E events.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import pixrec
from pixrec.artifact import Index, Model
from pixrec.config import TrainConfig
from pixrec.data.sequences import Dataset, HeldOut
from pixrec.errors import InputError
from pixrec.training import BatchSource

MAX_STEPS = 2000
"""Training steps whose windows are looked at, spread over the first epoch; every history they are cut from is."""


def audit(dataset: Dataset, max_history_items: int, train: TrainConfig) -> dict[str, Any]:
    """Check who sees which event; returns how much was checked.

    Raises InputError when a test or validation target is in a training history or window, when a training event or a
    history handed to a scorer is not earlier than what is held out from it, or, under a temporal split, when training
    has an event of the validation or test period.
    """
    events = dataset.events
    numbered = dataclasses.replace(dataset, events=dataclasses.replace(events, rows=np.arange(len(events.rows))))
    held_out = {part: numbered.held_out(part) for part in ("valid", "test")}
    user_of = np.repeat(np.arange(len(events.user_ids)), np.diff(events.offsets))
    histories = numbered.training_histories()
    seen = np.zeros(len(events.rows), dtype=bool)
    for history in histories:
        seen[history] = True
    for part, users in held_out.items():
        _check(~seen[users.targets], users.targets, dataset, f"is the {part} target and also in a training history")
        _check_histories(users, user_of, dataset, part)
    _check_training(dataset, seen, user_of, held_out["test"])
    windows = _windows(histories, max_history_items, train)
    in_window = np.zeros(len(events.rows), dtype=bool)
    for window in windows:
        in_window[window] = True
    for part, users in held_out.items():
        _check(~in_window[users.targets], users.targets, dataset, f"is the {part} target and also in a training window")
    counted = int(dataset.training_counts().sum())
    if counted != int(seen.sum()):
        raise InputError(f"leak: baselines count {counted} events, training sees {int(seen.sum())}")
    return {
        "leaks": 0,
        "training_events": int(seen.sum()),
        "training_windows_checked": len(windows),
        "targets_checked": {part: len(users.targets) for part, users in held_out.items()},
    }


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


def _check_histories(users: HeldOut, user_of: np.ndarray, dataset: Dataset, part: str) -> None:
    """A history holds events of its own user alone, all of them before the target."""
    lengths = [len(history) for history in users.histories]
    if not lengths:
        return
    events, targets = np.concatenate(users.histories), np.repeat(users.targets, lengths)
    _check(events < targets, events, dataset, f"is given to scorers before the {part} target that it follows")
    _check(user_of[events] == user_of[targets], events, dataset, "is given to scorers as another user's history")


def _check_training(dataset: Dataset, seen: np.ndarray, user_of: np.ndarray, test: HeldOut) -> None:
    """Training ends before the test: for each user, and under a temporal split for all of them."""
    moments, split = dataset.events.timestamps, dataset.info["split"]
    target_of = np.full(len(dataset.events.user_ids), len(moments))
    target_of[user_of[test.targets]] = test.targets
    visible = np.flatnonzero(seen)
    _check(visible < target_of[user_of[visible]], visible, dataset, "follows the user's test target and trains")
    if split["kind"] == "temporal":
        late = moments[visible] < min(split["valid_start_ms"], split["test_start_ms"])
        _check(late, visible, dataset, "lies in the validation or test period and trains")
        early = moments[test.targets] >= split["test_start_ms"]
        _check(early, test.targets, dataset, "is a test target from before the test period")


def _windows(histories: list[np.ndarray], max_history_items: int, train: TrainConfig) -> list[np.ndarray]:
    """The windows of the first epoch as training cuts them, at most those of MAX_STEPS steps."""
    if not any(len(history) >= 2 for history in histories):
        return []
    source = BatchSource(histories, max_history_items, train)
    steps = np.unique(np.linspace(0, source.steps_per_epoch - 1, min(source.steps_per_epoch, MAX_STEPS)).astype(int))
    return [window for step in steps for window in source.step(int(step))]


def dataset_guards(dataset: Dataset) -> dict[str, float]:
    """Shares of all users who cannot be measured, or only on what little they did."""
    lengths = np.diff(dataset.events.offsets)
    return {"users_with_one_event_share": float((lengths == 1).mean()) if len(lengths) else 0.0}


def provenance(dataset: Dataset, model: Model | None, index: Index | None) -> dict[str, Any]:
    """What was measured, and whether the model was trained on this very data set (None: its model.json does not say).

    A model that was trained on another preparation of the same events may have seen the test.
    """
    trained_on = model.info.get("data_fingerprint") if model else None
    return {
        "pixrec": pixrec.__version__,
        "model_fingerprint": model.fingerprint if model else None,
        "data_fingerprint": dataset.info["fingerprint"],
        "index_version": index.version if index else None,
        "trained_on_this_data": None if trained_on is None else trained_on == dataset.info["fingerprint"],
    }
