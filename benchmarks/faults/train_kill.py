"""Kills a training run three times at a worker and once at its driver, and shows that it ends as the undisturbed one.

    python -m benchmarks.faults.train_kill [seed] [--feed ray_data] [--workers-after 2]

A small synthetic catalog, `pixrec-tiny`, two workers under Ray Train; always SIGKILL, at steps drawn by lot. A worker's
death is left to `train.max_failures`; after the driver's the command is given again with --resume, for one worker or as
many as `--workers-after` says. With two all is equal to the bit; one adds up the gradients of a step in another order,
and the difference in the last bit grows with the steps. With `--feed ray_data` Ray Data reads for the workers of the
disturbed run, of which a reader is killed too; the undisturbed run reads in the workers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.processes import below
from pixrec import cli
from pixrec.config import Config, SyntheticConfig, TrainConfig, dump_config
from pixrec.data.synthetic import build_world, write_catalog
from pixrec.training.tracking import read_log

STEPS, INTERVAL = 160, 20
VICTIMS = ("worker", "worker", "worker", "driver")
CONFIG = Config(
    train=TrainConfig(
        epochs=100,
        max_steps=STEPS,
        validate_every_steps=INTERVAL,
        max_validation_users=200,
        validate_modalities=False,
    ),
    demo=SyntheticConfig(num_items=300, num_users=800),
)
_LONGEST_SECONDS = 600


class Step(NamedTuple):
    """A step that a worker took, as it noted it."""

    process: int
    step: int
    loss: float


def main(seed: int, feed: str, workers_after: int) -> int:
    with tempfile.TemporaryDirectory(prefix="pixrec-train-kill-") as folder:
        place = Path(folder)
        for name, reads in (("config", "local"), ("disturbed", feed)):
            train = dataclasses.replace(CONFIG.train, feed=reads)  # type: ignore[arg-type]
            (place / f"{name}.yaml").write_text(dump_config(dataclasses.replace(CONFIG, train=train)))
        write_catalog(build_world(CONFIG.demo), str(place / "catalog"))
        assert start(place, "prepare").wait() == 0
        started = time.monotonic()
        assert start(place, "whole").wait() == 0
        between = time.monotonic()
        victims = [*VICTIMS, *(["reader"] if feed == "ray_data" else [])]
        lost = disturb(place, random.Random(seed), victims, workers_after)
        ended = time.monotonic()
        alike = compare(place)
    print(f"lost at most {max(lost)} steps at a time; checkpoints are {INTERVAL} steps apart")
    took = f"{between - started:.0f} s undisturbed, {ended - between:.0f} s with {len(lost)} kills"
    print(f"{took}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0 if alike and max(lost) <= INTERVAL else 1


def disturb(place: Path, rng: random.Random, victims: list[str], workers_after: int) -> list[int]:
    """Train to the end, killing on the way; returns how many steps had to be taken again after each kill."""
    run, lost, stretch = start(place, "disturbed"), list[int](), STEPS // len(victims)
    workers = CONFIG.train.num_workers
    for number, victim in enumerate(rng.sample(victims, len(victims))):
        wanted, rank = number * stretch + rng.randint(2, stretch - 2), rng.randrange(CONFIG.train.num_workers)
        before = wait_for(lambda: last_process(place), lambda steps, least=wanted: steps[-1].step >= least, run)
        if victim == "reader":
            reader = kill_reader(run)
            print(f"reader {reader} killed after step {before[-1].step}", flush=True)
            continue
        if victim == "worker":
            rank = min(rank, workers - 1)
            os.kill(noted(place, "disturbed", rank)[-1].process, signal.SIGKILL)
        else:
            end_with_all_below(run)
            workers = workers_after
            run = start(place, "disturbed", "--resume", "--set", f"train.num_workers={workers}")
        after = wait_for(lambda: last_process(place), lambda steps, old=before: steps[0].process != old[0].process, run)
        reached = max(step.step for step in noted(place, "disturbed") if step.process == before[0].process)
        lost.append(reached + 1 - after[0].step)
        who = f"worker {rank}" if victim == "worker" else "the driver"
        print(f"{who} killed after step {reached}: went on at step {after[0].step}, {lost[-1]} steps lost", flush=True)
    assert run.wait(_LONGEST_SECONDS) == 0
    return lost


def kill_reader(run: subprocess.Popen[bytes]) -> int:
    """SIGKILL to a process that reads for a worker just now; its number."""
    deadline = time.monotonic() + _LONGEST_SECONDS
    while time.monotonic() < deadline:
        for process, command in below(run.pid).items():
            if command.startswith("ray::") and "MapBatches" in command:
                os.kill(process, signal.SIGKILL)
                return process
    raise RuntimeError("no reader was found")


def compare(place: Path) -> bool:
    """Print how far apart the two runs are, at every step that was taken and at the end; whether they are alike."""
    calm = {step.step: step.loss for step in noted(place, "whole")}
    steps = noted(place, "disturbed")
    apart = max(abs(step.loss - calm[step.step]) for step in steps)
    twice = len(steps) - len({step.step for step in steps})
    print(f"loss at {len(calm)} steps, {twice} of them taken again: differs by at most {apart:.1e}")
    figures = [final_validation(place / name) for name in ("whole", "disturbed")]
    for name, value in figures[0].items():
        print(f"{name} at the end: {figures[1][name]:.6f}, undisturbed {value:.6f}")
    return apart <= 1e-6 and figures[0] == figures[1] and {step.step for step in steps} == set(calm)


def final_validation(model: Path) -> dict[str, float]:
    rows = [row for row in read_log(str(model)) if row["step"] == STEPS and "valid_ndcg@10" in row]
    return {name: value for name, value in rows[-1].items() if name.startswith("valid_")}


def wait_for(
    found: Callable[[], list[Step]], enough: Callable[[list[Step]], bool], run: subprocess.Popen[bytes]
) -> list[Step]:
    """What is found once it is enough; `run` must be alive until then."""
    deadline = time.monotonic() + _LONGEST_SECONDS
    while not ((steps := found()) and enough(steps)):
        if run.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"training ended with {run.poll()} or stood still, at {steps[-1:]}")
        time.sleep(0.01)
    return steps


def last_process(place: Path) -> list[Step]:
    """The steps of the process that is the first worker of the disturbed run, or was it last."""
    steps = noted(place, "disturbed")
    return [step for step in steps if step.process == steps[-1].process]


def noted(place: Path, out: str, rank: int = 0) -> list[Step]:
    """All steps that the workers of a rank took, in the order they took them."""
    file = place / f"{out}-steps-{rank}"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [Step(*json.loads(line)) for line in lines if line.endswith("\n")]


def end_with_all_below(run: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver; what it had started, Ray's node and workers, ends by itself or is killed after a while."""
    orphans = list(below(run.pid))
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while (alive := [pid for pid in orphans if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start(place: Path, what: str, *more: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "benchmarks.faults.train_kill", "run", str(place), what, *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=(place / f"{what}.log").open("ab"))


def run_command(place: Path, what: str, more: list[str]) -> int:
    """`pixrec prepare`, or `pixrec train` of the model `what` whose workers note their steps."""
    options = [f"--config={place / ('disturbed' if what == 'disturbed' else 'config')}.yaml", *more]
    if what == "prepare":
        tables = [f"--{name}={place / 'catalog' / name}.parquet" for name in ("items", "interactions")]
        return cli.main(["prepare", *tables, f"--out={place / 'data'}", *options])
    from pixrec.cluster import train

    train._worker = noting(place / f"{what}-steps")
    return cli.main(["train", f"--data={place / 'data'}", f"--out={place / what}", *options])


def noting(file: Path) -> Callable[[dict[str, Any]], None]:
    """The work of a worker that appends a line to `<file>-<rank>` after each step."""

    def work(job: dict[str, Any]) -> None:  # defined in here, so that it reaches the workers whole
        from pixrec.cluster import train
        from pixrec.training import phases

        class Noting(phases.InterleavedTrainer):
            def train_step(self) -> dict[str, float]:
                row = super().train_step()
                with open(f"{file}-{self.rank}", "a") as notes:
                    notes.write(json.dumps([os.getpid(), self.step, row["loss"]]) + "\n")
                return row

        phases.InterleavedTrainer = Noting
        train._worker(job)

    return work


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        sys.exit(run_command(Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.train_kill")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--feed", choices=("local", "ray_data"), default="local")
    parser.add_argument("--workers-after", type=int, default=1, help="workers after the death of the driver")
    chosen = parser.parse_args()
    sys.exit(main(chosen.seed, chosen.feed, chosen.workers_after))
