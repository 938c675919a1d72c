"""The versions that servers use: which one is wanted now, and how it is loaded. Knows no Ray and no HTTP."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pixrec
from pixrec import storage
from pixrec.artifact.versions import index_manifest, list_versions, pin_version, pinned_version, rollback
from pixrec.errors import ArtifactError, InputError
from pixrec.query import Query

if TYPE_CHECKING:
    from pixrec.recommender import Recommender
    from pixrec.serving.backend import Versions
    from pixrec.serving.shards import Shard

logger = logging.getLogger("ray.serve.pixrec")

Outcome = Literal["swapped", "unchanged", "refused"]
Manifest = Mapping[str, Any]
InUse = tuple["Recommender", Manifest]


class Source(Protocol):
    """Where versions come from."""

    def wanted(self) -> Manifest:
        """What the manifest of the version to serve says: of the pinned one, else of the current one."""
        ...

    def canary(self) -> Manifest | None:
        """What the manifest of the version says that a share of users is to get; None: no other one."""
        ...

    def load(self, manifest: Manifest) -> Recommender: ...

    def load_shard(self, versions: Versions, number: int, shards: int) -> Shard:
        """Part `number` of so many of the index of these versions. Raises PixRecError."""
        ...

    def pin(self, version: str | None) -> None: ...

    def pinned(self) -> str | None: ...

    def before(self, version: str) -> str | None: ...

    def make_current(self, version: str) -> None: ...


@dataclass(frozen=True)
class Published:
    """The versions of an index on storage, each with the model that made it."""

    model: str
    index: str
    data: str | None = None
    """None: the data set that the index remembers."""
    blend: bool | None = None
    """As `serve.blend`."""
    half_life_days: float | None = None
    """As `serve.popularity_half_life_days`."""
    new_item_share: float | None = None
    """As `serve.new_item_share`."""

    def wanted(self) -> Manifest:
        return index_manifest(self.index, self.pinned())

    def canary(self) -> Manifest | None:
        """The current version, where an earlier one is pinned."""
        pinned = self.pinned()
        current = None if pinned is None else index_manifest(self.index)
        return current if current and str(current["version"]) > str(pinned) else None

    def load(self, manifest: Manifest) -> Recommender:
        """Raises ArtifactError where the version's model is not to be had, or anything is absent or damaged."""
        from pixrec.recommender import load_recommender

        place, data, version = self._model_of(manifest), self._data_of(manifest), str(manifest["version"])
        settings = (self.blend, version, self.half_life_days, self.new_item_share)
        return load_recommender(place, self.index, data, *settings)

    def load_shard(self, versions: Versions, number: int, shards: int) -> Shard:
        from pixrec.recommender import data_of
        from pixrec.serving.shards import load_shard

        manifest = index_manifest(self.index, versions.index_version)
        if manifest["model_fingerprint"] != versions.model_version:
            raise ArtifactError(f"{self.index}: version {versions.index_version} is of another model")
        data = self._data_of(manifest) or data_of(self.index, manifest)
        return load_shard(self.index, data, manifest, number, shards)

    def pin(self, version: str | None) -> None:
        pin_version(self.index, version)

    def pinned(self) -> str | None:
        return pinned_version(self.index)

    def before(self, version: str) -> str | None:
        """The version that was published before this one."""
        earlier = [str(found["version"]) for found in list_versions(self.index) if str(found["version"]) < version]
        return earlier[-1] if earlier else None

    def make_current(self, version: str) -> None:
        rollback(self.index, version)

    def _model_of(self, manifest: Manifest) -> str:
        """The model named when the server was started, or where the index says that its model lay."""
        wanted = str(manifest["model_fingerprint"])
        found = {place: _said(place, "model.json") for place in (self.model, manifest.get("model")) if place}
        for place, fingerprint in found.items():
            if fingerprint == wanted:
                return place
        here = str(found[self.model])[:8]
        raise ArtifactError(
            f"{self.index} was made by model {wanted[:8]}, not {here}; run pixrec embed with this model"
        )

    def _data_of(self, manifest: Manifest) -> str | None:
        """The data set named when the server was started, unless the index was made of another one that is there."""
        made_of = manifest.get("data_fingerprint")
        if self.data is None or made_of is None or _said(self.data, "dataset.json") == made_of:
            return self.data
        from pixrec.recommender import data_of

        try:
            remembered = data_of(self.index, manifest)
        except ArtifactError:
            return self.data
        return remembered if _said(remembered, "dataset.json") == made_of else self.data


def _said(place: str, marker: str) -> str | None:
    """The fingerprint in the JSON file of a published folder; None where there is none."""
    try:
        return str(storage.read_json(storage.join(place, marker), ("fingerprint",))["fingerprint"])
    except InputError:
        return None


class _Place:
    """A version in use, or none yet, and which one is refused for its place."""

    def __init__(self) -> None:
        self.in_use: InUse | None = None
        self.refused: str | None = None
        self.refused_version: str | None = None

    def take(self, in_use: InUse | None) -> None:
        self.in_use, self.refused, self.refused_version = in_use, None, None

    def refuse(self, version: str | None, error: Exception) -> None:
        self.refused, self.refused_version = " ".join(str(error).split()) or type(error).__name__, version
        logger.error("a published version is refused: %s", self.refused, exc_info=not _expected(error))


