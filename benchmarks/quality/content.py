"""What content and ids are worth in the compact user tower, beside SASRec, by modality and over seeds; on a data
set with cold items, what each model does with those. Without Ray, so also on a machine that has a GPU and no cluster.

    python -m benchmarks.quality.content DATA --config recipes/ml1m_compact.yaml --out FOLDER --seeds 0 1 2 --jobs 2
    python -m benchmarks.quality.content DATA --out FOLDER --table      # only print what is there

A cell is a model and a seed. For each of `--modalities` an item tower is trained (the interleaved phase of `pixrec
train`, best checkpoint by validation), then, each by itself, a compact tower on its content alone and one with a
learned vector for each item too, and `train.joint` where it is set: what `pixrec train` does with
`model.user_tower=compact`, `model.modalities` and `model.compact.id_embedding`. The models of all modalities are
trained the same way with the same budget. `FOLDER/rows.jsonl` gets a line a cell, `FOLDER/models` the item towers and
the finished models, `FOLDER/ranks` the ranks of every user. What is there is not run again. `--part valid` measures on
the validation events, for choosing settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.quality.sequence import figures, ranks
from pixrec import storage
from pixrec.artifact import MODEL_MARKER, load_model, new_model, save_model
from pixrec.config import Config, Modalities, load_config
from pixrec.data.joined import join_datasets
from pixrec.data.sequences import Dataset, load_dataset, sample_users
from pixrec.evaluation import bootstrap_ci, paired_difference_ci, randomisation_p
from pixrec.metrics import user_metrics
from pixrec.model.catalog import Catalog
from pixrec.scorers import LOSS_OF, Scorer, Users, train_sasrec
from pixrec.scorers.baselines import Popularity
from pixrec.training.compact import CompactTrainer
from pixrec.training.phases import compact_trainer, interleaved_trainer, joint_trainer

ID_EMBEDDING = {"content": False, "content and ids": True}
BASELINES = ("popularity", *LOSS_OF)
SHOWN = ("recall@10", "ndcg@10")


class Cell(NamedTuple):
    model: str
    """`content`, `content and ids`, `popularity` or a SASRec"""
    modalities: Modalities
    seed: int

    @property
    def name(self) -> str:
        return self.model if self.model in BASELINES else f"{self.model}, {self.modalities}"


class Run(NamedTuple):
    """What the cells of one run share."""

    data: str
    out: Path
    config: Config
    part: str
    device: str
    tower_seed: int | None
    """of the one item tower that serves all seeds; None: each seed has its own"""

    def of(self, cell: Cell) -> Config:
        model = dataclasses.replace(
            self.config.model,
            modalities=cell.modalities,
            compact=dataclasses.replace(self.config.model.compact, id_embedding=ID_EMBEDDING.get(cell.model, True)),
        )
        return dataclasses.replace(
            self.config, model=model, train=dataclasses.replace(self.config.train, seed=cell.seed)
        )

    def tower_cell(self, cell: Cell) -> Cell:
        return cell if self.tower_seed is None else cell._replace(seed=self.tower_seed)

    def item_tower(self, cell: Cell) -> Path:
        """Where the item tower of a cell lies; named by all that makes it."""
        config = self.of(self.tower_cell(cell))
        made = [getattr(config.model, f.name) for f in dataclasses.fields(config.model) if f.name != "compact"]
        made += [
            getattr(config.train, f.name)
            for f in dataclasses.fields(config.train)
            if f.name not in ("compact", "joint")
        ]
        return (
            self.out / "models" / f"{cell.modalities}-{hashlib.blake2b(repr(made).encode(), digest_size=6).hexdigest()}"
        )


class CompactScorer(Scorer):
    """A compact tower with its table of item vectors."""

    name, needs = "compact", ("model",)

    def __init__(self, trainer: CompactTrainer) -> None:
        self.trainer, self.table = trainer, trainer.item_vectors()

    @torch.no_grad()
    def scores(self, users: Users) -> torch.Tensor:
        return self.trainer.user_vectors(users.histories, self.table) @ self.table.T


def train_item_tower(run: Run, cell: Cell) -> None:
    """The interleaved phase; the best checkpoint by validation stays."""
    config, dataset, folder = run.of(cell), load_dataset(run.data), run.item_tower(cell)
    model = new_model(config, [dataset.items.text(row) for row in range(len(dataset.items))], run.device)
    data, catalog = join_datasets([dataset]), Catalog(dataset.items, model.encoder)
    trainer = interleaved_trainer(model, catalog, data, config)
    valid, best, started = (
        sample_users(data.valid, config.train.max_validation_users, cell.seed),
        -1.0,
        time.monotonic(),
    )
    while trainer.step < trainer.total_steps:
        row = trainer.train_step()
        if trainer.step % config.train.validate_every_steps == 0 or trainer.step == trainer.total_steps:
            found = trainer.validate(valid)
            _say(f"item tower, {cell.modalities}", cell.seed, trainer.step, started, {**row, **found})
            if found["valid_ndcg@10"] > best:
                best = found["valid_ndcg@10"]
                save_model(str(folder), model, {"step": trainer.step, "metrics": found})


def train_compact(run: Run, cell: Cell) -> tuple[CompactScorer, dict[str, float]]:
    """The compact phase and the joint one, on the cell's item tower; the model is saved whole."""
    config, dataset, started = run.of(cell), load_dataset(run.data), time.monotonic()
    base = dataclasses.replace(load_model(str(run.item_tower(cell)), run.device), config=config)
    catalog = Catalog(dataset.items, base.encoder)
    valid = sample_users(dataset.held_out("valid"), config.train.compact.max_validation_users, cell.seed)
    trainer, model = compact_trainer(base, catalog, dataset, config)
    found = trainer.fit(valid, _saying(cell, started))
    if config.train.joint.epochs:
        trainer = joint_trainer(model, catalog, dataset, config)
        found = {**found, **{f"joint_{k}": v for k, v in trainer.fit(valid, _saying(cell, started)).items()}}
        trainer.refresh()
    name = f"{cell.name}-{cell.seed}".replace(", ", "-").replace(" ", "-")
    save_model(str(run.out / "models" / name), dataclasses.replace(model, config=config), {"metrics": found})
    return CompactScorer(trainer), found


