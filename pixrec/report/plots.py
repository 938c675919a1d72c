"""Where marks lie on the report's plots. Knows results and geometry; knows no HTML.

The template draws them as inline SVG. Geometry is given in percent of a plot's width (`x`, `low`, `high`), so that a
plot fits a phone without shrinking its text and follows the page into dark mode; an SVG by matplotlib does neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pixrec.report.words import MINUS, kind, metric_name, number, probability, signed, stage_name

CURVES = (
    ("loss_nig", "Next-item generation", "L_NIG, training"),
    ("loss_tt", "Item against item in context", "L_TT, training"),
    ("loss_ut", "User against item", "L_UT, training"),
    ("loss", "Training loss", "training"),
    ("valid_ndcg@10", "NDCG@10", "validation"),
)
MIN_BUCKET_USERS = 10
MAX_CURVE_POINTS = 160


def round_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values that cover low .. high, first and last included."""
    span = high - low if high > low else max(abs(high), 1e-3)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / about * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _axis(low: float, high: float) -> dict[str, Any]:
    ticks = round_ticks(low, high)
    return {
        "ticks": [{"x": _place(t, ticks), "label": f"{t:g}".replace("-", MINUS)} for t in ticks],
        "zero": _place(0, ticks) if ticks[0] < 0 < ticks[-1] else None,
        "range": ticks,
    }


def _place(value: float, ticks: Sequence[float]) -> float:
    """Where `value` lies between the first tick and the last, in percent."""
    return round(100 * (value - ticks[0]) / (ticks[-1] - ticks[0]), 2)


def _marks(
    results: Mapping[str, Any], metric: str, ticks: Sequence[float], shown: Callable[[float], str] = number
) -> list[dict[str, Any]]:
    rows = []
    for scorer, result in results.items():
        low, high = result["ci95"][metric]
        places = {"x": _place(result[metric], ticks), "low": _place(low, ticks), "high": _place(high, ticks)}
        rows.append(
            {
                "scorer": scorer,
                "kind": kind(scorer),
                "shown": shown(result[metric]),
                "note": None,
                "ci": [low, high],
                **places,
            }
        )
    return rows


def interval_plot(results: Mapping[str, Any], metric: str, ceiling: Mapping[str, Any]) -> dict[str, Any]:
    best = ceiling.get(metric)
    axis = _axis(0, max([r["ci95"][metric][1] for r in results.values()] + ([] if best is None else [best])))
    return {
        "metric": metric_name(metric),
        "axis": axis,
        "rows": _marks(results, metric, axis["range"]),
        "ceiling": None if best is None else {"x": _place(best, axis["range"]), "value": best},
    }


def difference_plots(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is evaluated minus each other scorer, then the blend minus each other one, where they were compared."""
    compared = (metrics.get(key) for key in ("differences", "differences_of_blend"))
    return [_difference_plot(differences) for differences in compared if differences and differences["minus"]]


def _difference_plot(differences: Mapping[str, Any]) -> dict[str, Any]:
    ends = [end for d in differences["minus"].values() for end in d["ci95"]["recall@10"]]
    axis = _axis(min(0, *ends), max(0, *ends))
    rows = _marks(differences["minus"], "recall@10", axis["range"], signed)
    for row, other in zip(rows, differences["minus"].values(), strict=True):
        row["note"] = probability(other["p_holm"]["recall@10"]) if "p_holm" in other else None
    return {"of": differences["of"], "metric": "Recall@10", "axis": axis, "rows": rows, "ceiling": None}


def bucket_plots(buckets: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One panel a bucket, all on one scale; buckets of too few users stay empty, and so cannot stretch the scale."""
    drawn = {name: b["results"] if b["users"] >= MIN_BUCKET_USERS else {} for name, b in buckets.items()}
    highs = [result["ci95"]["recall@10"][1] for results in drawn.values() for result in results.values()]
    axis = _axis(0, max(highs, default=1.0))
    panels = []
    for name, bucket in buckets.items():
        rows = _marks(drawn[name], "recall@10", axis["range"])
        compared = bucket.get("differences", {"minus": {}})["minus"]
        for row in rows:
            if row["scorer"] in compared:
                row["note"] = probability(compared[row["scorer"]]["p_holm"]["recall@10"])
        panels.append({"meaning": bucket["meaning"], "users": bucket["users"], "axis": axis, "rows": rows})
    return panels


def trainings(training_log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curves of all parts of a training: the model's stages in their order, then those of each knockout."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in training_log:
        parts.setdefault(row["part"], []).append(row)
    own = training_log[-1]["part"].partition("_")[0] if training_log else ""  # the model is trained last
    whose: dict[str, list[dict[str, Any]]] = {own: []}
    for part, rows in parts.items():
        modality, _, stage = part.partition("_")
        if drawn := curves(rows):
            whose.setdefault(modality, []).append({"name": stage_name(stage), "curves": drawn})
    return [
        {"knockout": None if modality == own else modality, "stages": stages}
        for modality, stages in whose.items()
        if stages
    ]


def curves(training_log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Curves with anything to show; long ones as means over equal stretches of rows."""
    drawn = []
    end = max((row["step"] for row in training_log), default=0)
    parts = any(key.startswith("loss_") for row in training_log for key in row)
    for key, name, unit in CURVES:
        if key == "loss" and parts:
            continue
        points = np.array([(row["step"], row[key]) for row in training_log if row.get(key) is not None], dtype=float)
        points = points[np.isfinite(points).all(axis=1)] if len(points) else points
        if not len(points):
            continue
        points = np.stack([part.mean(axis=0) for part in np.array_split(points, min(len(points), MAX_CURVE_POINTS))])
        values = points[:, 1]
        y_ticks = round_ticks(0 if key.startswith("valid") else values.min(), values.max(), 3)
        x_ticks = [0, max(end, 1)]
        places = [(_place(s, x_ticks), 100 - _place(v, y_ticks)) for s, v in points]
        drawn.append(
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
    return drawn
