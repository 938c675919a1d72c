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
    """Yield a Mailbox whose rows reach `on_row` in a thread of the driver; all have arrived when the block ends."""
    mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote()
    stop = threading.Event()

    def drain() -> None:
        for row in ray.get(mailbox.take.remote()):
            on_row(row)

    def listen() -> None:
        while not stop.wait(_POLL_SECONDS):
            drain()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        stop.set()
        thread.join()
        drain()
        ray.kill(mailbox)