class Rollout:
    """The recommender in use. What is published later is loaded beside it and takes its place in one step; what cannot
    be loaded is refused, and the one in use stays. A canary, where there is one, is used beside it for some users.

    A user of `current` takes it once for each piece of work: tower and index of one recommender belong together.
    """

    def __init__(
        self,
        source: Source,
        loaded: Callable[[Recommender], None] = lambda recommender: None,
        canary_share: float = 0.0,
    ) -> None:
        """loaded: is called with each recommender before it is used; what it raises refuses the version. canary_share:
        of the users, those who get the source's canary.

        Raises what loading raises: without a first version there is nothing to serve.
        """
        self._source, self._loaded, self._canary_share = source, loaded, canary_share
        self._one_at_a_time = threading.Lock()
        self._stable, self._canary = _Place(), _Place()
        self.outcomes: Counter[Outcome] = Counter()
        manifest = source.wanted()
        self._stable.take((self._load(manifest), manifest))
        if canary_share:
            self._follow(self._canary, source.canary, again=False)

    @property
    def in_use(self) -> InUse:
        assert self._stable.in_use is not None
        return self._stable.in_use

    @property
    def current(self) -> Recommender:
        return self.in_use[0]

    @property
    def canary(self) -> Recommender | None:
        in_use = self._canary.in_use
        return in_use[0] if in_use else None

    @property
    def refused(self) -> str | None:
        """Why a wanted version is not in use."""
        return self._stable.refused or self._canary.refused

    def for_query(self, query: Query) -> Recommender:
        """The recommender for this user: always the same one, as long as the versions stay."""
        canary = self.canary
        return self.current if canary is None or place_of(query) >= self._canary_share else canary

    def watch(self, seconds: float) -> None:
        """Look for another version every `seconds`, from now on."""

        def look() -> None:
            while True:
                time.sleep(seconds * random.uniform(0.9, 1.1))  # replicas that started together look apart
                self.refresh()

        if seconds > 0:
            threading.Thread(target=look, name="versions", daemon=True).start()

    def refresh(self, again: bool = False) -> Outcome:
        """Look for other versions, load them and swap; takes as long as loading. One refused before is tried once more
        only if `again`. The outcome is that of the canary where the other stays."""
        with self._one_at_a_time:
            outcome = self._follow(self._stable, self._source.wanted, again)
            if self._canary_share:
                of_canary = self._follow(self._canary, self._source.canary, again)
                outcome = of_canary if outcome == "unchanged" else outcome
            self.outcomes[outcome] += 1
            return outcome

    def _load(self, manifest: Manifest) -> Recommender:
        """Takes what is in use already, as when a canary becomes what all get."""
        for place in (self._stable, self._canary):
            if place.in_use and _name(place.in_use[1]) == _name(manifest):
                return place.in_use[0]
        recommender = self._source.load(manifest)
        self._loaded(recommender)
        return recommender

    def _follow(self, place: _Place, find: Callable[[], Manifest | None], again: bool) -> Outcome:
        version, held = None, place.in_use
        try:
            manifest = find()
            if manifest is None:
                place.take(None)
                return "unchanged" if held is None else "swapped"
            version = _name(manifest)
            if held is not None and version == _name(held[1]):
                place.take(held)
                return "unchanged"
            if version == place.refused_version and not again:
                return "refused"
            loaded = self._load(manifest)
        except Exception as error:  # whatever is wrong with the new version, the old one answers on
            place.refuse(version, error)
            return "refused"
        place.take((loaded, manifest))
        logger.info("now serving index %s%s", manifest["version"], " as a canary" if place is self._canary else "")
        return "swapped"

    def pin(self, version: str | None) -> Outcome:
        """Serve `version` whatever is published, or with None what is current again. One that is refused is unpinned.

        Raises ArtifactError when there is no such version.
        """
        earlier = self._source.pinned()
        self._source.pin(version)
        outcome = self.refresh(again=True)
        if self._stable.refused is not None:
            self._source.pin(earlier)
            return "refused"
        return "unchanged" if outcome == "refused" else outcome

    def rollback(self) -> Outcome | None:
        """Give a canary up: what is pinned becomes the current version. Without one, pin the version that was published
        before the one in use; None where there is none."""
        if self.canary is not None:
            self._source.make_current(self.current.index_version)
            return self.refresh(again=True)
        earlier = self._source.before(self.current.index_version)
        return None if earlier is None else self.pin(earlier)

    def state(self) -> dict[str, Any]:
        """What /readyz and the /admin routes say of a replica."""
        (recommender, manifest), canary = self.in_use, self.canary
        return {
            "model_version": recommender.model_version,
            "index_version": recommender.index_version,
            "published": manifest.get("time"),
            "refused": self.refused,
            **({"canary": [canary.model_version, canary.index_version]} if canary else {}),
            **{name: value for name, value in manifest.items() if name.startswith("recall")},
        }


def place_of(query: Query) -> float:
    """Where a user stands among all, from 0 to 1: by a hash of the user's id, or of the history where none is given. Of
    whom nothing is known stands at 1."""
    who = query.user_id or "\n".join(query.history)
    digest = hashlib.blake2b(who.encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 if who else 1.0


def _name(manifest: Manifest) -> str:
    return f"{manifest['model_fingerprint']} {manifest['version']}"


def _expected(error: Exception) -> bool:
    return isinstance(error, pixrec.errors.PixRecError)
