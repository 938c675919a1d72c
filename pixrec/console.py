"""Progress for people, on stderr: a live line on a terminal, sparse plain lines in a log.

In a log a stage writes its first line after some seconds or at its end, so a run that fails at once leaves only its
error there.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_PLAIN_SECONDS = 5.0


class Progress(Protocol):
    """How work says how far it is: `done` of `total` units of `stage`, None when the total is not known."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "", /) -> None: ...


class Console:
    """Use as a context manager; `progress` and `training` are handed to the work. A quiet one says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._rich = RichConsole(stderr=True)
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._spoken: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Console:
        if self._rich.is_terminal and not self._quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bars = Bars(*columns, TextColumn("{task.fields[note]}"), console=self._rich)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, text: str) -> None:
        """One line for people."""
        if self._quiet:
            return
        (self._bars.console if self._bars else self._rich).print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that a quiet console says too, as a warning of Python's."""
        if self._quiet:
            warnings.warn(text, UserWarning, stacklevel=2)
        self.say(text)

    def progress(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """As `Progress`."""
        if self._quiet:
            return
        if self._bars:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, note="")
            self._bars.update(self._tasks[stage], completed=done, total=total, note=note)
            return
        now, finished = time.monotonic(), total is not None and done >= total
        began, at_first = self._began.setdefault(stage, (now, done))
        if finished or now - self._spoken.setdefault(stage, now) >= _PLAIN_SECONDS:
            self._spoken[stage] = now
            of = f" {done}/{total}" if total else ""
            left = ""
            if total and not finished and done > at_first:
                left = f" ({_clock((now - began) * (total - done) / (done - at_first))} left)"
            print(f"{stage}{of}{left} {note}".rstrip(), file=sys.stderr, flush=True)

    def training(self, row: dict[str, Any]) -> None:
        """A row of the training log: loss parts as they come, every validation."""
        stage = f"train {row['part']}"
        if any(name.startswith("valid_") for name in row):
            figures = "  ".join(f"{k.removeprefix('valid_')} {v:.4f}" for k, v in row.items() if k.startswith("valid_"))
            self.say(f"{stage} step {row['step']}: {figures}")
        elif "loss" in row:
            note = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if k.startswith("loss"))
            self.progress(stage, row["step"], row["total_steps"], note)
            if "readers_needed" in row:
                step, read, wait = (row[f"{name}_seconds"] for name in ("busy", "read", "wait"))
                self.say(
                    f"{stage}: a step takes {step:.2f} s and reading it {read:.2f} s, so a worker needs "
                    f"{math.ceil(row['readers_needed'])} CPU readers; steps waited for {wait:.2f} s"
                )


class Rate:
    """Counts something from now on and says how many there are in a second."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._count = 0

    def add(self, count: int, unit: str) -> str:
        """`count` more; the rate since the beginning as text."""
        self._count += count
        seconds = time.monotonic() - self._began
        return f"{self._count / max(seconds, 1.0):,.0f} {unit}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
