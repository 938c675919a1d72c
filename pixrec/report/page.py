"""The HTML page. Knows the template and what goes into it. What comes from a catalog is escaped there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from pixrec import storage
from pixrec.data.items import ItemTable
from pixrec.report import plots, words
from pixrec.report.pictures import Example, Grid, example_view, grid_view
from pixrec.report.words import HEADLINE_METRICS, metric_name

PAGE = "index.html"
PLOTTED_METRICS = ("recall@10", "recall@1", "ndcg@10")
MAX_SEED_DIGITS = 4


def write_report(
    out_uri: str,
    metrics: Mapping[str, Any],
    *,
    data_name: str,
    items: ItemTable,
    examples: Sequence[Example] = (),
    grids: Sequence[Grid] = (),
    training_log: Sequence[Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
    ceiling: Mapping[str, Any] | None = None,
) -> None:
    """Write `index.html` below `out_uri`.

    metrics is the content of metrics.json, data_name what the data set is called. training_log rows hold "part" and
    "step" beside any of "loss_nig", "loss_tt", "loss_ut", "loss" and "valid_ndcg@10". ceiling gives the best possible
    value by metric name, and its own "name". Raises OutputError when the place cannot be written.
    """
    ceiling = ceiling or {}
    results, other = metrics["results"], metrics.get("results_other_seen")
    page = _environment().get_template("report.html").render(
        title=words.title(metrics, data_name),
        evaluated=words.evaluated(metrics),
        metrics=metrics,
        lead=words.lead(metrics),
        metric_names=[metric_name(m) for m in HEADLINE_METRICS],
        table=_table(results, metrics),
        other={"seen": other["seen"], "table": _table(other["results"], metrics)} if other else None,
        every_metric=_every_metric(results),
        seeds=_seeds(metrics.get("seeds")),
        plots=[plots.interval_plot(results, metric, ceiling) for metric in PLOTTED_METRICS],
        ceiling_name=ceiling.get("name", "ceiling") if ceiling else None,
        differences=plots.difference_plots(metrics),
        buckets=plots.bucket_plots(metrics.get("buckets", {})),
        trainings=plots.trainings(training_log or []),
        grids=[grid_view(grid, items) for grid in grids],
        examples=[example_view(example, items) for example in examples],
        protocol=words.protocol_sentences(metrics),
        guards=words.guard_sentences(metrics),
        warnings=words.warnings(metrics),
        notes=notes,
    )  # fmt: skip
    storage.write_bytes(storage.join(out_uri, PAGE), page.encode())


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pixrec.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = words.number
    return environment


def _table(results: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    best = {m: max(result[m] for result in results.values()) for m in HEADLINE_METRICS}
    return [
        {
            "scorer": scorer,
            "kind": words.kind(scorer),
            "meaning": words.meaning(scorer, metrics),
            "cells": [
                {"value": result[m], "ci": result["ci95"][m], "best": result[m] == best[m]} for m in HEADLINE_METRICS
            ],
        }
        for scorer, result in results.items()
    ]


def _every_metric(results: Mapping[str, Any]) -> dict[str, Any]:
    """All metrics by scorer, a row a metric: a wide catalog of scorers scrolls, a phone reads down."""
    first = next(iter(results.values()))
    metrics = [m for m in first if m != "ci95"]
    rows = [
        {
            "metric": metric_name(m),
            "cells": [f"{r[m]:.2f}" if m.startswith("novelty") else words.number(r[m]) for r in results.values()],
        }
        for m in metrics
        if all(m in r for r in results.values())
    ]
    return {"scorers": list(results), "rows": rows}


def _seeds(seeds: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Means and standard deviations over runs."""
    if not seeds:
        return None
    rows = [
        {
            "scorer": scorer,
            "kind": words.kind(scorer),
            "cells": [
                f"{result[m]['mean']:.{MAX_SEED_DIGITS}f} ± {result[m]['sd'] or 0:.{MAX_SEED_DIGITS}f}"
                for m in HEADLINE_METRICS
            ],
        }
        for scorer, result in seeds["results"].items()
    ]
    return {"runs": len(seeds["runs"]), "rows": rows}
