"""What each verb does, as a function: the library and the command are both thin skins on these.

`prepare`, `train`, `embed` and `evaluate` take places or handles and return a handle; `config` is a Config, a mapping
of settings or the place of a YAML file. They raise PixRecError where the cure lies with the caller, also for what
happened on a worker. `progress` True writes to stderr what the command writes there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, Model, check_index_writable, load_index, load_model
from pixrec.artifact.index import APPROXIMATE
from pixrec.artifact.sources import RECALL
from pixrec.config import Config, ModelConfig, change_config, load_config, to_dict
from pixrec.console import Console
from pixrec.data.images import PictureSize
from pixrec.data.memory import IN_MEMORY, ArrowStream, in_memory, on_storage
from pixrec.data.resolution import resolution
from pixrec.data.sequences import DATASET_MARKER, Dataset, HeldOut, load_dataset, sample_users
from pixrec.errors import ConfigError, InputError, surfaced
from pixrec.evaluation import (
    Evaluation,
    Ranker,
    aggregate,
    audit_dataset,
    audit_elsewhere,
    dataset_guards,
    evaluate_scorers,
    provenance,
    rank_here,
)
from pixrec.evaluation.ceiling import ceilings, verdict
from pixrec.handles import METRICS, Place, PreparedData, PublishedIndex, Report, TrainedModel, place
from pixrec.report import choose_examples, choose_grids, format_table, notes, write_report
from pixrec.scorers import (
    KNOCKOUTS,
    Inputs,
    Recipe,
    Scorer,
    TowerScorer,
    aligned,
    build_scorers,
    load_predictions,
)
from pixrec.training.choice import choose
from pixrec.training.tracking import read_log

if TYPE_CHECKING:
    from pixrec.recommender import Recommender

HEADLINE_SCORERS = ("pixrec", "pixrec_text_only", "popularity")
SERVED = "served"
"""What an evaluation calls the model in use, where it is ranked beside a new one."""

Table: TypeAlias = Place | ArrowStream
"""A Parquet file, a folder or s3:// prefix of them, or a table in memory: pyarrow, pandas, Polars."""
Settings: TypeAlias = Config | Mapping[str, Any] | Place | None
"""A Config, a mapping (`{"train.epochs": 3}` or `{"train": {"epochs": 3}}`), the place of a YAML file, or nothing."""
Progress: TypeAlias = bool | Console
Summary = dict[str, Any]


@surfaced()
def prepare(
    items: Table | Sequence[Place] | None,
    interactions: Table | Sequence[Place],
    out: Place,
    *,
    source: Literal["tables", "amazon2023"] = "tables",
    config: Settings = None,
    progress: Progress = False,
) -> PreparedData:
    """Turn an items and an interactions table into the prepared data set `out`.

    Either may be the places of several tables, whose rows follow each other; an event that several interactions tables
    hold counts once. Without `items` the catalog is the set of ids seen. Tables in memory are written beside `out` for
    as long as it takes; a relative `image_uri` in one is relative to the working directory. Raises InputError,
    OutputError, ConfigError.
    """
    from pixrec.cluster.prepare import prepare as run

    settings, out = read_settings(config), place(out)
    given = {"items": items, "interactions": interactions}
    tables = {name: table if table is None or in_memory(table) else places(table) for name, table in given.items()}
    if source != "tables" and any(map(in_memory, tables.values())):
        raise InputError(f"source {source} names raw files; a table in memory is read as it is: leave source out")
    with open_console(progress) as console, on_storage(tables, out) as at:
        info = run(at["items"], at["interactions"], out, settings.prepare, console.progress, source)
        if written := [name for name, table in tables.items() if in_memory(table)]:
            info = {**info, "inputs": {**info["inputs"], **dict.fromkeys(written, IN_MEMORY)}}
            storage.write_json(storage.join(out, DATASET_MARKER), info)
    return PreparedData.of(out, info)


