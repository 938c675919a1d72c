"""Vectors of an index version that is still being computed, kept until it is published, so that a killed run loses
little.

They lie in a hidden folder beside the versions, one for each model, as part files that are complete or absent. A row is
identified by model, item id and content, so a run can use it whichever run computed it. Before a part is begun a marker
file says how many rows it will have, which tells how many rows a killed run lost. A file's name says which run writes
it, so that a run can clear up what its own killed workers left half written.
"""

from __future__ import annotations

import datetime
import re
import uuid
from collections.abc import Sequence

import pyarrow as pa

from pixrec import storage
from pixrec.artifact.versions import VERSIONS
from pixrec.errors import InputError

_PREFIX, _HALF = ".unfinished-", ".partial-"
_STARTED = re.compile(r"(?P<name>[^/]+)\.started-(?P<rows>\d+)$")
_MOMENT = re.compile(r"\d{8}T\d{12}")
_KEPT_DAYS = 7


class Vanished(Exception):
    """A part that was there is gone: another run for the same index published it meanwhile and cleared up."""


class Unfinished:
    """The work folder of one model in the index at `uri`, as one run sees it: the driver and copies in its workers."""

    def __init__(self, uri: str, model_fingerprint: str) -> None:
        self.uri = storage.join(uri, VERSIONS, f"{_PREFIX}{model_fingerprint}")
        self._run = f"-run{uuid.uuid4().hex[:8]}-"

    def start(self, rows: int) -> str:
        """Say that a part of `rows` rows is begun; returns its name."""
        name = f"{_moment()}{self._run}{uuid.uuid4().hex[:8]}"
        storage.write_bytes(storage.join(self.uri, f"{name}.started-{rows}"), b"")
        return name

    def finish(self, name: str, table: pa.Table) -> str:
        """Store the part that was begun under `name`; returns its URI."""
        part = storage.join(self.uri, f"{name}.parquet")
        storage.write_table(part, table)
        return part

    def files(self) -> list[str]:
        """URIs of all there is: parts, markers and what a killed run left half written."""
        return storage.list_files(self.uri)

    @staticmethod
    def lost_rows(files: Sequence[str]) -> int:
        """Rows, among `files`, of parts that were begun and never finished."""
        finished = {storage.name(file).removesuffix(".parquet") for file in files if file.endswith(".parquet")}
        begun = [found for file in files if (found := _STARTED.search(file))]
        return sum(int(found["rows"]) for found in begun if found["name"] not in finished)

    def clear(self, left_behind: Sequence[str]) -> None:
        """Remove everything, whoever wrote it, but what another run may be writing: its half files that are not in
        `left_behind`. The workers of this run must have ended."""
        for file in self.files():
            if file in left_behind or not self._is_anothers_half(storage.name(file)):
                storage.remove(file)
        storage.remove_empty(self.uri)

    def _is_anothers_half(self, name: str) -> bool:
        return _HALF in name and self._run not in name


def read_part(uri: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of one part. Raises Vanished when it is gone."""
    try:
        return storage.read_table(uri, columns)
    except InputError:
        if storage.exists(uri):
            raise
        raise Vanished(uri) from None


def sweep(uri: str) -> None:
    """Remove what runs that were killed and never run again left among the versions a week ago or earlier."""
    versions = storage.join(uri, VERSIONS)
    oldest = _moment(-_KEPT_DAYS)
    for name in storage.list_folders(versions):
        folder = storage.join(versions, name)
        if name.startswith("."):
            inside = [storage.name(file) for file in storage.list_files(folder)] if name.startswith(_PREFIX) else []
            moments = [found[0] for text in (name, *inside) if (found := _MOMENT.search(text))]
            if moments and max(moments) < oldest:
                storage.remove(folder)


def _moment(days: int = 0) -> str:
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    return f"{moment:%Y%m%dT%H%M%S%f}"
