"""The log of a training run: rows for the report, TensorBoard events for those who watch. No Ray."""

from __future__ import annotations

import json
import tempfile
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pixrec import storage

_ROWS, _EVENTS = "training.jsonl", "tensorboard"
_NOT_FIGURES = ("part", "step", "total_steps")


class TrainingLog:
    """Rows of all parts of a run, kept below `folder`; continues what an interrupted run left there.

    A row is a dict with `part`, `step` and figures. On s3:// the events are kept locally until `save`.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._remote = storage.is_remote(folder)
        self._events = tempfile.mkdtemp(prefix="pixrec-") if self._remote else storage.join(folder, _EVENTS)
        self._writers: dict[str, SummaryWriter] = {}
        self.rows = read_log(folder)

    def add(self, row: dict[str, Any]) -> None:
        """Take a row; validation rows also bring what was logged so far to `folder`."""
        self.rows.append(row)
        part = row["part"]
        if part not in self._writers:
            self._writers[part] = SummaryWriter(f"{self._events}/{part}", flush_secs=5)
        for name, value in row.items():
            if name not in _NOT_FIGURES:
                self._writers[part].add_scalar(name, value, row["step"])
        if any(name.startswith("valid_") for name in row):
            self.save(self._folder)

    def save(self, folder: str) -> None:
        """Write the rows, and the events where they are not there already, below `folder`."""
        # A resumed part logs the steps after its checkpoint again; the later row of a step counts.
        latest = {(row["part"], row["step"], "loss" in row): row for row in self.rows}
        lines = "".join(json.dumps(row) + "\n" for row in latest.values())
        storage.write_bytes(storage.join(folder, _ROWS), lines.encode())
        for writer in self._writers.values():
            writer.flush()
        target = storage.join(folder, _EVENTS)
        if target != self._events and storage.exists(self._events):
            storage.copy_folder(self._events, target)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._remote:
            storage.remove(self._events)


def read_log(folder: str) -> list[dict[str, Any]]:
    """The rows kept below `folder`, none when there is no log."""
    file = storage.join(folder, _ROWS)
    return [json.loads(line) for line in storage.read_text(file).splitlines()] if storage.exists(file) else []
