"""The audit finds every kind of leak that is put in, and none in what the code really does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import TINY, tiny_config, tiny_dataset, tiny_model, write_prepared

from pixrec import cli
from pixrec.artifact import Model
from pixrec.data.sequences import Dataset, HeldOut, Histories
from pixrec.errors import InputError
from pixrec.evaluation.audit import audit_dataset, audit_elsewhere, dataset_guards, provenance
from pixrec.training.windows import Batches, RecentWindows, ShiftedWindows

CHECKED = (TINY, TINY)
EVERYBODY = tiny_config(
    model={"user_tower": "compact"},
    evaluate={"scorers": ["popularity", "sasrec_full"]},
    sasrec={"refit": True, "tower": {"max_history_items": 3}},
)


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_no_leak_in_what_training_and_scorers_are_given(split):
    dataset = tiny_dataset(split=split, num_events=9)
    found = audit_dataset(dataset, *CHECKED)
    assert found["leaks"] == 0
    assert found["training_events"] == dataset.training_counts().sum()
    assert found["targets_checked"]["test"] == len(dataset.held_out("test").targets) > 0
    assert found["training_windows_checked"] >= 10


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_everybody_who_trains_is_checked(split):
    """A refit may see validation events, and is found to see no test event."""
    found = audit_dataset(tiny_dataset(split=split, num_events=9), EVERYBODY, EVERYBODY)
    assert list(found["windows_of"]) == ["the towers", "the compact tower", "sasrec", "the refitted sasrec"]
    assert min(found["windows_of"].values()) >= 10
    assert found["training_windows_checked"] == sum(found["windows_of"].values())


def test_a_repeated_item_is_no_leak():
    """The target may well be an item of the history: events are told apart, not items."""
    dataset = tiny_dataset(num_events=6)
    same = dataclasses.replace(dataset.events, rows=np.zeros_like(dataset.events.rows))
    assert audit_dataset(dataclasses.replace(dataset, events=same), *CHECKED)["leaks"] == 0


class TrainsOnTheTest(Dataset):
    def training_histories(self, *, with_validation=False):
        bounds = zip(self.events.offsets[:-1], self.events.offsets[1:], strict=True)
        return [self.events.rows[start:end] for start, end in bounds]


class TrainsOnValidation(Dataset):
    def _training_lengths(self):
        return np.diff(self.events.offsets) - 1


class ShowsTheFuture(Dataset):
    def held_out(self, part):
        users = super().held_out(part)
        longer = [np.append(h, t) for h, t in zip(users.histories, users.targets, strict=True)]
        return HeldOut(users.user_ids, longer, users.targets)


class MixesUsers(Dataset):
    def held_out(self, part):
        users = super().held_out(part)
        return HeldOut(users.user_ids, [users.histories[0], *users.histories[:-1]], users.targets)


class CountsAll(Dataset):
    def training_counts(self):
        return np.bincount(self.events.rows, minlength=len(self.items))


class RefitsOnTheTest(Dataset):
    def _lengths_before_test(self):
        return np.diff(self.events.offsets)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TrainsOnTheTest, "is the valid target and also in a training history"),
        (TrainsOnValidation, "is the valid target and also in a training history"),
        (ShowsTheFuture, "is given to scorers before the valid target"),
        (MixesUsers, "as another user's history"),
        (CountsAll, "baselines count .* events, training sees"),
        (RefitsOnTheTest, "is the test target and also in a training window of the refitted sasrec"),
    ],
)
def test_a_leak_is_found_and_named(kind, message):
    dataset = tiny_dataset(num_events=6)
    leaking = kind(dataset.uri, dataset.items, dataset.info, dataset.events)
    with pytest.raises(InputError, match=f"^leak: .*{message}"):
        audit_dataset(leaking, EVERYBODY, EVERYBODY)


def test_a_window_that_reaches_beyond_training_is_found(monkeypatch):
    dataset = tiny_dataset(num_events=6)
    cut = ShiftedWindows.step
    monkeypatch.setattr(ShiftedWindows, "step", lambda *a: [np.append(w, w[-1] + 1) for w in cut(*a)])
    with pytest.raises(
        InputError, match=r"item 'i.*' of user 'u.*' is the valid target and also in a training window of the to"
    ):
        audit_dataset(dataset, *CHECKED)


class BeyondTheEnd(RecentWindows):
    """Windows that have the next event of their user too, which is held out where the history ends."""

    def epoch(self, epoch):
        longer = [np.append(window, window[-1] + 1) for window in super().epoch(epoch).windows]
        return Batches(Histories.of(longer), np.array([len(longer)]))


@pytest.mark.parametrize(("tower", "whose"), [("compact", "the compact tower"), ("interleaved", "sasrec")])
def test_a_window_of_a_sequence_trainer_that_reaches_beyond_training_is_found(monkeypatch, tower, whose):
    monkeypatch.setattr("pixrec.evaluation.audit.RecentWindows", BeyondTheEnd)
    config = dataclasses.replace(EVERYBODY, model=dataclasses.replace(EVERYBODY.model, user_tower=tower))
    with pytest.raises(InputError, match=f"is the valid target and also in a training window of {whose};"):
        audit_dataset(tiny_dataset(num_events=6), config, config)


def test_a_refit_that_reaches_beyond_validation_is_found(monkeypatch):
    class OnlyOfARefit(BeyondTheEnd):
        def epoch(self, epoch):
            return (super() if (self.lengths == 5).any() else super(BeyondTheEnd, self)).epoch(epoch)

    monkeypatch.setattr("pixrec.evaluation.audit.RecentWindows", OnlyOfARefit)
    with pytest.raises(InputError, match="is the test target and also in a training window of the refitted sasrec;"):
        audit_dataset(tiny_dataset(num_events=6), EVERYBODY, EVERYBODY)


def test_a_leak_ends_the_command_with_one_line_and_no_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("pixrec.evaluation.audit.RecentWindows", BeyondTheEnd)
    write_prepared(tmp_path / "data")
    options = (
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "report"),
        "--set",
        "evaluate.scorers=[sasrec]",
    )
    assert cli.main(["evaluate", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("pixrec evaluate: leak: ")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_training_after_the_temporal_cut_is_found():
    dataset = tiny_dataset(split="temporal", num_events=9)
    late = {**dataset.info, "split": {**dataset.info["split"], "valid_start_ms": 10**9}}

    class HoldsOutLate(Dataset):
        def held_out(self, part):
            return dataset.held_out(part)._replace(targets=np.array([], dtype=np.int64), histories=[], user_ids=[])

    with pytest.raises(InputError, match="lies in a period held out from training and is in a training history"):
        audit_dataset(HoldsOutLate(dataset.uri, dataset.items, late, dataset.events), *CHECKED)


def test_guards_and_provenance():
    dataset = tiny_dataset(num_users=2, num_events=1)
    assert dataset_guards(dataset) == {
        "users_with_one_event_share": 1.0,
        "held_out_items": 0,
        "timestamps_tell_time": False,
    }
    held_out = dataclasses.replace(dataset, info={**dataset.info, "cold": {"items": 3, "test_targets": 1}})
    assert dataset_guards(held_out)["held_out_items"] == 3
    model = tiny_model()
    for trained_on, expected in ((None, None), ("other", False), (dataset.info["fingerprint"], True)):
        info = {**model.info, "data_fingerprint": trained_on}
        facts = provenance(dataset, dataclasses.replace(model, info=info), None)
        assert facts["trained_on_this_data"] is expected
    assert provenance(dataset, None, None)["model_fingerprint"] is None


def test_provenance_names_the_stages_before_the_last():
    dataset, model = tiny_dataset(), tiny_model()
    stages = [{"name": "joint", "data_fingerprints": ["one", "two"]}]
    staged = dataclasses.replace(model, info={**model.info, "stages": stages})
    assert provenance(dataset, staged, None)["stages"] == stages
    assert "stages" not in provenance(dataset, model, None)


def trained_elsewhere(other: Dataset, *, stage: str = "", **facts: Any) -> Model:
    """A model that says it was trained on `other`, in a stage before the last or in the last one."""
    named = {"data": other.uri, "data_fingerprint": other.info["fingerprint"]} | facts
    config = tiny_config(train={"stages": [{"name": "joint", "max_steps": 1}]}, model={"user_tower": "compact"})
    if stage:
        named = {"stages": [{"name": stage, **{n: [v] for n, v in named.items() if n == "data"},
                             "data_fingerprints": [named["data_fingerprint"]]}]}  # fmt: skip
    return dataclasses.replace(tiny_model(config), info=named)


@pytest.fixture
def strangers(tmp_path: Path) -> Dataset:
    """Another data set, none of whose users is one of `tiny_dataset`."""
    made = tiny_dataset(num_users=6, num_events=7)
    users = [f"other {user}" for user in made.events.user_ids]
    return write_prepared(
        tmp_path / "strangers", dataclasses.replace(made, events=dataclasses.replace(made.events, user_ids=users))
    )


@pytest.mark.parametrize("stage", ["joint", ""])
def test_data_sets_that_were_trained_on_elsewhere_are_checked_too(strangers: Dataset, stage: str):
    (found,) = audit_elsewhere(tiny_dataset(), trained_elsewhere(strangers, stage=stage))
    windows = found.pop("training_windows_checked")
    assert windows >= 6 if stage else windows > 12  # those of the compact tower beside the towers'
    assert found == {
        "stage": stage,
        "data": strangers.uri,
        "checked": True,
        "training_events": strangers.training_counts().sum(),
        "events_after_test_start": 0,
    }


@pytest.mark.parametrize("stage", ["joint", ""])
def test_held_out_events_that_were_trained_on_elsewhere_are_a_leak(tmp_path: Path, stage: str):
    longer = write_prepared(tmp_path / "longer", tiny_dataset(num_events=9))
    with pytest.raises(InputError, match=r"^leak: 20 events held out by memory are training events of .*longer, which"):
        audit_elsewhere(tiny_dataset(), trained_elsewhere(longer, stage=stage))


def test_a_stage_on_this_very_data_set_needs_no_place():
    dataset = tiny_dataset()
    model = trained_elsewhere(dataset, stage="joint", data=None)
    assert audit_elsewhere(dataset, model)[0]["checked"]
    assert audit_elsewhere(dataset, trained_elsewhere(dataset)) == []  # the last stage: `audit` has looked


def test_a_window_of_a_stage_that_reaches_beyond_its_training_is_found(monkeypatch, strangers: Dataset):
    cut = ShiftedWindows.step
    monkeypatch.setattr(ShiftedWindows, "step", lambda *a: [np.append(w, w[-1] + 1) for w in cut(*a)])
    with pytest.raises(InputError, match=r"user 'other .*' is held out there and also in a training window of the to"):
        audit_elsewhere(tiny_dataset(), trained_elsewhere(strangers, stage="joint"))


def test_a_data_set_that_cannot_be_audited_is_named_with_the_reason(tmp_path: Path, strangers: Dataset):
    changed = dataclasses.replace(strangers, info={**strangers.info, "fingerprint": "before"})
    models = {
        "model.json does not say where it lay": trained_elsewhere(strangers, data=None),
        "it can no longer be read there": trained_elsewhere(strangers, data=str(tmp_path / "gone"), stage="joint"),
        "it was prepared again since": trained_elsewhere(changed, stage="joint"),
    }
    for reason, model in models.items():
        (found,) = audit_elsewhere(tiny_dataset(), model)
        assert (found["checked"], found["reason"]) == (False, reason)


def test_training_events_from_the_time_of_a_temporal_test_are_counted(strangers: Dataset):
    """Only where both sets tell the time; those here are a second a step, an order and no more."""
    dataset = tiny_dataset(split="temporal", num_events=9)
    times = np.cumsum(np.arange(1, 1 + len(strangers.events.rows))) + dataset.info["split"]["test_start_ms"]
    timed = dataclasses.replace(strangers, events=dataclasses.replace(strangers.events, timestamps=times))
    timed = write_prepared(strangers.uri, timed)
    (found,) = audit_elsewhere(dataset, trained_elsewhere(timed, stage="joint"))
    assert found["events_after_test_start"] == found["training_events"] > 0
