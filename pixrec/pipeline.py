"""prepare, train, embed, evaluate and publish as one run that can be killed anywhere and goes on.

Everything lies below one place:

    data/<key>/  models/<key>/  reports/<version>/     a key is a hash of all that makes what lies there
    index/                                             its current version names the model and the data behind it

So a run finds what an earlier one of the same inputs and settings has finished, and publishing is a single write: the
name of a version into `index/CURRENT`, which servers follow. The model in use is compared with the new one on the new
data's test users. Where the new one may be worse, the old one stays in use, with vectors of the new catalog.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pixrec import storage, verbs
from pixrec.artifact import list_versions, rollback
from pixrec.config import Config, PipelineConfig, ServeConfig, change_config, load_config, to_dict
from pixrec.console import Console
from pixrec.data.sequences import load_dataset
from pixrec.errors import ArtifactError, surfaced
from pixrec.handles import Handle, Place, PreparedData, PublishedIndex, Report, TrainedModel, place
from pixrec.verbs import SERVED, Progress, Settings

_H = TypeVar("_H", bound=Handle)


@surfaced()
def pipeline(
    items: Place | None,
    interactions: Place,
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
        data = run.prepare(None if items is None else place(items), place(interactions), source)
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

    def prepare(self, items: str | None, interactions: str, source: Literal["tables", "amazon2023"]) -> PreparedData:
        from pixrec.cluster.prepare import input_key

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
        where = storage.join(self.out, "models", training_key(load_dataset(data.uri), config))

        def make() -> TrainedModel:
            if why:
                self.console.say(why)
            return verbs.train(data, where, config=config, resume=has_begun(where), progress=self.console)

        return self._once("train", lambda: TrainedModel.load(where), make)

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
            return verbs.embed(model, data, index, current=False, config=self.config, progress=self.console)

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
        """Delete all but the newest versions, and what none of those that stay, nor this run, names."""
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
        for room in ("data", "models", "reports"):
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
