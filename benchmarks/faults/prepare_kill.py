"""Kills one preparation again and again, at random moments, and shows that its data set is that of an undisturbed one.

    python -m benchmarks.faults.prepare_kill [kills] [events]       (10 and 2000000)

Always SIGKILL; each time it is started again with the same arguments, and so it is after the last.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.speed.prepare import PIXREC, write_tables
from pixrec.cluster.prepare import check_counts
from pixrec.storage import read_json

KILLS, EVENTS = 10, 2_000_000


def main(kills: int, events: int) -> int:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="pixrec-kill-") as folder:
        place = Path(folder)
        write_tables(place, events)
        started = time.monotonic()
        assert start(place, "whole").wait() == 0
        seconds = time.monotonic() - started
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        killed = 0
        while killed < kills:
            run = start(place, "disturbed")
            try:
                run.wait(rng.uniform(0.3, 1.0) * seconds / 2)
                break  # done before its turn
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                killed += 1
        assert start(place, "disturbed").wait() == 0
        whole, disturbed = (contents(place / name / "data") for name in ("whole", "disturbed"))
        check_counts(read_json(str(place / "disturbed" / "data" / "dataset.json")))
    print(f"{killed} kills; the same {len(whole)} files: {whole == disturbed}; counts reconcile")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0 if whole == disturbed else 1


def start(place: Path, out: str) -> subprocess.Popen[bytes]:
    tables = [str(place / "items.parquet"), str(place / "events.parquet")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    (place / out).mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", PIXREC, *tables, str(place / out)], **quiet)


def contents(folder: Path) -> dict[str, str]:
    """Each published file and the hash of what is in it; of the picture store, which names files by chance, none."""
    return {
        str(file.relative_to(folder)): hashlib.blake2b(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "pictures" not in file.relative_to(folder).parts
    }


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:3]]
    sys.exit(main(*numbers, *(KILLS, EVENTS)[len(numbers) :]))
