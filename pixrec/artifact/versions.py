"""The versions of an index: what their manifests say, going back to one, deleting old ones, and the one that servers
are pinned to. Knows manifests, no vectors, and so no torch."""

from __future__ import annotations

from typing import Any

from pixrec import storage
from pixrec.errors import ArtifactError, InputError

MANIFEST, CURRENT, VERSIONS = "manifest.json", "CURRENT", "versions"
PINNED = "PINNED"
"""The file beside CURRENT that names the version servers are to use instead."""
_FACTS = ("version", "model_fingerprint", "width", "dtype", "rows")  # what a manifest always says


def check_index_writable(uri: str) -> None:
    """Raise OutputError when no index can be published at `uri`."""
    storage.check_writable(uri, VERSIONS, "index")  # a first version that failed left that folder and no CURRENT


def index_manifest(uri: str, version: str | None = None) -> dict[str, Any]:
    """The manifest of a version, by default the current one. Raises ArtifactError when there is none."""
    current = storage.join(uri, CURRENT)
    if version is None and not storage.exists(current):
        raise ArtifactError(f"{uri} holds no published index (no {CURRENT}); make one with pixrec embed")
    manifest = storage.join(uri, VERSIONS, version or storage.read_text(current).strip(), MANIFEST)
    if not storage.exists(manifest):
        named = f"version {version} is not there" if version else f"{CURRENT} names a version that is not there"
        raise ArtifactError(f"{uri}: {named}; run pixrec embed again")
    return dict(storage.read_json(manifest, _FACTS))


def list_versions(uri: str) -> list[dict[str, Any]]:
    """The manifests of all complete versions, oldest first, each with `current`.

    Raises ArtifactError when `uri` holds no index.
    """
    current = _current(uri)
    manifests = [_manifest(uri, name) for name in storage.list_folders(storage.join(uri, VERSIONS))]
    return [{**found, "current": found["version"] == current} for found in manifests if found]


def rollback(uri: str, version: str) -> str | None:
    """Make `version` the one in use; returns the one that was. Raises InputError when there is no such version."""
    known = [found["version"] for found in list_versions(uri)]
    if version not in known:
        raise InputError(f"--rollback {version}: no version of {uri}; there are {', '.join(known) or 'none'}")
    before = _current(uri)
    storage.write_bytes(storage.join(uri, CURRENT), version.encode())
    return before


def pinned_version(uri: str) -> str | None:
    """The version that servers are pinned to; None: they use the current one."""
    file = storage.join(uri, PINNED)
    return storage.read_text(file).strip() or None if storage.exists(file) else None


def pin_version(uri: str, version: str | None) -> None:
    """Make servers use `version`, whatever is published later; None: the current one again.

    Raises ArtifactError when there is no such version.
    """
    if version is not None:
        index_manifest(uri, version)
    storage.write_bytes(storage.join(uri, PINNED), (version or "").encode())


def keep_newest(uri: str, count: int) -> list[str]:
    """Delete all versions but the newest `count`, the one in use and the pinned one; returns those deleted, oldest
    first."""
    if count < 1:
        raise InputError(f"--keep {count}: at least 1 version must stay")
    kept = pinned_version(uri)
    old = [v["version"] for v in list_versions(uri)[:-count] if not v["current"] and v["version"] != kept]
    for version in old:
        folder = storage.join(uri, VERSIONS, version)
        storage.remove(storage.join(folder, MANIFEST))  # from here on it is no version
        storage.remove(folder)
    return old


def _current(uri: str) -> str | None:
    if not storage.exists(storage.join(uri, VERSIONS)):
        raise ArtifactError(f"{uri} holds no index (no {VERSIONS}); make one with pixrec embed")
    current = storage.join(uri, CURRENT)
    return storage.read_text(current).strip() if storage.exists(current) else None


def _manifest(uri: str, name: str) -> dict[str, Any] | None:
    manifest = storage.join(uri, VERSIONS, name, MANIFEST)
    hidden = name.startswith(".")
    return None if hidden or not storage.exists(manifest) else dict(storage.read_json(manifest, ("version",)))
