"""What the library's functions hand back: small objects that name a folder, say what made it, and stand for its path.

A handle holds no data. Wherever one is taken, a path or an s3:// URI is too, and `str(handle)` is that place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, TypeAlias

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, index_manifest, keep_newest, list_versions, rollback
from pixrec.data.sequences import DATASET_MARKER
from pixrec.errors import ArtifactError, InputError
from pixrec.report import PAGE
from pixrec.report.notebook import ResultTable, show

METRICS = "metrics.json"
_OF_REPORT = ("users", "items", "results", "provenance", "settings")

Place: TypeAlias = str | os.PathLike[str]
"""A local path, an s3:// URI as a string, or a handle."""


def place(where: object) -> str:
    """A Place as a string. Raises InputError where it is none, or a pathlib.Path that was an s3:// URI."""
    if not isinstance(where, (str, os.PathLike)):
        raise InputError(f"{type(where).__name__} is neither a place (a path, an s3:// URI, a handle) nor a table")
    uri = os.fspath(where)
    if uri.startswith("s3:/") and not storage.is_remote(uri):
        raise InputError(f"{uri}: pathlib drops a slash of s3://; give the URI as a string")
    return uri


@dataclass(frozen=True, repr=False)
class Handle:
    """A published folder."""

    uri: str
    """Where it lies, as it was given: a relative path stays one."""
    fingerprint: str
    """Hash of what produced it: equal for equal inputs and settings."""
    counts: Mapping[str, int] = field(compare=False)
    info: Mapping[str, Any] = field(compare=False)
    """All that its JSON file says."""

    def __fspath__(self) -> str:
        return self.uri

    def __str__(self) -> str:
        return self.uri

    def _facts(self) -> dict[str, int | str]:
        return {**self.counts, "fingerprint": self.fingerprint[:12]}

    def __repr__(self) -> str:
        facts = "".join(f", {name}={value!r}" for name, value in self._facts().items())
        return f"{type(self).__name__}({self.uri!r}{facts})"

    def _repr_html_(self) -> str:
        shown = {"place": self.uri, **self._facts()}
        rows = "".join(
            f"<tr><th>{name}</th><td>{escape(f'{value:,}' if isinstance(value, int) else value)}</td></tr>"
            for name, value in shown.items()
        )
        return f"<table><tr><th colspan=2>{type(self).__name__}</th></tr>{rows}</table>"


@dataclass(frozen=True, repr=False)
class PreparedData(Handle):
    """A prepared data set; `info` is its dataset.json."""

    @classmethod
    def of(cls, uri: str, info: Mapping[str, Any]) -> PreparedData:
        counts = {
            "items": info["items"]["kept"],
            "pictures": info["images"]["ok"],
            "users": info["users"],
            "events": info["interactions"]["kept"],
        }
        return cls(uri, info["fingerprint"], counts, info)

    @classmethod
    def load(cls, where: Place) -> PreparedData:
        """The handle of a data set made before. Raises ArtifactError when there is none."""
        return cls.of(place(where), _read(place(where), DATASET_MARKER, "data set", "pixrec prepare", "fingerprint"))


@dataclass(frozen=True, repr=False)
class TrainedModel(Handle):
    """A model folder; `info` is its model.json."""

    @classmethod
    def of(cls, uri: str, info: Mapping[str, Any]) -> TrainedModel:
        counts = {"trained_events": info["trained_events"]} if "trained_events" in info else {}
        return cls(uri, info["fingerprint"], counts, info)

    @classmethod
    def load(cls, where: Place) -> TrainedModel:
        """The handle of a model trained before. Raises ArtifactError when there is none."""
        return cls.of(place(where), _read(place(where), MODEL_MARKER, "model", "pixrec train", "fingerprint"))


@dataclass(frozen=True, repr=False)
class PublishedIndex(Handle):
    """The current version of an index; `info` is that version's manifest."""

    @classmethod
    def of(cls, uri: str, info: Mapping[str, Any]) -> PublishedIndex:
        made_by = [info["model_fingerprint"], info.get("data_fingerprint"), info["dtype"]]
        return cls(uri, _hash(made_by), {"items": info["rows"], "pictures": info["with_image"]}, info)

    @classmethod
    def load(cls, where: Place) -> PublishedIndex:
        """The handle of an index made before. Raises ArtifactError when there is none."""
        return cls.of(place(where), index_manifest(place(where)))

    @property
    def version(self) -> str:
        """The name of the version, which sorts by time."""
        return str(self.info["version"])

    def _facts(self) -> dict[str, int | str]:
        return {"version": self.version, **super()._facts()}

    def versions(self) -> list[dict[str, Any]]:
        """The manifests of all versions at this place, oldest first, each with `current`."""
        return list_versions(self.uri)

    def rollback(self, version: str) -> PublishedIndex:
        """Make `version` the current one and return its handle. Raises InputError when there is no such version."""
        rollback(self.uri, version)
        return self.load(self.uri)

    def keep_newest(self, count: int) -> list[str]:
        """Delete all versions but the newest `count` and the current one; returns the names of those deleted."""
        return keep_newest(self.uri, count)


@dataclass(frozen=True, repr=False)
class Report(Handle):
    """An evaluation; `info` is its metrics.json."""

    @classmethod
    def of(cls, uri: str, info: Mapping[str, Any]) -> Report:
        counts = {"users": info["users"], "items": info["items"], "scorers": len(info["results"])}
        return cls(uri, _hash([info["provenance"], info["settings"]]), counts, info)

    @classmethod
    def load(cls, where: Place) -> Report:
        """The handle of an evaluation made before. Raises ArtifactError when there is none."""
        return cls.of(place(where), _read(place(where), METRICS, "evaluation", "pixrec evaluate", *_OF_REPORT))

    @property
    def page(self) -> str:
        """The place of the report to read in a browser."""
        return storage.join(self.uri, PAGE)

    @property
    def table(self) -> ResultTable:
        """The results: a row a scorer, its metrics with the ends of their 95 % intervals."""
        return ResultTable(self.info)

    def show(self) -> None:
        """In a notebook, show the table and the picture grids; elsewhere, print the table and where the page lies."""
        show(self.table, storage.read_text(self.page), self.page)


def _read(uri: str, marker: str, kind: str, verb: str, *keys: str) -> dict[str, Any]:
    file = storage.join(uri, marker)
    if not storage.exists(file):
        raise ArtifactError(f"{uri} holds no complete {kind} (no {marker}); make it with {verb}")
    return dict(storage.read_json(file, keys))


def _hash(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
