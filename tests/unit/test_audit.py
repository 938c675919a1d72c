"""The audit finds every kind of leak that is put in, and none in what the code really does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fakes import TINY, tiny_config, tiny_dataset, tiny_model, write_prepared

from pixrec import cli
from pixrec.audit import audit, dataset_guards, provenance
from pixrec.data.sequences import Dataset, HeldOut
from pixrec.errors import InputError
from pixrec.sequential import WindowSource
from pixrec.training import BatchSource

CHECKED = (TINY, TINY)
EVERYBODY = tiny_config(
    model={"user_tower": "compact"},
    evaluate={"scorers": ["popularity", "sasrec_full"]},
    sasrec={"refit": True, "tower": {"max_history_items": 3}},
)


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_no_leak_in_what_training_and_scorers_are_given(split):
    dataset = tiny_dataset(split=split, num_events=9)
    found = audit(dataset, *CHECKED)
    assert found["leaks"] == 0
    assert found["training_events"] == dataset.training_counts().sum()
    assert found["targets_checked"]["test"] == len(dataset.held_out("test").targets) > 0
    assert found["training_windows_checked"] >= 10


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_everybody_who_trains_is_checked(split):
    """A refit may see validation events, and is found to see no test event."""
    found = audit(tiny_dataset(split=split, num_events=9), EVERYBODY, EVERYBODY)
    assert list(found["windows_of"]) == ["the towers", "the compact tower", "sasrec", "the refitted sasrec"]
    assert min(found["windows_of"].values()) >= 10
    assert found["training_windows_checked"] == sum(found["windows_of"].values())


def test_a_repeated_item_is_no_leak():
    """The target may well be an item of the history: events are told apart, not items."""
    dataset = tiny_dataset(num_events=6)
    same = dataclasses.replace(dataset.events, rows=np.zeros_like(dataset.events.rows))
    assert audit(dataclasses.replace(dataset, events=same), *CHECKED)["leaks"] == 0


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
        audit(leaking, EVERYBODY, EVERYBODY)


def test_a_window_that_reaches_beyond_training_is_found(monkeypatch):
    dataset = tiny_dataset(num_events=6)
    cut = BatchSource.step
    monkeypatch.setattr(BatchSource, "step", lambda *a: [np.append(w, w[-1] + 1) for w in cut(*a)])
    with pytest.raises(
        InputError, match=r"item 'i.*' of user 'u.*' is the valid target and also in a training window of the to"
    ):
        audit(dataset, *CHECKED)


class BeyondTheEnd(WindowSource):
    """Windows that have the next event of their user too, which is held out where the history ends."""

    def _windows(self, history, rng):
        for window in super()._windows(history, rng):
            yield np.append(window, window[-1] + 1)


@pytest.mark.parametrize(("tower", "whose"), [("compact", "the compact tower"), ("interleaved", "sasrec")])
def test_a_window_of_a_sequence_trainer_that_reaches_beyond_training_is_found(monkeypatch, tower, whose):
    monkeypatch.setattr("pixrec.audit.WindowSource", BeyondTheEnd)
    config = dataclasses.replace(EVERYBODY, model=dataclasses.replace(EVERYBODY.model, user_tower=tower))
    with pytest.raises(InputError, match=f"is the valid target and also in a training window of {whose};"):
        audit(tiny_dataset(num_events=6), config, config)


def test_a_refit_that_reaches_beyond_validation_is_found(monkeypatch):
    class OnlyOfARefit(BeyondTheEnd):
        def _windows(self, history, rng):
            return (super() if len(history) == 5 else super(BeyondTheEnd, self))._windows(history, rng)

    monkeypatch.setattr("pixrec.audit.WindowSource", OnlyOfARefit)
    with pytest.raises(InputError, match="is the test target and also in a training window of the refitted sasrec;"):
        audit(tiny_dataset(num_events=6), EVERYBODY, EVERYBODY)


def test_a_leak_ends_the_command_with_one_line_and_no_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("pixrec.audit.WindowSource", BeyondTheEnd)
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
        audit(HoldsOutLate(dataset.uri, dataset.items, late, dataset.events), *CHECKED)


def test_guards_and_provenance():
    dataset = tiny_dataset(num_users=2, num_events=1)
    assert dataset_guards(dataset) == {"users_with_one_event_share": 1.0, "held_out_items": 0}
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
