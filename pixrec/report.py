"""metrics.json as a page to read: one HTML file that needs nothing else, and a table for the terminal.

Knows the shape of metrics.json and how to draw it. Does not know how the numbers came about. Whatever comes from a
catalog (titles, ids, pictures) is escaped or re-encoded: catalogs are written by strangers.

Geometry is given in percent of a plot's width (`x`, `low`, `high`), so that plots fit a phone without shrinking text.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch

from pixrec import storage
from pixrec.config import EvaluateConfig
from pixrec.data.images import shrink_image
from pixrec.data.items import ItemTable
from pixrec.data.sequences import HeldOut
from pixrec.errors import UnreadableImage
from pixrec.evaluation import Scorer, sample_users
from pixrec.schema import TITLE

PAGE = "index.html"
HEADLINE_METRICS = ("recall@1", "recall@10", "ndcg@10", "mrr")
PLOTTED_METRICS = ("recall@10", "recall@1", "ndcg@10")
METRIC_NAMES = {"mrr": "MRR"}
SCORER_MEANINGS = {
    "pixrec": "pictures and text",
    "pixrec_text_only": "text alone",
    "pixrec_image_only": "pictures alone",
    "popularity": "the most bought items for everybody",
    "repeat_last": "the user's own items again, latest first",
    "item_transition": "what followed the last item before",
    "sasrec": "learned item ids, no content",
    "generative_bm25": "generated text, looked up with BM25",
}
KNOCKOUT_MEANINGS = {"trained": "the same, trained on", "scored": "the same model, shown"}
CURVES = (
    ("loss_nig", "Next-item generation", "L_NIG, training"),
    ("loss_tt", "Item against item in context", "L_TT, training"),
    ("loss_ut", "User against item", "L_UT, training"),
    ("valid_ndcg@10", "NDCG@10", "validation"),
)
THUMBNAIL_PX = 128  # shown at half of that on a dense screen
MIN_BUCKET_USERS = 10
MAX_CURVE_POINTS = 160
MINUS = "\N{MINUS SIGN}"
MAX_HISTORY_SHOWN = 9  # a shelf of a desktop's width, with the target after them


@dataclass(frozen=True)
class Example:
    """One held-out user beside what was recommended; items by row."""

    user_id: str
    history: list[int]
    target: int
    recommended: list[tuple[int, float]]
    """(row, score), best first."""


def choose_examples(scorer: Scorer, held_out: HeldOut, config: EvaluateConfig, k: int = 10) -> list[Example]:
    """`config.report_histories` users drawn at random by `config.seed`, hits and misses alike, with the first `k`."""
    users = sample_users(held_out, config.report_histories, config.seed)
    if not users.user_ids:
        return []
    scores = torch.nan_to_num(scorer.scores(users.histories).float(), nan=-torch.inf).cpu().numpy().copy()
    examples = []
    for user, history in enumerate(users.histories):
        target = int(users.targets[user])
        if config.seen == "filtered":
            scores[user, history[history != target]] = -np.inf
        rows = np.argsort(-scores[user], kind="stable")[:k]
        recommended = [(int(r), float(scores[user, r])) for r in rows if scores[user, r] > -np.inf]
        examples.append(Example(users.user_ids[user], [int(r) for r in history], target, recommended))
    return examples


def write_report(
    out_uri: str,
    metrics: Mapping[str, Any],
    *,
    title: str,
    items: ItemTable,
    examples: Sequence[Example] = (),
    training_log: Sequence[Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
    ceiling: Mapping[str, Any] | None = None,
) -> None:
    """Write `index.html` below `out_uri`.

    metrics is the content of metrics.json. training_log rows hold "step" beside any of "loss_nig", "loss_tt",
    "loss_ut" and "valid_ndcg@10". ceiling gives the best possible value by metric name, and its own "name".
    Raises OutputError when the place cannot be written.
    """
    page = render(metrics, title, items, examples, training_log or [], notes, ceiling or {})
    storage.write_bytes(storage.join(out_uri, PAGE), page.encode())


def render(
    metrics: Mapping[str, Any],
    title: str,
    items: ItemTable,
    examples: Sequence[Example],
    training_log: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    ceiling: Mapping[str, Any],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pixrec"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    results = metrics["results"]
    other = metrics.get("results_other_seen")
    knockouts = metrics.get("knockouts", {})
    return environment.get_template("report.html").render(
        title=title,
        metrics=metrics,
        lead=_lead(metrics),
        metric_names=[_metric_name(m) for m in HEADLINE_METRICS],
        table=_table(results, knockouts),
        other={"seen": other["seen"], "table": _table(other["results"], knockouts)} if other else None,
        plots=[_interval_plot(results, metric, ceiling) for metric in PLOTTED_METRICS],
        ceiling_name=ceiling.get("name", "ceiling") if ceiling else None,
        differences=_difference_plot(metrics.get("differences")),
        buckets=_bucket_plots(metrics.get("buckets", {})),
        curves=_curves(training_log),
        examples=[_example_view(example, items) for example in examples],
        protocol=_protocol_sentences(metrics),
        guards=_guard_sentences(metrics),
        warnings=_warnings(metrics),
        notes=notes,
    )


def format_table(metrics: Mapping[str, Any]) -> str:
    """The results as plain text, one line a scorer, recall@10 with its 95 % interval."""
    head = ["scorer", *(_metric_name(m) for m in HEADLINE_METRICS), "95 % of Recall@10"]
    lines = [
        [
            scorer,
            *(_number(result[m]) for m in HEADLINE_METRICS),
            " to ".join(map(_number, result["ci95"]["recall@10"])),
        ]
        for scorer, result in metrics["results"].items()
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, ["-" * w for w in widths], *lines]
    )


def _number(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", MINUS)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric.replace("recall", "Recall").replace("ndcg", "NDCG"))


def _headliner(results: Mapping[str, Any]) -> str:
    return "pixrec" if "pixrec" in results else next(iter(results))


def _kind(scorer: str) -> str:
    """How a scorer is coloured: the model, a knockout of it, or something to compare with."""
    return "main" if scorer == "pixrec" else "knockout" if scorer.startswith("pixrec_") else "baseline"


def _lead(metrics: Mapping[str, Any]) -> str:
    results = metrics["results"]
    scorer = _headliner(results)
    low, high = results[scorer]["ci95"]["recall@10"]
    text = (
        f"Of {metrics['users']:,} users, {_percent(results[scorer]['recall@10'])} find their next item among the first "
        f"ten that {scorer} recommends (95 % interval {_percent(low)} to {_percent(high)})."
    )
    if scorer != "popularity" and "popularity" in results:
        text += f" By popularity alone it is {_percent(results['popularity']['recall@10'])}."
    return text


def _table(results: Mapping[str, Any], knockouts: Mapping[str, str]) -> list[dict[str, Any]]:
    best = {m: max(result[m] for result in results.values()) for m in HEADLINE_METRICS}
    return [
        {
            "scorer": scorer,
            "kind": _kind(scorer),
            "meaning": " ".join(
                filter(None, [KNOCKOUT_MEANINGS.get(knockouts.get(scorer, "")), SCORER_MEANINGS.get(scorer)])
            ),
            "cells": [
                {"value": result[m], "ci": result["ci95"][m], "best": result[m] == best[m]} for m in HEADLINE_METRICS
            ],
        }
        for scorer, result in results.items()
    ]


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values that cover low .. high, first and last included."""
    span = high - low if high > low else max(abs(high), 1e-3)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / about * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _axis(low: float, high: float) -> dict[str, Any]:
    ticks = _ticks(low, high)
    return {
        "ticks": [{"x": _place(t, ticks), "label": f"{t:g}".replace("-", MINUS)} for t in ticks],
        "zero": _place(0, ticks) if ticks[0] < 0 < ticks[-1] else None,
        "range": ticks,
    }


