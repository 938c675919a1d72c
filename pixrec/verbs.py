"""What each verb of the command does, as a function: URIs and a config in, a summary out (the last line of stdout)."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pixrec
from pixrec import storage
from pixrec.artifact import (
    MODEL_MARKER,
    Model,
    check_index_writable,
    keep_newest,
    list_versions,
    load_index,
    load_model,
    rollback,
)
from pixrec.artifact.sources import RECALL
from pixrec.config import Config, to_dict
from pixrec.console import Console
from pixrec.data.sequences import DATASET_MARKER, Dataset, HeldOut, load_dataset, sample_users
from pixrec.errors import InputError
from pixrec.evaluation import (
    Evaluation,
    Ranker,
    aggregate,
    audit_dataset,
    audit_elsewhere,
    bootstrap_ci,
    dataset_guards,
    evaluate_scorers,
    provenance,
    rank_here,
)
from pixrec.metrics import count_ties, target_ranks, user_random_tie_metrics
from pixrec.report import choose_examples, choose_grids, format_table, notes, write_report
from pixrec.scorers import KNOCKOUTS, Inputs, Scorer, build_scorers, load_predictions
from pixrec.training.tracking import read_log

METRICS = "metrics.json"
HEADLINE_SCORERS = ("pixrec", "pixrec_text_only", "popularity")
Summary = dict[str, Any]


def prepare(
    items: str | None,
    interactions: str,
    out: str,
    source: Literal["tables", "amazon2023"],
    config: Config,
    console: Console,
) -> Summary:
    from pixrec.cluster.prepare import prepare as run

    info = run(items, interactions, out, config.prepare, console.progress, source)
    return {"out": out, **{key: info[key] for key in ("items", "images", "interactions", "cold", "users", "split")}}


def train(data: str, out: str, config: Config, resume: bool, console: Console) -> Summary:
    from pixrec.cluster.session import connect
    from pixrec.cluster.train import check_ready
    from pixrec.cluster.train import train as run

    check_ready(data, out, config, resume)
    with connect():
        info = run(data, out, config, resume=resume, on_row=console.training)
    return {"out": out, **info}


def embed(
    model: str | None,
    data: str | None,
    out: str,
    config: Config,
    console: Console,
    *,
    list_only: bool = False,
    rollback_to: str | None = None,
    keep: int | None = None,
) -> Summary:
    """Publish a version of the index `out`; or list its versions, or go back to one. `keep` deletes old ones then."""
    if keep is not None and keep < 1:
        raise InputError(f"--keep {keep}: at least 1 version must stay")
    if list_only or rollback_to is not None:
        if model is not None or data is not None or (list_only and keep is not None):
            raise InputError("--list goes with --out alone, --rollback with --out and --keep")
    elif (model is None) != (data is None) or (model is None and keep is None):
        raise InputError("embed needs --model and --data; without both: --list, --rollback VERSION or --keep N")
    if list_only:
        versions = list_versions(out)
        current = next((found["version"] for found in versions if found["current"]), None)
        return {"out": out, "current": current, "versions": versions}
    summary: Summary = {"out": out}
    if rollback_to is not None:
        summary |= {"before": rollback(out, rollback_to), "current": rollback_to}
    elif model is not None and data is not None:
        summary |= _embed(model, data, out, config, console)
    return summary if keep is None else {**summary, "deleted": keep_newest(out, keep)}


def _embed(model: str, data: str, out: str, config: Config, console: Console) -> Summary:
    from pixrec.cluster.embed import check_ready
    from pixrec.cluster.embed import embed as run
    from pixrec.cluster.session import connect

    check_ready(model, data, out)
    with connect():
        manifest = run(model, data, out, config, progress=console.progress)
    counts = ("reused", "computed", "resumed", "redone", "text_alone", "pictures_rejected")
    console.say(f"{manifest['rows']} items: " + ", ".join(f"{manifest[name]} {name}" for name in counts))
    recall = manifest.get(RECALL, {})
    if figures := ", ".join(f"{name} {recall[name]:.4f}" for name in recall if name.startswith("recall")):
        console.say(f"{manifest['dtype']} finds of the exact neighbours by float32: {figures}")
    return manifest


def evaluate(
    model: str | None,
    data: str,
    index: str | None,
    out: str,
    config: Config,
    console: Console,
    ceiling: Mapping[str, Any] | None = None,
    predictions: str | None = None,
    also: Sequence[str] = (),
) -> Summary:
    """Score the held-out events and write metrics.json and the report.

    `predictions`: somebody else's rankings, with or without a `model` beside them. `also`: the metrics.json of further
    seeds, summed up with this run. `ceiling` is drawn beside the figures.
    """
    if index and not model:
        raise InputError("--index holds the vectors of a model's items; name the model with --model")
    seeds = {place: storage.read_json(place, ("results", "protocol")) for place in also}
    with storage.staged_folder(out, METRICS, "evaluation") as staging, contextlib.ExitStack() as stack:
        loaded = load_model(model, _device(config.evaluate.device)) if model else None
        dataset = load_dataset(data)
        held_out = dataset.held_out("test")
        if not len(held_out.targets):
            raise InputError(f"{data}: no user has a test event with a history before it; choose another prepare.split")
        settings = loaded.config if loaded else config
        audited = audit_dataset(dataset, settings, config) | {
            "elsewhere": audit_elsewhere(dataset, loaded) if loaded else []
        }
        inputs = _inputs(model, loaded, index, predictions, held_out, dataset, config)
        scorers, knockouts = build_scorers(dataset, config, inputs, console.progress)
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
            progress=lambda name, done, total: console.progress(f"rank {name}", done, total),
        )
        metrics = evaluation.metrics_json(dataset.info["split"]["kind"], knockouts)
        metrics["guards"] |= {"audit": audited, **dataset_guards(dataset)}
        if inputs.predictions:
            metrics["predictions"] = {"scorer": inputs.predictions.name, **inputs.predictions.counts}
        metrics["provenance"] = provenance(dataset, loaded, inputs.index)
        metrics["settings"] = {"evaluate": to_dict(config.evaluate), "sasrec": to_dict(config.sasrec)}
        if ceiling:
            metrics["ceiling"] = dict(ceiling)
        if seeds:
            metrics["seeds"] = aggregate({"this run": metrics, **seeds})
        storage.write_json(storage.join(staging, METRICS), metrics)
        log = read_log(model) if model else []
        _write_page(staging, metrics, dataset, scorers[0], evaluation, log)
    console.say(format_table(metrics))
    return {"out": out, **{key: metrics[key] for key in ("users", "results", "guards")}}


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
) -> Inputs:
    published = load_index(index, loaded.fingerprint) if index and loaded else None
    if predictions is None:
        return Inputs(model, loaded, published)
    users = sample_users(held_out, config.evaluate.max_users, config.evaluate.seed)
    stem = storage.name(predictions).removesuffix(".parquet")
    taken = {"pixrec", *config.evaluate.scorers} | set(KNOCKOUTS)
    name = "predictions" if stem in taken else stem
    return Inputs(model, loaded, published, load_predictions(predictions, name, users.user_ids, dataset.items.item_ids))


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


def recommend(
    model: str,
    index: str,
    data: str | None,
    history: list[str],
    k: int,
    include_history: bool,
    timestamps: list[int] | None,
    console: Console,
) -> Summary:
    recommender = pixrec.load_recommender(model, index, data)
    from pixrec.recommender import Query

    query = Query(history, k, exclude_history=not include_history, timestamps=timestamps)
    answer = recommender.answer([query])[0]
    return {
        "items": [{"item_id": item_id, "score": score} for item_id, score in answer.items],
        "model_version": recommender.model_version,
        "index_version": recommender.index_version,
        "unknown_items": answer.unknown_items,
        "fallback": answer.fallback,
    }


def serve(model: str, index: str, data: str, config: Config, host: str, port: int, console: Console) -> Summary:
    from pixrec.serving.app import run

    run(model, index, data, config, host, port)
    return {"served": f"http://{host}:{port}"}


def demo(out: str, config: Config, console: Console) -> Summary:
    """The whole pipeline on the synthetic catalog: catalog, data, model and knockout, index, report."""
    places = {name: storage.join(out, name) for name in ("catalog", "data", "model", "index", "report")}
    storage.check_writable(places["data"], DATASET_MARKER, "data set")
    storage.check_writable(places["model"], MODEL_MARKER, "model")
    storage.check_writable(places["report"], METRICS, "evaluation")
    check_index_writable(places["index"])

    from pixrec.cluster.session import connect
    from pixrec.data.synthetic import build_world, write_catalog
    from pixrec.scorers.oracle import Oracle

    started = time.monotonic()
    world = build_world(config.demo)
    write_catalog(world, places["catalog"], lambda done, total: console.progress("draw the catalog", done, total))
    with connect():
        tables = [storage.join(places["catalog"], f"{name}.parquet") for name in ("items", "interactions")]
        _timed(console, "prepare", lambda: prepare(tables[0], tables[1], places["data"], "tables", config, console))
        _timed(console, "train", lambda: train(places["data"], places["model"], config, False, console))
        _timed(console, "embed", lambda: embed(places["model"], places["data"], places["index"], config, console))
    dataset = load_dataset(places["data"])
    held_out = sample_users(dataset.held_out("test"), config.evaluate.max_users, config.evaluate.seed)
    best: dict[str, Summary] = {}
    for name, text_only in (("both", False), ("text_only", True)):
        scores = Oracle(world, dataset.items.item_ids, text_only).scores(held_out.users)
        ranks, ties = target_ranks(scores, held_out.targets), count_ties(scores, held_out.targets)
        recalls = {m: v for m, v in user_random_tie_metrics(ranks, ties, (1, 10)).items() if m.startswith("recall")}
        intervals = {m: list(bootstrap_ci(v, config.evaluate.bootstrap_samples)) for m, v in recalls.items()}
        best[name] = {**{m: float(v.mean()) for m, v in recalls.items()}, "ci95": intervals}
    summary = _timed(
        console,
        "evaluate",
        lambda: evaluate(
            places["model"], places["data"], places["index"], places["report"], config, console,
            {"name": "best possible scorer", **best["both"], "text_only": best["text_only"]},
        ),
    )  # fmt: skip
    results = summary["results"]
    console.say(_demo_verdict(results, summary["guards"], best))
    console.say(f"report: {places['report']}/index.html")
    console.say(
        f"serve it: .venv/bin/pixrec serve --model {places['model']} --index {places['index']} --data {places['data']}"
    )
    return {
        "out": out,
        "seconds": round(time.monotonic() - started, 1),
        "metrics": {name: results[name] for name in HEADLINE_SCORERS if name in results},
        "text_only_random_ties": summary["guards"]["random_ties"].get("pixrec_text_only"),
        "ceiling": best,
        **{name: places[name] for name in ("data", "model", "index", "report")},
    }


def demo_config(config: Config) -> Config:
    """The demo's own defaults on top of the general ones; what the user sets comes after."""
    return dataclasses.replace(
        config,
        prepare=dataclasses.replace(config.prepare, name="the synthetic shop"),
        train=dataclasses.replace(config.train, knockouts=("text",)),
    )


def _demo_verdict(results: Mapping[str, Any], guards: Mapping[str, Any], best: Mapping[str, Summary]) -> str:
    lines = []
    for metric in ("recall@1", "recall@10"):
        both = results["pixrec"][metric]
        line = (
            f"{metric}: {both:.3f}, best possible {best['both'][metric]:.3f} ({both / best['both'][metric]:.0%} of it)"
        )
        if "pixrec_text_only" in results:
            text = guards["random_ties"]["pixrec_text_only"][metric]
            ratio = f"{both / text:.1f}x" if text else "far above"
            line += f"; text alone {text:.3f} (ties broken at random), "
            line += f"best possible {best['text_only'][metric]:.3f}; pictures: {ratio}"
        lines.append(line)
    return "\n".join(lines)


def _timed(console: Console, stage: str, work: Callable[[], Summary]) -> Summary:
    started = time.monotonic()
    console.say(f"== {stage}")
    summary = work()
    console.say(f"== {stage}: {time.monotonic() - started:.0f} s")
    return summary
