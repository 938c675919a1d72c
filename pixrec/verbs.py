"""What each verb of the command does, as a function: URIs and a config in, a summary out (the last line of stdout)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import pixrec
from pixrec import storage
from pixrec.artifact import MODEL_MARKER, check_index_writable, load_index, load_model
from pixrec.baselines import Popularity, RepeatLast
from pixrec.config import Config
from pixrec.console import Console
from pixrec.data.sequences import DATASET_MARKER, load_dataset, sample_users
from pixrec.errors import InputError
from pixrec.evaluation import Scorer, evaluate_scorers
from pixrec.metrics import count_ties, random_tie_recall, target_ranks
from pixrec.report import choose_examples, format_table, write_report
from pixrec.scorers import tower_scorers
from pixrec.tracking import read_log

METRICS = "metrics.json"
HEADLINE_SCORERS = ("pixrec", "pixrec_text_only", "popularity")
Summary = dict[str, Any]


def prepare(items: str | None, interactions: str, out: str, source: str, config: Config, console: Console) -> Summary:
    from pixrec.cluster.prepare import prepare as run

    if source != "tables":
        raise InputError(f"--source {source}: this release reads tables only; convert the raw files to Parquet tables")
    info = run(items, interactions, out, config.prepare, progress=console.progress)
    return {"out": out, **{key: info[key] for key in ("items", "images", "interactions", "users", "split")}}


def train(data: str, out: str, config: Config, resume: bool, console: Console) -> Summary:
    from pixrec.cluster.session import connect
    from pixrec.cluster.train import check_ready
    from pixrec.cluster.train import train as run

    check_ready(data, out, config, resume)
    with connect():
        info = run(data, out, config, resume=resume, on_row=console.training)
    return {"out": out, **info}


def embed(model: str, data: str, out: str, config: Config, console: Console) -> Summary:
    from pixrec.cluster.embed import check_ready
    from pixrec.cluster.embed import embed as run
    from pixrec.cluster.session import connect

    check_ready(model, data, out)
    with connect():
        manifest = run(model, data, out, config, progress=console.progress)
    return {"out": out, **manifest}


def evaluate(
    model: str,
    data: str,
    index: str | None,
    out: str,
    config: Config,
    console: Console,
    ceiling: Mapping[str, Any] | None = None,
) -> Summary:
    """Score the held-out events and write metrics.json and the report; `ceiling` is drawn beside the figures."""
    with storage.staged_folder(out, METRICS, "evaluation") as staging:
        loaded = load_model(model)
        dataset = load_dataset(data)
        held_out = dataset.held_out("test")
        if not len(held_out.targets):
            raise InputError(f"{data}: no user has a test event with a history before it; choose another prepare.split")
        counts = dataset.training_counts()
        published = load_index(index, loaded.fingerprint) if index else None
        towers, knockouts = tower_scorers(model, loaded, dataset.items, published, console.progress)
        scorers: list[Scorer] = [*towers, Popularity(counts), RepeatLast(counts)]
        evaluation = evaluate_scorers(
            scorers,
            held_out,
            len(dataset.items),
            config.evaluate,
            cold=counts == 0,
            with_image=dataset.items.with_image,
            progress=lambda name, done, total: console.progress(f"rank {name}", done, total),
        )
        metrics = evaluation.metrics_json(dataset.info["split"]["kind"])
        metrics["knockouts"] = knockouts
        metrics["provenance"] = {
            "pixrec": pixrec.__version__,
            "model_fingerprint": loaded.fingerprint,
            "data_fingerprint": dataset.info["fingerprint"],
            "index_version": published.version if published else None,
        }
        if ceiling:
            metrics["ceiling"] = dict(ceiling)
        storage.write_json(storage.join(staging, METRICS), metrics)
        write_report(
            staging,
            metrics,
            title=f"{storage.name(data)}: what PixRec recommends",
            items=dataset.items,
            examples=choose_examples(towers[0], evaluation.held_out, config.evaluate),
            training_log=[row for row in read_log(model) if row["part"] == loaded.config.model.modalities],
            notes=_notes(knockouts),
            ceiling=ceiling,
        )
    console.say(format_table(metrics))
    return {"out": out, **{key: metrics[key] for key in ("users", "results", "guards")}}


def recommend(
    model: str, index: str, data: str | None, history: list[str], k: int, include_history: bool, console: Console
) -> Summary:
    recommender = pixrec.load_recommender(model, index, data)
    from pixrec.recommender import Query

    answer = recommender.answer([Query(history, k, exclude_history=not include_history)])[0]
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
    from pixrec.data.oracle import Oracle
    from pixrec.data.synthetic import build_world, write_catalog

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
    best = {}
    for name, text_only in (("both", False), ("text_only", True)):
        scores = Oracle(world, dataset.items.item_ids, text_only).scores(held_out.histories)
        ranks, ties = target_ranks(scores, held_out.targets), count_ties(scores, held_out.targets)
        best[name] = random_tie_recall(ranks, ties, (1, 10))
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
    return dataclasses.replace(config, train=dataclasses.replace(config.train, knockouts=("text",)))


def _demo_verdict(
    results: Mapping[str, Any], guards: Mapping[str, Any], best: Mapping[str, Mapping[str, float]]
) -> str:
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


def _notes(knockouts: Mapping[str, str]) -> list[str]:
    trained = [name for name, how in knockouts.items() if how == "trained"]
    scored = [name for name, how in knockouts.items() if how == "scored"]
    notes = []
    if trained:
        notes.append(f"{', '.join(trained)}: trained the same way on one modality alone, with the same budget.")
    if scored:
        notes.append(
            f"{', '.join(scored)}: the model itself, scored with one modality removed; a weaker test than a knockout "
            "trained with the same budget (train.knockouts)."
        )
    return notes