def _place(value: float, ticks: Sequence[float]) -> float:
    """Where `value` lies between the first tick and the last, in percent."""
    return round(100 * (value - ticks[0]) / (ticks[-1] - ticks[0]), 2)


def _marks(
    results: Mapping[str, Any], metric: str, ticks: Sequence[float], shown: Callable[[float], str] = _number
) -> list[dict[str, Any]]:
    rows = []
    for scorer, result in results.items():
        low, high = result["ci95"][metric]
        places = {"x": _place(result[metric], ticks), "low": _place(low, ticks), "high": _place(high, ticks)}
        rows.append(
            {"scorer": scorer, "kind": _kind(scorer), "shown": shown(result[metric]), "ci": [low, high], **places}
        )
    return rows


def _interval_plot(results: Mapping[str, Any], metric: str, ceiling: Mapping[str, Any]) -> dict[str, Any]:
    best = ceiling.get(metric)
    axis = _axis(0, max([r["ci95"][metric][1] for r in results.values()] + ([] if best is None else [best])))
    return {
        "metric": _metric_name(metric),
        "axis": axis,
        "rows": _marks(results, metric, axis["range"]),
        "ceiling": None if best is None else {"x": _place(best, axis["range"]), "value": best},
    }


def _difference_plot(differences: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not differences or not differences["minus"]:
        return None
    ends = [end for d in differences["minus"].values() for end in d["ci95"]["recall@10"]]
    axis = _axis(min(0, *ends), max(0, *ends))
    rows = _marks(differences["minus"], "recall@10", axis["range"], _signed)
    return {"of": differences["of"], "metric": "Recall@10", "axis": axis, "rows": rows, "ceiling": None}


def _bucket_plots(buckets: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One panel a bucket, all on one scale; buckets of too few users stay empty, and so cannot stretch the scale."""
    drawn = {name: b["results"] if b["users"] >= MIN_BUCKET_USERS else {} for name, b in buckets.items()}
    highs = [result["ci95"]["recall@10"][1] for results in drawn.values() for result in results.values()]
    axis = _axis(0, max(highs, default=1.0))
    return [
        {
            "meaning": bucket["meaning"],
            "users": bucket["users"],
            "axis": axis,
            "rows": _marks(drawn[name], "recall@10", axis["range"]),
        }
        for name, bucket in buckets.items()
    ]


def _curves(training_log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Curves with anything to show; long ones as means over equal stretches of rows."""
    curves = []
    end = max((row["step"] for row in training_log), default=0)
    for key, name, unit in CURVES:
        points = np.array([(row["step"], row[key]) for row in training_log if row.get(key) is not None], dtype=float)
        points = points[np.isfinite(points).all(axis=1)] if len(points) else points
        if not len(points):
            continue
        points = np.stack([part.mean(axis=0) for part in np.array_split(points, min(len(points), MAX_CURVE_POINTS))])
        values = points[:, 1]
        y_ticks = _ticks(0 if key.startswith("valid") else values.min(), values.max(), 3)
        x_ticks = [0, max(end, 1)]
        places = [(_place(s, x_ticks), 100 - _place(v, y_ticks)) for s, v in points]
        curves.append(
            {
                "name": name,
                "unit": unit,
                "last": values[-1],
                "polyline": " ".join(f"{x:g},{y:g}" for x, y in places),
                "dots": places if len(places) <= 24 else places[-1:],
                "y_ticks": [{"y": 100 - _place(t, y_ticks), "label": f"{t:g}"} for t in y_ticks],
                "last_step": f"{end:,}",
            }
        )
    return curves


def _example_view(example: Example, items: ItemTable) -> dict[str, Any]:
    rows = [row for row, _ in example.recommended]
    rank = rows.index(example.target) + 1 if example.target in rows else None
    return {
        "user_id": example.user_id,
        "history": [_item_view(row, items) for row in example.history[-MAX_HISTORY_SHOWN:]],
        "left_out": max(0, len(example.history) - MAX_HISTORY_SHOWN),
        "target": _item_view(example.target, items),
        "recommended": [_item_view(row, items) | {"hit": row == example.target} for row in rows],
        "rank": rank,
    }


def _item_view(row: int, items: ItemTable) -> dict[str, Any]:
    title = str(items.fields(row).get(TITLE) or items.item_ids[row])
    return {"title": title, "picture": _thumbnail(items.image(row))}


def _thumbnail(data: bytes | None) -> str | None:
    """The picture re-encoded as base64 JPEG, or None."""
    if data is None:
        return None
    try:
        return base64.b64encode(shrink_image(data, THUMBNAIL_PX)).decode()
    except UnreadableImage:
        return None


def _protocol_sentences(metrics: Mapping[str, Any]) -> list[str]:
    protocol = metrics["protocol"]
    splits = {
        "leave_one_out": "Split: leave one out. Each user's last event is the test; the one before it validates.",
        "temporal": "Split: by time. Training ends before the validation period, which ends before the test period; "
        "each user's last event in the test period is the test.",
    }
    seen = {
        "allowed": "Items of the user's own history stay among the candidates.",
        "filtered": "Items of the user's own history are taken out of the candidates, except the target itself.",
    }
    items = f" of {metrics['items']:,} items" if "items" in metrics else ""
    return [
        splits.get(protocol["split"], f"Split: {protocol['split']}."),
        f"Candidates: the whole catalog{items}, never a sample.",
        "Ties count against the scorer: an item with the target's score ranks before it.",
        seen[protocol["seen"]],
        "Intervals hold 95 % of the means over resampled users (bootstrap). They say how sure a figure is for users "
        "like these, not how much it would move if the model were trained again.",
    ]


def _guard_sentences(metrics: Mapping[str, Any]) -> list[str]:
    guards = metrics.get("guards")
    if not guards:
        return []
    ties = ", ".join(f"{scorer} {_percent(share)}" for scorer, share in guards["tie_share"].items())
    sentences = [
        f"{_percent(guards['repeat_share'])} of the targets already occur in the user's own history.",
        f"Targets that tie with another item: {ties}.",
        *_random_tie_sentence(guards),
        f"Recall@10 of a blind guess: {_number(guards['chance_recall@10'])}.",
    ]
    if guards["popularity_recall@10"] is not None:
        sentences.append(f"Recall@10 of popularity, the floor: {_number(guards['popularity_recall@10'])}.")
    return sentences


def _random_tie_sentence(guards: Mapping[str, Any]) -> list[str]:
    figures = [
        f"{scorer} {_number(recalls['recall@1'])} and {_number(recalls['recall@10'])}"
        for scorer, recalls in guards.get("random_ties", {}).items()
        if guards["tie_share"][scorer] > 0
    ]
    return (
        [f"Recall@1 and @10 if ties were broken at random, which is generous: {', '.join(figures)}."] if figures else []
    )


def _warnings(metrics: Mapping[str, Any]) -> list[str]:
    below = metrics.get("guards", {}).get("below_popularity", [])
    return [f"Below popularity in Recall@10: {', '.join(below)}."] if below else []
