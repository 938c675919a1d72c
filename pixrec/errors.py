"""The errors a user can cause and cure.

    PixRecError                 one line that names the thing, its value and the cure; the command exits with 2
    ├── ConfigError             an unknown key, a value of the wrong type, keys that contradict each other
    ├── InputError              a table, picture set or argument that cannot be used
    │   └── UnreadableImage     bytes that are not a picture PixRec accepts; `.reason` is a short fixed phrase
    ├── ArtifactError           a model, index or prepared data set that is absent, incomplete or of another make
    ├── OutputError             a place that cannot be written
    └── UnavailableError        a place that does not answer for now; exits with 1, and the same command may go on later

Anything else that escapes is a defect of PixRec and exits with 1 too.

An error raised in a Ray worker would reach the driver inside a traceback. `fault_text` makes a value of it that a row
can carry, and `raise_fault` raises it again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import ClassVar


class PixRecError(Exception):
    """Base of every error whose cure lies with the user."""

    exit_code: ClassVar[int] = 2


class ConfigError(PixRecError):
    pass


class InputError(PixRecError):
    pass


class UnreadableImage(InputError):
    """`reason` is one of a small fixed set of phrases, so that rejects can be counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"unreadable picture: {self.reason}"


class ArtifactError(PixRecError):
    pass


class OutputError(PixRecError):
    pass


class UnavailableError(PixRecError):
    """Nobody is at fault, and the same may succeed later: a job that ends so is begun again."""

    exit_code = 1


def fault_text(error: PixRecError) -> str:
    """The error as text; one of a class defined elsewhere becomes the nearest of the tree above."""
    kind = next(base for base in type(error).__mro__ if base.__module__ == __name__)
    return json.dumps([kind.__name__, *(error.args if kind is type(error) else (str(error),))])


def raise_fault(text: str | None) -> None:
    """Raise the error that `fault_text` wrote; None stands for no error."""
    if text is not None:
        name, *arguments = json.loads(text)
        raise globals()[name](*arguments)


def user_fault(error: BaseException | None) -> PixRecError | None:
    """The PixRecError behind an error, also one that happened on a worker, whichever of them it was."""
    if error is None or isinstance(error, PixRecError):
        return error
    failures = getattr(error, "worker_failures", None)  # Ray Train: an exception of each worker that failed
    inner = [*failures.values()] if isinstance(failures, dict) else []
    faults = (user_fault(e) for e in (getattr(error, "cause", None), *inner, error.__cause__) if e is not error)
    return next(filter(None, faults), None)


@contextlib.contextmanager
def surfaced() -> Iterator[None]:
    """A block (or, as a decorator, a function) that raises the PixRecError itself where one lies behind an error."""
    try:
        yield
    except Exception as error:
        fault = user_fault(error)
        if fault is None or fault is error:
            raise
        raise fault from None