def run_cell(run: Run, cell: Cell) -> dict[str, Any]:
    """Train the cell's model and rank; returns its row."""
    torch.set_num_threads(run.config.train.threads_per_worker)
    dataset, config, started = load_dataset(run.data), run.of(cell), time.monotonic()
    found: dict[str, float] = {}
    if cell.model == "popularity":
        scorer: Any = Popularity(dataset.training_counts())
    elif cell.model in LOSS_OF:
        sasrec = dataclasses.replace(config.sasrec, seed=cell.seed)
        scorer = train_sasrec(cell.model, dataset, sasrec, _saying(cell, started), device=run.device)
        found = scorer.figures
    else:
        scorer, found = train_compact(run, cell)
    held_out = dataset.held_out("valid" if run.part == "valid" else "test")
    of_users = ranks(scorer, held_out)
    np.savez_compressed(run.out / "ranks" / f"{cell.name}-{cell.seed}.npz", **of_users)
    row = {"cell": cell.name, "seed": cell.seed, "part": run.part, "seconds": round(time.monotonic() - started)}
    return {**row, "training": found, **figures(of_users)}


def _item_tower(run: Run, cell: Cell) -> None:
    torch.set_num_threads(run.config.train.threads_per_worker)
    train_item_tower(run, cell)


def _saying(cell: Cell, started: float) -> Callable[[dict[str, Any]], None]:
    def on_row(row: dict[str, Any]) -> None:
        if "valid_ndcg@10" in row:
            _say(cell.name, cell.seed, row["step"], started, row)

    return on_row


def _say(name: str, seed: int, step: int, started: float, row: dict[str, Any]) -> None:
    shown = {k: round(v, 4) for k, v in row.items() if k.startswith("valid_") or k in ("loss", "epoch")}
    print(f"{name}, seed {seed}, step {step}, {time.monotonic() - started:.0f} s: {shown}", file=sys.stderr, flush=True)


def run_all(run: Run, cells: list[Cell], jobs: int) -> None:
    """Each cell in a process of its own, `jobs` at a time, item towers before what stands on them. One that fails costs
    the others nothing; its error is raised at the end."""
    for folder in ("models", "ranks"):
        (run.out / folder).mkdir(parents=True, exist_ok=True)
    waiting: dict[Path, list[Cell]] = {}
    ready = []
    for cell in cells:
        tower = None if cell.model in BASELINES else run.item_tower(cell)
        if tower is None or storage.exists(str(tower / MODEL_MARKER)):
            ready.append(cell)
        else:
            waiting.setdefault(tower, []).append(cell)
    failures = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        pending: dict[Future[Any], Path | None] = {
            pool.submit(_item_tower, run, run.tower_cell(of_tower[0])): tower for tower, of_tower in waiting.items()
        }
        pending |= {pool.submit(run_cell, run, cell): None for cell in ready}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                tower, failure = pending.pop(future), future.exception()
                if failure is not None:
                    failures.append(failure)
                    continue
                if tower is not None:
                    pending |= {pool.submit(run_cell, run, cell): None for cell in waiting[tower]}
                    continue
                with (run.out / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(future.result()) + "\n")
    if failures:
        raise failures[0]


