"""Cold start: a tenth of the items is held out of training entirely. Who finds them, among all items, by modality.

    python -m benchmarks.quality.cold --out FOLDER [--items U --interactions U] [--config FILE] [--set KEY=VALUE ...]

Without tables the synthetic catalog is drawn. Prepares, trains the model with a text-only and an image-only one beside
it (same budget), embeds, evaluates, and prints what each scorer reaches on the test targets that no training saw:
id-only models have nothing to go by there. What is given by --config and --set goes on top of `BASE`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import pixrec
from pixrec import storage
from pixrec.cluster.session import connect
from pixrec.config import Config, EvaluateConfig, ModelConfig, PrepareConfig, TrainConfig, load_config
from pixrec.console import Console
from pixrec.data.synthetic import build_world, write_catalog

BASE = Config(
    prepare=PrepareConfig(cold_item_share=0.1),
    model=ModelConfig(user_tower="compact"),
    train=TrainConfig(knockouts=("text", "image")),
    evaluate=EvaluateConfig(scorers=("popularity", "sasrec_full")),
)
COLUMNS = ("scorer", "R@10 cold", "95 %", "NDCG@10 cold", "95 %", "pixrec minus it, R@10", "p (Holm)", "R@10 all")


def main(words: list[str]) -> int:
    a = _parser().parse_args(words)
    config = load_config(storage.read_text(a.config) if a.config else "", a.set, base=BASE)
    places = {name: storage.join(a.out, name) for name in ("catalog", "data", "model", "index", "report")}
    started = time.monotonic()
    with Console() as console, connect():
        if a.interactions is None:
            write_catalog(build_world(config.demo), places["catalog"])
            a.items, a.interactions = (
                storage.join(places["catalog"], f"{n}.parquet") for n in ("items", "interactions")
            )
        data = pixrec.prepare(a.items, a.interactions, places["data"], config=config, progress=console)
        model = pixrec.train(data, places["model"], config=config, progress=console)
        index = pixrec.embed(model, data, places["index"], config=config, progress=console)
        report = pixrec.evaluate(model, data, places["report"], index=index, config=config, progress=console)
    metrics = report.info
    cold, left_out = data.info["cold"], data.info["interactions"]["held_out_cold"]
    print(
        f"{cold['items']} of {metrics['items']} items held out, {left_out} events with them; "
        f"{metrics['buckets']['target_cold']['users']} of {metrics['users']} test targets are cold"
    )
    print(_table(_rows(metrics)))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.monotonic() - started:.0f} s in all")
    return 0


def _rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    bucket, rows = metrics["buckets"]["target_cold"], []
    for scorer, result in bucket["results"].items():
        cells = [scorer]
        for metric in ("recall@10", "ndcg@10"):
            low, high = result["ci95"][metric]
            cells += [f"{result[metric]:.4f}", f"{low:.4f} to {high:.4f}"]
        other = bucket["differences"]["minus"].get(scorer)
        cells += [f"{other['recall@10']:+.4f}", f"{other['p_holm']['recall@10']:.3f}"] if other else ["", ""]
        rows.append((*cells, f"{metrics['results'][scorer]['recall@10']:.4f}"))
    return rows


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = [COLUMNS, tuple("-" * width for width in widths), *rows]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.cold", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for catalog, data, model, index and report")
    parser.add_argument("--items", help="items table")
    parser.add_argument("--interactions", help="interactions table; without it the synthetic catalog")
    parser.add_argument("--config", help="YAML file on top of BASE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
