"""Who is at fault is told from the error, wherever it happened; an error travels from process to process as text."""

from __future__ import annotations

import copy

import pytest
from ray.train import WorkerGroupError

from pixrec.errors import (
    ArtifactError,
    InputError,
    PixRecError,
    UnreadableImage,
    fault_text,
    raise_fault,
    surfaced,
    user_fault,
)

FAULT = InputError("items.parquet: cannot be read")


class Elsewhere(InputError):
    """An error of ours that another module defines."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ArtifactError('out/model: no "model.json"\nthere'), ArtifactError),
        (PixRecError("Käse \udcff"), PixRecError),
        (InputError(), InputError),
        (UnreadableImage("not a picture"), UnreadableImage),
        (Elsewhere("loss is nan"), InputError),
    ],
)
def test_an_error_travels_as_text(error: PixRecError, kind: type[PixRecError]):
    with pytest.raises(PixRecError) as raised:
        raise_fault(fault_text(error))
    assert type(raised.value) is kind
    assert str(raised.value) == str(error)


def test_no_fault_raises_nothing():
    raise_fault(None)


def test_an_unreadable_picture_keeps_its_reason_wherever_it_goes():
    """As a copy, which is how Ray hands an error from process to process, and as text."""
    with pytest.raises(UnreadableImage) as raised:
        raise_fault(fault_text(copy.copy(UnreadableImage("too many pixels"))))
    assert raised.value.reason == "too many pixels"
    assert str(raised.value) == "unreadable picture: too many pixels"


class TaskError(Exception):
    """As Ray wraps an exception of a task."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback of the worker")
        self.cause = cause


def chained(cause: Exception) -> Exception:
    error = RuntimeError("outer")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        FAULT,
        TaskError(FAULT),
        chained(FAULT),
        WorkerGroupError("as Ray Train says it", {0: RuntimeError("lost"), 1: TaskError(FAULT)}),
        chained(TaskError(chained(FAULT))),
    ],
)
def test_a_fault_of_the_user_is_raised_as_it_is(error: Exception):
    @surfaced()
    def work() -> None:
        """What it does."""
        raise error

    with pytest.raises(InputError) as raised:
        work()
    assert raised.value is FAULT
    assert user_fault(error) is FAULT
    assert work.__doc__ == "What it does."


def test_a_defect_stays_what_it_is():
    defect = TaskError(ValueError("a defect"))
    with pytest.raises(TaskError) as raised, surfaced():
        raise defect
    assert raised.value is defect
    defect.cause = defect  # an error may name itself
    assert user_fault(defect) is None


def test_the_first_worker_at_fault_speaks():
    failures = {0: TaskError(ArtifactError("a")), 1: TaskError(InputError("b"))}
    with pytest.raises(ArtifactError, match=r"^a$"), surfaced():
        raise WorkerGroupError("two", failures)