@surfaced()
def train(
    data: Place,
    out: Place,
    *,
    config: Settings = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress = False,
) -> TrainedModel:
    """Fine-tune the towers, and the knockouts of `train.knockouts`, on a prepared data set.

    Without a `config`, or with a mapping that says nothing of the model, what is trained is chosen by what the data set
    is (`training.choice`) and told in a line. `overrides`, each `section.key=value`, come on top.
    `resume` continues the unfinished run for the same `out`, with the same `config`. Raises ArtifactError, InputError
    (also where training diverges), OutputError, ConfigError.
    """
    data, out = place(data), place(out)
    settings, why = training_settings(data, config, overrides)
    from pixrec.cluster.session import connect
    from pixrec.cluster.train import train as run
    from pixrec.model.backbone import picture_size_of
    from pixrec.training.stages import check_ready, plan

    check_ready(data, out, settings, resume)
    with open_console(progress) as console:
        if why:
            console.say(why)
        _look_at_connector(settings.model, console)
        size = picture_size_of(settings.model)
        for uri in dict.fromkeys(uri for stage in plan(data, settings) for uri in stage.data):
            _look_at_pictures(uri, settings.model, size, settings.model.small_pictures, console)
        with connect():
            info = run(data, out, settings, resume=resume, on_row=console.training)
    return TrainedModel.of(out, info)


