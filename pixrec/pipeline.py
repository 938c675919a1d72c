"""prepare, train, embed, evaluate and publish as one run that can be killed anywhere and goes on.

Everything lies below one place:

    data/<key>/  models/<key>/  reports/<version>/     a key is a hash of all that makes what lies there
    store/<digest>/                                    events and items of a server's store, by what they say
    pictures/  tokens/                                 downloads, and what frozen encoders made; of all data sets
    index/                                             its current version names the model and the data behind it

So a run finds what an earlier one of the same inputs and settings has finished, and publishing is a single write: the
name of a version into `index/CURRENT`, which servers follow. The model in use is compared with the new one on the new
data's test users. Where the new one may be worse, the old one stays in use, with vectors of the new catalog.

With `pipeline.store` a run learns from what happened in the shop too, and with `pipeline.start` it trains the model in
use on: one run a day is a loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pixrec import storage, verbs
from pixrec.artifact import list_versions, rollback
from pixrec.config import Config, PipelineConfig, ServeConfig, change_config, load_config, to_dict
from pixrec.console import Console
from pixrec.data.sequences import load_dataset
from pixrec.errors import ArtifactError, ConfigError, InputError, surfaced
from pixrec.handles import Handle, Place, PreparedData, PublishedIndex, Report, TrainedModel, place
from pixrec.live.places import Exported, export_events, export_items, store_place
from pixrec.schema import EVENT
from pixrec.verbs import SERVED, Progress, Settings

STORE = "store"
_H = TypeVar("_H", bound=Handle)


@surfaced()
def pipeline(
    items: Place | Sequence[Place] | None,
    interactions: Place | Sequence[Place],
    out: Place,
    *,
    source: Literal["tables", "amazon2023"] = "tables",
    config: Settings = None,
    overrides: Sequence[str] = (),
    progress: Progress = False,
) -> dict[str, Any]:
    """Run what is not done yet of all steps below `out`, and publish a version of its index.

    Returns where everything lies, the `published` version, whether that is of the `new` model or of the one `served`
    before, `why`, and of each step whether it was `made` now or `found`. Arguments as those of `prepare` and `train`.
    One run at a time below one place. Raises as the verbs do.
    """
    with verbs.open_console(progress) as console, contextlib.ExitStack() as stack:
        run = _Run(place(out), config, overrides, console, stack)
        tables = run.tables(verbs.listed(items), verbs.listed(interactions), source)
        data = run.prepare(*tables, source)
        model = run.train(data)
        version = run.embed("embed", model, data)
        chosen: PublishedIndex | None = version
        why = "it is in use already"
        report = run.report(version)
        served = run.served()
        if served is None or served.version != version.version or report is None:
            report, chosen, why = run.compare(model, data, version, served)
        if chosen is not None and (served is None or served.version != chosen.version):
            rollback(chosen.uri, chosen.version)
        console.say(f"published: {chosen.version if chosen else 'nothing'}, as {why}")
        deleted = run.clear(data, model, report) if chosen else []
    return {
        "out": run.out,
        "published": chosen.version if chosen else None,
        "published_model": None if chosen is None else "new" if chosen.version == version.version else SERVED,
        "why": why,
        "steps": run.steps,
        "data": data.uri,
        "model": model.uri,
        "index": version.uri,
        "version": version.version,
        "report": report.uri,
        "results": report.info["results"],
        "deleted": deleted,
    }


def decide(metrics: Mapping[str, Any], settings: PipelineConfig) -> tuple[bool, str]:
    """Whether the model of an evaluation that ranked the model in use beside it is published, and why."""
    compared = metrics["differences"]["minus"][SERVED]
    low, high = compared["ci95"][settings.metric]
    figures = (
        f"{settings.metric} minus the served model's is {compared[settings.metric]:+.4f} [{low:+.4f}, {high:+.4f}]"
    )
    if low >= -settings.margin:
        return True, f"{figures}, not below -{settings.margin:g} (pipeline.margin)"
    return False, f"{figures}, so it may be worse by more than {settings.margin:g} (pipeline.margin)"


class _Run:
    """The steps below one place, each done once."""

    def __init__(
        self, out: str, config: Settings, overrides: Sequence[str], console: Console, stack: contextlib.ExitStack
    ) -> None:
        self.out, self.console, self.steps = out, console, dict[str, str]()
        self._given, self._overrides, self._stack, self._connected = config, overrides, stack, False
        self.config = load_config(overrides=overrides, base=verbs.read_settings(config))

    def tables(self, items: list[str], interactions: list[str], source: str) -> tuple[list[str], list[str]]:
        """The tables of items and of interactions: those given, and what the store holds beside them."""
        index = storage.join(self.out, "index")
        store = store_place(self.config.pipeline.store, index)
        if store == "none" or (self.config.pipeline.store == "index" and not storage.exists(store)):
            return items, interactions
        if source != "tables":
            raise InputError(f"pipeline.store goes with tables, not with --source {source}; leave one of them out")
        if self.config.prepare.min_rating is not None:
            raise ConfigError(
                f"prepare.min_rating {self.config.prepare.min_rating} leaves all events of pipeline.store out, which "
                "have no rating; leave one of the two out"
            )
        found = self._exported(store, items, interactions)
        added = storage.join(self.out, STORE, found["tables"])
        more_items, more_events = (storage.join(added, f"{name}.parquet") for name in ("items", "events"))
        return (
            [*items, more_items] if found["items"] else items,
            [*interactions, more_events] if found["events"] else interactions,
        )

    def _exported(self, store: str, items: list[str], interactions: list[str]) -> dict[str, Any]:
        """How many `events` and `items` of this period there are, and which folder of STORE holds the `tables`: the one
        of an earlier period where nothing is new, so that nothing is made again."""
        room, period = storage.join(self.out, STORE), round(3_600_000 * self.config.pipeline.store_every_hours)
        until = int(1000 * time.time()) // period * period
        receipt = storage.join(room, f"{until}.json")
        self.steps["export"] = "found" if storage.exists(receipt) else "made"
        if not storage.exists(receipt):
            with verbs.timed(self.console, "export"), storage.scratch_folder(storage.join(room, "new")) as new:
                kinds = EVENT in storage.read_schema(storage.table_files(interactions[0])[0]).names
                events = export_events(store, storage.join(new, "events.parquet"), until=until, kinds=kinds)
                files = [file for uri in items for file in storage.table_files(uri)]
                more = export_items(store, storage.join(new, "items.parquet"), files) if items else Exported(0, 0)
                name = hashlib.blake2b(repr([events, more, kinds]).encode(), digest_size=8).hexdigest()
                for file in storage.list_files(new):
                    target = storage.join(room, name, storage.name(file))
                    if not storage.exists(target):
                        storage.copy_file(file, target)
                storage.write_json(receipt, {"tables": name, "events": events.rows, "items": more.rows})
        found = storage.read_json(receipt, ("tables", "events", "items"))
        self.console.say(f"of the store: {found['events']} events, {found['items']} items that the tables lack")
        return found

    def prepare(
        self, item_tables: list[str], event_tables: list[str], source: Literal["tables", "amazon2023"]
    ) -> PreparedData:
        from pixrec.cluster.prepare import input_key

        items, interactions = verbs.places(item_tables) if item_tables else None, verbs.places(event_tables)
        config = self.config
        if config.prepare.fetch_cache == "auto":  # one for all data sets of this place
            config = change_config(config, {"prepare.fetch_cache": storage.join(self.out, "pictures")})
        key = input_key({"source": source, "items": items, "interactions": interactions}, config.prepare)
        where = storage.join(self.out, "data", key)

        def make() -> PreparedData:
            return verbs.prepare(items, interactions, where, source=source, config=config, progress=self.console)

        return self._once("prepare", lambda: PreparedData.load(where), make)

    def train(self, data: PreparedData) -> TrainedModel:
        from pixrec.training.stages import has_begun, training_key

        config, why = verbs.training_settings(data, self._given, self._overrides)
        # what training neither reads nor keeps must not make another model of it
        config = Config(model=config.model, train=config.train, serve=ServeConfig(blend=config.serve.blend))
        if start := self._start(data, config):
            config = change_config(config, {"train.start": start, "train.stages": []})
        where = storage.join(self.out, "models", training_key(load_dataset(data.uri), config))
        config = self._one_store(config, "train")

        def make() -> TrainedModel:
            if why:
                self.console.say(why)
            return verbs.train(data, where, config=config, resume=has_begun(where), progress=self.console)

        return self._once("train", lambda: TrainedModel.load(where), make)

    def _one_store(self, config: Config, section: str) -> Config:
        """With one store of what frozen encoders make, for all data sets of this place: they see each picture once, and
        not every night. Stages have one for each of theirs."""
        if self.config.train.stages or getattr(config, section).picture_tokens != "auto":
            return config
        return change_config(config, {f"{section}.picture_tokens": storage.join(self.out, "tokens")})

    def _start(self, data: PreparedData, config: Config) -> str | None:
        """The model in use, to be trained on; where it has learned from this very data, that which it began with, so
        that nothing is learned twice. None: fresh weights."""
        served = self.served() if self.config.pipeline.start == "served" else None
        if served is None:
            return None
        model = TrainedModel.load(storage.absolute(self._model_of(served)))
        if model.info.get("data_fingerprint") == data.fingerprint:
            return model.info.get("start", {}).get("uri")
        from pixrec.training.stages import check_start

        try:
            check_start(change_config(config, {"train.start": model.uri}))
        except (ArtifactError, ConfigError) as error:
            self.console.warn(f"training begins with fresh weights: {error}")
            return None
        return model.uri

    def embed(self, name: str, model: Place, data: PreparedData) -> PublishedIndex:
        """A version of the index with the vectors of `data` by `model`, in use or not."""
        index = storage.join(self.out, "index")
        wanted = {
            "model_fingerprint": TrainedModel.load(model).fingerprint,
            "data_fingerprint": data.fingerprint,
            "dtype": self.config.embed.dtype,
        }

        def find() -> PublishedIndex:
            for manifest in reversed(list_versions(index)):
                if wanted.items() <= manifest.items():
                    return PublishedIndex.of(index, manifest)
            raise ArtifactError(f"{index} has no such version")

        def make() -> PublishedIndex:
            config = self._one_store(self.config, "embed")
            return verbs.embed(model, data, index, current=False, config=config, progress=self.console)

        return self._once(name, find, make)

    def served(self) -> PublishedIndex | None:
        """The version in use."""
        with contextlib.suppress(ArtifactError):
            return PublishedIndex.load(storage.join(self.out, "index"))
        return None

    def report(self, version: PublishedIndex) -> Report | None:
        """The evaluation of a version by the present settings, where there is one."""
        with contextlib.suppress(ArtifactError):
            report = Report.load(storage.join(self.out, "reports", version.version))
            measured = report.info["settings"]["evaluate"]
            # a model may bring a scorer of its own
            asked = to_dict(self.config.evaluate)
            named = {*asked.pop("scorers")} <= {*measured["scorers"]}
            if named and asked.items() <= measured.items():
                return report
        return None

    def compare(
        self, model: TrainedModel, data: PreparedData, version: PublishedIndex, served: PublishedIndex | None
    ) -> tuple[Report, PublishedIndex | None, str]:
        """The evaluation of `version`, the version to publish, and why it is that one."""
        settings, rival = self.config.pipeline, None
        if served and settings.publish == "if_not_worse" and served.info["model_fingerprint"] != model.fingerprint:
            rival = self.embed("embed served", self._model_of(served), data)

        def find() -> Report:
            report = self.report(version)
            if report is None or report.info["provenance"].get("served_version") != (rival and rival.version):
                raise ArtifactError("not evaluated so")
            return report

        def make() -> Report:
            where = storage.join(self.out, "reports", version.version)
            options: dict[str, Any] = {"config": self.config, "progress": self.console}
            return verbs.evaluate(model, data, where, index=version, served=rival, **options)

        report = self._once("evaluate", find, make)
        if settings.publish == "never":
            return report, None, "pipeline.publish is never"
        if rival is None:
            why = "no other model is in use" if settings.publish == "if_not_worse" else "pipeline.publish is always"
            return report, version, why
        better, why = decide(report.info, settings)
        return report, version if better else rival, why

    def _model_of(self, version: PublishedIndex) -> str:
        return storage.join(self.out, "models", storage.name(version.info["model"]))

    def clear(self, *kept: Handle) -> list[str]:
        """Delete all but the newest versions, and what neither those that stay, nor their models, nor this run name."""
        keep = self.config.pipeline.keep_versions
        if keep is None:
            return []
        index = storage.join(self.out, "index")
        deleted = PublishedIndex.load(index).keep_newest(keep)
        named = {storage.name(handle.uri) for handle in kept}
        for manifest in list_versions(index):
            named |= {
                manifest["version"],
                *(storage.name(manifest[part]) for part in ("model", "data") if part in manifest),
            }
        for name in named & {*storage.list_folders(storage.join(self.out, "models"))}:
            with contextlib.suppress(ArtifactError):  # what a model began with: other settings may want it again
                start = TrainedModel.load(storage.join(self.out, "models", name)).info.get("start", {})
                named.add(storage.name(start.get("uri", name)))
        *old, now = [None, *storage.list_files(storage.join(self.out, STORE), ".json")]
        if now is not None:
            named.add(storage.read_json(now, ("tables",))["tables"])
        for receipt in old[1:]:
            storage.remove(str(receipt))
        for room in ("data", "models", "reports", STORE):
            for folder in storage.list_folders(storage.join(self.out, room)):
                if folder.lstrip(".").partition(".")[0] not in named:  # also what belongs to one: .KEY.training
                    storage.remove(storage.join(self.out, room, folder))
                    deleted.append(f"{room}/{folder}")
        return deleted

    def _once(self, step: str, find: Callable[[], _H], make: Callable[[], _H]) -> _H:
        try:
            found = find()
        except ArtifactError:
            if not self._connected:
                from pixrec.cluster.session import connect

                self._stack.enter_context(connect())
                self._connected = True
            with verbs.timed(self.console, step):
                made = make()
            self.steps[step] = "made"
            return made
        self.console.say(f"== {step}: found {found.uri}")
        self.steps[step] = "found"
        return found