def table(out: Path, dataset: Dataset, part: str, against: str) -> str:
    """Markdown: mean over the seeds of each cell, the interval of the first seed over users, and the paired difference
    to `against` over users and seeds; cold targets apart where the data set has any."""
    rows = [row for row in _rows(out) if row["part"] == part]
    held_out = dataset.held_out("valid" if part == "valid" else "test")
    cold = dataset.training_counts()[held_out.targets] == 0
    lines = []
    for bucket, users in (("all", np.ones_like(cold)), ("cold", cold)):
        if not users.sum():
            continue
        lines.append(f"\n{bucket} targets, {users.sum()} users\n")
        lines += [f"| model | seen | seeds | R@10 | NDCG@10 | minus {against} |", "|---|---|---|---|---|---|"]
        for name, seen in itertools.product(dict.fromkeys(row["cell"] for row in rows), ("filtered", "allowed")):
            seeds = sorted(row["seed"] for row in rows if row["cell"] == name)
            cells = [_summary(out, name, seeds, seen, metric, users) for metric in SHOWN]
            cells.append(_minus(out, name, against, rows, seen, users))
            lines.append(f"| {name} | {seen} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(out: Path) -> list[dict[str, Any]]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _values(out: Path, name: str, seed: int, seen: str, metric: str, users: np.ndarray) -> np.ndarray:
    with np.load(out / "ranks" / f"{name}-{seed}.npz") as found:
        return user_metrics(found[seen][users], (1, 10))[metric]


def _summary(out: Path, name: str, seeds: list[int], seen: str, metric: str, users: np.ndarray) -> str:
    of_seeds = [_values(out, name, seed, seen, metric, users) for seed in seeds]
    low, high = bootstrap_ci(np.mean(of_seeds, axis=0))
    each = " ".join(f"{v.mean():.4f}" for v in of_seeds)
    return f"{np.mean(of_seeds):.4f} [{low:.4f}, {high:.4f}] ({each})"


def _minus(out: Path, name: str, against: str, rows: list[dict[str, Any]], seen: str, users: np.ndarray) -> str:
    both = sorted({r["seed"] for r in rows if r["cell"] == name} & {r["seed"] for r in rows if r["cell"] == against})
    if name == against or not both:
        return ""
    words = []
    for metric in SHOWN:
        ours, theirs = (
            np.mean([_values(out, n, s, seen, metric, users) for s in both], axis=0) for n in (name, against)
        )
        low, high = paired_difference_ci(ours, theirs)
        words.append(f"{(ours - theirs).mean():+.4f} [{low:+.4f}, {high:+.4f}] p {randomisation_p(ours, theirs):.3f}")
    return "; ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", help="YAML file, as pixrec train takes it")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--models", nargs="+", default=["popularity", "sasrec_full", *ID_EMBEDDING], choices=[*BASELINES, *ID_EMBEDDING]
    )
    parser.add_argument("--modalities", nargs="+", default=["both", "text"], choices=["both", "text", "image"])
    parser.add_argument(
        "--tower-seed", type=int, help="one item tower, of this seed, for the compact towers of all seeds"
    )
    parser.add_argument("--part", default="test", choices=["test", "valid"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--against", default="sasrec_full", help="what the others are compared with")
    parser.add_argument("--table", action="store_true", help="run nothing")
    a = parser.parse_args()
    config = load_config(storage.read_text(a.config) if a.config else "", a.set)
    run = Run(a.data, a.out, config, a.part, a.device, a.tower_seed)
    cells = []
    for model, seed in itertools.product(a.models, a.seeds):
        cells += [Cell(model, m, seed) for m in (a.modalities if model in ID_EMBEDDING else ["both"])]
    done = {(row["cell"], row["seed"], row["part"]) for row in _rows(a.out)}
    if not a.table:
        run_all(run, [c for c in cells if (c.name, c.seed, a.part) not in done], a.jobs)
    print(table(a.out, load_dataset(a.data), a.part, a.against))


if __name__ == "__main__":
    main()