def training_settings(data: Place, config: Settings, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """What `train` goes by, and why where it is chosen by what the data set is (else an empty string)."""
    settings = load_config(overrides=overrides, base=read_settings(config))
    if _says_model(config, overrides):
        return settings, ""
    choice = choose(load_dataset(place(data)))
    base = change_config(Config(), choice.settings)
    return load_config(overrides=overrides, base=read_settings(config, base)), choice.why


@surfaced()
def plan_training(
    data: Place, *, config: Settings = None, tokens_per_second: float | None = None, progress: Progress = False
) -> Summary:
    """What `train` with these settings would need, without training: parameters, tokens a step, memory a GPU, steps
    and, by the rate of one worker in tokens a second, seconds. Of several stages that on `data`. Raises as `train`."""
    settings, data = read_settings(config), place(data)
    from pixrec.model.backbone import picture_size_of
    from pixrec.training.dry_run import dry_run, table

    if tokens_per_second is not None and tokens_per_second <= 0:
        raise InputError(f"--tokens-per-second {tokens_per_second}: must be above 0")
    with open_console(progress) as console:
        _look_at_connector(settings.model, console)
        size = picture_size_of(settings.model)
        _look_at_pictures(data, settings.model, size, settings.model.small_pictures, console)
        found = dry_run([data], settings, tokens_per_second)
        for line in table(found):
            console.say(line)
    return found


def _look_at_connector(model: ModelConfig, console: Console) -> None:
    """Say where a connector that was drawn at random is left as it is."""
    from pixrec.model.packages import begins_untrained

    left = model.freeze_vision or (model.lora.enabled and not model.lora.connector)
    if left and model.modalities != "text" and begins_untrained(model.backbone):
        console.warn(
            f"the connector of model.backbone {model.backbone} has not been trained, and these settings leave it so; "
            "set model.freeze_vision to false and, beside adapters, model.lora.connector to true"
        )


def _look_at_pictures(data: str, model: ModelConfig, size: PictureSize, small: str, console: Console) -> None:
    """Say, or raise InputError, where stored pictures are enlarged for the backbone."""
    if model.modalities == "text" or small == "allow":
        return
    found = resolution(data, model.backbone, size)
    if found.small and small == "error":
        raise InputError(str(found))
    if found.small:
        console.warn(str(found))


@surfaced()
def embed(
    model: Place,
    data: Place,
    out: Place,
    *,
    current: bool = True,
    config: Settings = None,
    progress: Progress = False,
) -> PublishedIndex:
    """Publish the vectors of all items of a prepared data set as a version of the index `out`, the one in use from then
    on unless `current` is False.

    What the current version or an interrupted run holds already is not computed again. Raises ArtifactError,
    OutputError, ConfigError.
    """
    settings, model, data, out = read_settings(config), place(model), place(data), place(out)
    from pixrec.cluster.embed import check_ready, model_facts
    from pixrec.cluster.embed import embed as run
    from pixrec.cluster.session import connect

    check_ready(model, data, out)
    with open_console(progress) as console:
        made_for = model_facts(model)
        _look_at_pictures(data, made_for.config, made_for.picture_size, settings.model.small_pictures, console)
        with connect():
            manifest = run(model, data, out, settings, progress=console.progress, current=current)
        counts = ("reused", "computed", "resumed", "redone", "text_alone", "pictures_rejected")
        console.say(f"{manifest['rows']} items: " + ", ".join(f"{manifest[name]} {name}" for name in counts))
        recall = manifest.get(RECALL, {})
        if figures := ", ".join(f"{name} {recall[name]:.4f}" for name in recall if name.startswith("recall")):
            console.say(f"{manifest['dtype']} finds of the exact neighbours by float32: {figures}")
        if left_out := manifest.get(APPROXIMATE, {}).get("left_out"):
            console.warn(f"searches of this index are exact: {left_out}")
    return PublishedIndex.of(out, manifest)


@surfaced()
def evaluate(
    model: Place | None,
    data: Place,
    out: Place,
    *,
    index: Place | None = None,
    predictions: Place | None = None,
    also: Sequence[Place] = (),
    served: PublishedIndex | None = None,
    ceiling: Mapping[str, Any] | None = None,
    config: Settings = None,
    progress: Progress = False,
) -> Report:
    """Score the held-out events and write metrics.json and the report to `out`.

    `model` None: the predictions or the baselines alone. `index`: its item vectors in place of computing them; a handle
    stands for its own version. `served`: a version whose model is ranked beside, as the scorer `served`.
    `predictions`: somebody else's rankings (Parquet of `user_id` and ranked `item_ids`). `also`: the metrics.json of
    further seeds, summed up with this run. `ceiling`: the best possible value by metric, and its `name`, drawn beside
    the figures. Raises ArtifactError, InputError, OutputError, ConfigError.
    """
    settings, data, out = read_settings(config), place(data), place(out)
    version = index.version if isinstance(index, PublishedIndex) else None
    model, index, predictions = _place(model), _place(index), _place(predictions)
    if index and not model:
        raise InputError("--index holds the vectors of a model's items; name the model with --model")
    seeds = {file: storage.read_json(file, ("results", "protocol")) for file in map(place, also)}
    with open_console(progress) as console:
        metrics = _evaluate(
            model, data, index, out, settings, console, ceiling, predictions, seeds, version=version, served=served
        )
        console.say(format_table(metrics))
    return Report.of(out, metrics)


def _evaluate(
    model: str | None,
    data: str,
    index: str | None,
    out: str,
    config: Config,
    console: Console,
    ceiling: Mapping[str, Any] | None,
    predictions: str | None,
    seeds: Mapping[str, Any],
    *,
    version: str | None,
    served: PublishedIndex | None,
) -> dict[str, Any]:
    """Write the evaluation; returns the content of metrics.json."""
    with storage.staged_folder(out, METRICS, "evaluation") as staging, contextlib.ExitStack() as stack:
        loaded = load_model(model, _device(config.evaluate.device)) if model else None
        dataset = load_dataset(data)
        held_out = dataset.held_out("test")
        if not len(held_out.targets):
            raise InputError(f"{data}: no user has a test event with a history before it; choose another prepare.split")
        settings = loaded.config if loaded else config
        if loaded and loaded.config.serve.blend and "blend" not in config.evaluate.scorers:
            config = change_config(config, {"evaluate.scorers": [*config.evaluate.scorers, "blend"]})
        audited = audit_dataset(dataset, settings, config) | {
            "elsewhere": audit_elsewhere(dataset, loaded) if loaded else []
        }
        inputs = _inputs(model, loaded, index, predictions, held_out, dataset, config, version)
        scorers, knockouts = build_scorers(dataset, config, inputs, console.progress)
        if served:
            scorers.append(_served(served, dataset, _device(config.evaluate.device)))
        if not scorers:
            raise InputError("nothing to evaluate: give --model or --predictions, or name some in evaluate.scorers")
        evaluation = evaluate_scorers(
            scorers,
            held_out,
            config.evaluate,
            training_counts=dataset.training_counts(),
            with_image=dataset.items.with_image,
            item_ids=dataset.items.item_ids,
            rank=_ranker(data, config, stack),
            progress=lambda name, *rest: console.progress(f"rank {name}", *rest),
        )
        metrics = evaluation.metrics_json(dataset.info["split"]["kind"], knockouts)
        metrics["guards"] |= {"audit": audited, **dataset_guards(dataset)}
        if inputs.predictions:
            metrics["predictions"] = {"scorer": inputs.predictions.name, **inputs.predictions.counts}
        metrics["provenance"] = provenance(dataset, loaded, inputs.index)
        if served:
            metrics["provenance"]["served_version"] = served.version
        metrics["settings"] = {"evaluate": to_dict(config.evaluate), "sasrec": to_dict(config.sasrec)}
        if ceiling:
            metrics["ceiling"] = dict(ceiling)
        if seeds:
            metrics["seeds"] = aggregate({"this run": metrics, **seeds})
        storage.write_json(storage.join(staging, METRICS), metrics)
        log = read_log(model) if model else []
        _write_page(staging, metrics, dataset, scorers[0], evaluation, log)
    return metrics


def _write_page(
    folder: str,
    metrics: Mapping[str, Any],
    dataset: Dataset,
    scorer: Scorer,
    evaluation: Evaluation,
    log: Sequence[Mapping[str, Any]],
) -> None:
    """The report, with the users and the cases of `scorer`."""
    write_report(
        folder,
        metrics,
        data_name=dataset.name,
        items=dataset.items,
        examples=choose_examples(scorer, evaluation.held_out, evaluation.config),
        grids=choose_grids(scorer, evaluation),
        training_log=log,
        notes=notes(metrics),
        ceiling=metrics.get("ceiling"),
    )


def _inputs(
    model: str | None,
    loaded: Model | None,
    index: str | None,
    predictions: str | None,
    held_out: HeldOut,
    dataset: Dataset,
    config: Config,
    version: str | None,
) -> Inputs:
    published = load_index(index, loaded.fingerprint, dataset.items, version) if index and loaded else None
    if predictions is None:
        return Inputs(model, loaded, published, index_uri=index)
    users = sample_users(held_out, config.evaluate.max_users, config.evaluate.seed)
    stem = storage.name(predictions).removesuffix(".parquet")
    taken = {"pixrec", *config.evaluate.scorers} | set(KNOCKOUTS)
    name = "predictions" if stem in taken else stem
    given = load_predictions(predictions, name, users.user_ids, dataset.items.item_ids)
    return Inputs(model, loaded, published, given, index)


def _served(version: PublishedIndex, dataset: Dataset, device: str) -> TowerScorer:
    """The model behind a version of an index, and the vectors of that version."""
    recipe = Recipe(SERVED, version.info["model"])
    model = load_model(recipe.model_uri, device)
    found = load_index(version.uri, model.fingerprint, dataset.items, version.version)
    embedder, catalog = recipe.towers(dataset.items, model, dataset.uri)
    return TowerScorer(recipe.name, embedder, catalog, aligned(found, dataset.items), recipe)


def _ranker(data: str, config: Config, stack: contextlib.ExitStack) -> Ranker:
    """Ranks in this process, or over Ray where `evaluate.num_actors` says so; `stack` ends what Ray began."""
    if not config.evaluate.num_actors:
        return rank_here
    from pixrec.cluster.evaluate import ranker
    from pixrec.cluster.session import connect

    stack.enter_context(connect())
    return ranker(data)


def _device(wanted: str) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("evaluate.device is cuda, but torch sees no GPU; set it to auto or cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


@surfaced()
def load_recommender(model: Place, index: Place, data: Place | None = None, blend: bool | None = None) -> Recommender:
    """Load a model and an index for ranking; `blend` as `serve.blend`.

    `data` is the prepared data set behind the index; by default the place the index remembers.
    Raises ArtifactError when a part is absent, incomplete, or the index was made by another model.
    """
    from pixrec.recommender import load_recommender as load

    return load(place(model), place(index), _place(data), blend)


@surfaced()
def recommend(
    model: Place,
    index: Place,
    data: Place | None,
    history: list[str],
    k: int,
    include_history: bool,
    timestamps: list[int] | None,
) -> Summary:
    recommender = load_recommender(model, index, data)
    from pixrec.query import Query

    query = Query(history, k, exclude_history=not include_history, timestamps=timestamps)
    return recommender.answer([query])[0].to_dict()


@surfaced()
def serve(model: Place, index: Place, data: Place, config: Config, host: str, port: int) -> Summary:
    from pixrec.serving.app import run

    run(place(model), place(index), place(data), config, host, port)
    return {"served": f"http://{host}:{port}"}


@surfaced()
def demo(out: Place, *, config: Settings = None, progress: Progress = False) -> Summary:
    """The whole pipeline on the synthetic catalog: catalog, data, model and knockout, index, report."""
    settings, out = read_settings(config, demo_config()), place(out)
    places = {name: storage.join(out, name) for name in ("catalog", "data", "model", "index", "report")}
    storage.check_writable(places["data"], DATASET_MARKER, "data set")
    storage.check_writable(places["model"], MODEL_MARKER, "model")
    storage.check_writable(places["report"], METRICS, "evaluation")
    check_index_writable(places["index"])
    started = time.monotonic()
    with open_console(progress) as console:
        report, best = _demo(places, settings, console)
        results, guards = report.info["results"], report.info["guards"]
        console.say(verdict(results, guards, best))
        console.say(f"report: {report.page}")
        served = " ".join(f"--{name} {places[name]}" for name in ("model", "index", "data"))
        console.say(f"serve it: .venv/bin/pixrec serve {served}")
    return {
        "out": out,
        "seconds": round(time.monotonic() - started, 1),
        "metrics": {name: results[name] for name in HEADLINE_SCORERS if name in results},
        "text_only_random_ties": guards["random_ties"].get("pixrec_text_only"),
        "ceiling": best,
        **{name: places[name] for name in ("data", "model", "index", "report")},
    }


def _demo(places: Mapping[str, str], config: Config, console: Console) -> tuple[Report, dict[str, Summary]]:
    """Make everything at `places`; returns the report and the figures of the best possible scorers."""
    from pixrec.cluster.session import connect
    from pixrec.data.synthetic import build_world, write_catalog

    world = build_world(config.demo)
    write_catalog(world, places["catalog"], lambda done, total: console.progress("draw the catalog", done, total))
    with connect():
        items, events = (storage.join(places["catalog"], f"{name}.parquet") for name in ("items", "interactions"))
        with timed(console, "prepare"):
            data = prepare(items, events, places["data"], config=config, progress=console)
        with timed(console, "train"):
            model = train(data, places["model"], config=config, progress=console)
        with timed(console, "embed"):
            index = embed(model, data, places["index"], config=config, progress=console)
    best = ceilings(world, load_dataset(places["data"]), config.evaluate)
    ceiling = {"name": "best possible scorer", **best["both"], "text_only": best["text_only"]}
    with timed(console, "evaluate"):
        report = evaluate(model, data, places["report"], index=index, ceiling=ceiling, config=config, progress=console)
    return report, best


def demo_config() -> Config:
    """The demo's own defaults; what the user sets comes on top."""
    return change_config(Config(), {"prepare.name": "the synthetic shop", "train.knockouts": ["text"]})


@contextlib.contextmanager
def timed(console: Console, stage: str) -> Iterator[None]:
    started = time.monotonic()
    console.say(f"== {stage}")
    yield
    console.say(f"== {stage}: {time.monotonic() - started:.0f} s")


def places(where: object) -> str | list[str]:
    """The place of a table, or those of several; one alone is no list, whichever way it was given."""
    if isinstance(where, (list, tuple)) and where and all(isinstance(one, (str, os.PathLike)) for one in where):
        several = [place(one) for one in where]
        return several[0] if len(several) == 1 else several
    return place(where)


def listed(where: object) -> list[str]:
    """The places of no table, of one or of several."""
    found = [] if where is None else places(where)
    return [found] if isinstance(found, str) else found


def _place(where: Place | None) -> str | None:
    return None if where is None else place(where)


def _says_model(config: Settings, overrides: Sequence[str]) -> bool:
    """Whether the caller decides what model is trained: by a whole configuration, or by a setting of the model."""
    if config is not None and not isinstance(config, Mapping):
        return True
    return any(key.strip().partition(".")[0] == "model" for key in [*(config or ()), *overrides])


def read_settings(config: Settings, base: Config | None = None) -> Config:
    """The whole Config that `config` stands for; `base` supplies what it leaves out. Raises ConfigError, InputError."""
    if isinstance(config, Config):
        return config
    base = base or Config()
    if config is None:
        return base
    if isinstance(config, Mapping):
        return change_config(base, config)
    file = place(config)
    try:
        return load_config(storage.read_text(file), base=base)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


@contextlib.contextmanager
def open_console(progress: Progress) -> Iterator[Console]:
    """A Console of the caller's stays open; one that is made here ends with the block."""
    if isinstance(progress, Console):
        yield progress
    else:
        with Console(quiet=not progress) as console:
            yield console
