"""The errors a user can cause and cure.

    PixRecError                 one line that names the thing, its value and the cure; the command exits with 2
    ├── ConfigError             an unknown key, a value of the wrong type, keys that contradict each other
    ├── InputError              a table, picture set or argument that cannot be used
    │   └── UnreadableImage     bytes that are not a picture PixRec accepts; `.reason` is a short fixed phrase
    ├── ArtifactError           a model, index or prepared data set that is absent, incomplete or of another make
    └── OutputError             a place that cannot be written

Anything else that escapes is a defect of PixRec and exits with 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class PixRecError(Exception):
    """Base of every error whose cure lies with the user."""


class ConfigError(PixRecError):
    pass


class InputError(PixRecError):
    pass


class UnreadableImage(InputError):
    """`reason` is one of a small fixed set of phrases, so that rejects can be counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"unreadable picture: {reason}")
        self.reason = reason


class ArtifactError(PixRecError):
    pass


class OutputError(PixRecError):
    pass


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
