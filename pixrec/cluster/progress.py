"""News from the workers to the driver, while they work. Knows nothing of what the news say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

_POLL_SECONDS = 0.5


class Mailbox:
    """Rows put by workers, taken by the driver in the order of arrival."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def put(self, rows: list[dict[str, Any]]) -> None:
        self._rows.extend(rows)

    def take(self) -> list[dict[str, Any]]:
        rows, self._rows = self._rows, []
        return rows


@contextmanager
def listening(on_row: Callable[[dict[str, Any]], None]) -> Iterator[Any]:
    """Yield a Mailbox whose rows reach `on_row` in a thread of the driver; all have arrived when the block ends.

    An error of `on_row` stops neither the work nor the rows that follow: the first one is raised when the block ends
    well. An error of the block itself goes before it.
    """
    # News are no reason to lose the work: where the mailbox's node is lost, an empty one takes its place.
    mailbox: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mailbox).remote()
    stop = threading.Event()
    failures: list[Exception] = []

    def tell(row: dict[str, Any]) -> None:
        try:
            on_row(row)
        except Exception as error:
            failures.append(error)

    def listen() -> None:
        last = False
        try:
            while not last:
                last = stop.wait(_POLL_SECONDS)
                for row in ray.get(mailbox.take.remote()):
                    tell(row)
        except ray.exceptions.RayError as error:
            failures.append(error)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        stop.set()
        thread.join()
        ray.kill(mailbox)
    if failures:
        raise failures[0]
