"""The demo's table and pictures in README.md, written anew from one finished run of `pixrec demo`.

    python -m benchmarks.figures demo-out

Reads `report/metrics.json` and `report/index.html` of the run. Replaces what stands in README.md between the two `demo`
markers, and the pictures docs/report.png (the top of the report) and docs/histories.jpg (a hit and a miss among the
users that the report draws at random). The table names the run by date and fingerprints, and both pictures carry the
same line as their comment, so that a test sees that they belong together. Either all three are written or none. Needs
Chromium for the pictures.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from pixrec import storage
from pixrec.errors import InputError, PixRecError
from pixrec.report.words import meaning

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo: begin; written by python -m benchmarks.figures -->", "<!-- demo: end -->"
REPORT_PICTURE, HISTORIES_PICTURE = Path("docs/report.png"), Path("docs/histories.jpg")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH_PX, REPORT_HEIGHT_PX, TALL_PX, MARGIN_PX = 1200, 1240, 3000, 10
BROWSER_SECONDS = 120
RANDOM_USERS = "Users drawn at random"
EXAMPLE = re.compile(r'<section class="card example">.*?</section>', re.DOTALL)
SPLITS = {"leave_one_out": "leave-one-out", "temporal": "split by time"}
Screenshot = Callable[[str, Path], Image.Image]


def main(argv: list[str] | None = None, root: Path = ROOT, screenshot: Screenshot | None = None) -> int:
    """Returns the exit code: 2, and one line on stderr, where something is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("run", type=Path, help="the --out of a finished `pixrec demo`")
    try:
        _write(parser.parse_args(argv).run, root, screenshot or browser_screenshot)
    except PixRecError as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    return 0


def _write(run: Path, root: Path, screenshot: Screenshot) -> None:
    metrics = storage.read_json(str(run / "report" / "metrics.json"), ("results", "guards", "ceiling", "provenance"))
    page = storage.read_text(str(run / "report" / "index.html"))
    readme = root / "README.md"
    stamp = stamp_of(metrics)
    text = with_table(readme.read_text(), table(metrics))
    top = screenshot(page, run).crop((0, 0, WIDTH_PX, REPORT_HEIGHT_PX))
    examples = trimmed(screenshot(examples_page(page), run))
    png, jpeg, comment = io.BytesIO(), io.BytesIO(), PngInfo()
    comment.add_text("Comment", stamp)
    top.quantize(128).save(png, "PNG", optimize=True, pnginfo=comment)  # flat colours and text: a third of the bytes
    examples.save(jpeg, "JPEG", quality=88, optimize=True, comment=stamp)
    (root / REPORT_PICTURE).write_bytes(png.getvalue())
    (root / HISTORIES_PICTURE).write_bytes(jpeg.getvalue())
    readme.write_text(text)
    print(f"README.md, {REPORT_PICTURE} and {HISTORIES_PICTURE}: {stamp}")


def stamp_of(metrics: Mapping[str, Any]) -> str:
    """Which run it was, in one line."""
    found = metrics["provenance"]
    try:
        day, model, data = (found[key] for key in ("index_version", "model_fingerprint", "data_fingerprint"))
        date = f"{day[:4]}-{day[4:6]}-{day[6:8]}"
        return f"run of {date}, model {model[:8]}, data {data[:8]}, PixRec {found['pixrec']}"
    except (KeyError, TypeError):
        raise InputError("metrics.json does not name the run's index, model and data; run pixrec demo again") from None


def stamp_in(text: str) -> str | None:
    """The run that a text names; None where it names none."""
    found = re.search(r"run of \d{4}-\d\d-\d\d, model \w+, data \w+, PixRec [\w.]*\w", text)
    return found and found[0]


def picture_stamp(file: Path) -> str | None:
    """The run that a picture is of; None where it does not say."""
    with Image.open(file) as picture:
        comment = picture.info.get("Comment") or picture.info.get("comment") or ""
    return stamp_in(comment.decode() if isinstance(comment, bytes) else comment)


def table(metrics: Mapping[str, Any]) -> str:
    """The results as Markdown: Recall@1 and @10 with 95 % intervals, ties ranked pessimistically and broken at random.

    Raises InputError where metrics.json is not that of a demo.
    """
    try:
        split, seen = SPLITS[metrics["protocol"]["split"]], metrics["protocol"]["seen"]
        ceiling, results = metrics["ceiling"], metrics["results"]
        lines = [
            f"Synthetic shop of {metrics['items']:,} items, {metrics['users']:,} shoppers, {split}, all items as "
            f"candidates, items already seen {seen}. 95 % intervals by bootstrap over users. From one "
            f"{stamp_of(metrics)}.",
            "",
            "| scorer | R@1 | R@10 | R@1, ties at random | R@10, ties at random |",
            "|---|---|---|---|---|",
            f"| {ceiling['name']} | | | {_figure(ceiling, 1)} | {_figure(ceiling, 10)} |",
            "| best possible from text alone | | | "
            f"{_figure(ceiling['text_only'], 1)} | {_figure(ceiling['text_only'], 10)} |",
        ]
        for scorer, result in results.items():
            described = f"`{scorer}`" + (f": {meaning(scorer, metrics)}" if meaning(scorer, metrics) else "")
            at_random, tied = metrics["guards"]["random_ties"][scorer], metrics["guards"]["tie_share"][scorer] > 0
            cells = [_figure(at_random, k) if tied else "the same" for k in (1, 10)]
            lines.append(f"| {described} | {_figure(result, 1)} | {_figure(result, 10)} | {' | '.join(cells)} |")
    except KeyError as error:
        raise InputError(f"metrics.json says nothing of {error}; is it that of a pixrec demo?") from None
    return "\n".join(lines)


def _figure(result: Mapping[str, Any], k: int) -> str:
    """`.638 [.619, .657]`"""
    values = (result[f"recall@{k}"], *result["ci95"][f"recall@{k}"])
    mean, low, high = (f"{value:.3f}".removeprefix("0") for value in values)
    return f"{mean} [{low}, {high}]"


def with_table(text: str, table: str) -> str:
    """`text` with `table` between its markers. Raises InputError unless both stand there once and in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise InputError(f"README.md must hold the lines {BEGIN!r} and {END!r} once each")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def examples_page(page: str) -> str:
    """The report's page with nothing in it but the first hit and the first miss of the users drawn at random, or its
    first two users where all of them are hits or all misses. Raises InputError where there are not two.
    """
    head, body, _ = page.partition("<main>")
    found = EXAMPLE.findall(page[page.find(RANDOM_USERS) :]) if RANDOM_USERS in page else []
    if not body or len(found) < 2:
        raise InputError("the report shows fewer than two users drawn at random; set evaluate.report_histories")
    first_of_each = [next((card for card in found if verdict in card), "") for verdict in ("hit-text", "miss-text")]
    return f"{head}<main>{''.join(first_of_each if all(first_of_each) else found[:2])}</main></body></html>"


def trimmed(picture: Image.Image) -> Image.Image:
    """Without the empty paper around it, but for a margin. Raises InputError where there is nothing else."""
    paper = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    box = ImageChops.difference(picture, paper).getbbox()
    if box is None:
        raise InputError("the browser drew an empty page")
    low, high = (max(0, edge - MARGIN_PX) for edge in box[:2])
    right, bottom = (min(size, edge + MARGIN_PX) for size, edge in zip(picture.size, box[2:], strict=True))
    return picture.crop((low, high, right, bottom))


def browser_screenshot(page: str, run: Path) -> Image.Image:
    """The upper TALL_PX of a page, as Chromium draws it. Raises InputError where there is no Chromium."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise InputError("no Chromium to draw the pictures with: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="pixrec-figures-") as folder:
        file, drawn = Path(folder, "page.html"), Path(folder, "page.png")
        file.write_text(page)
        # A browser that runs as root has no sandbox. The page is our own and has no script.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [
            browser, "--headless", *sandbox, "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH_PX},{TALL_PX}", f"--screenshot={drawn}", file.as_uri(),
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=BROWSER_SECONDS)
            return Image.open(drawn).convert("RGB")
        except (subprocess.SubprocessError, OSError) as error:
            raise InputError(f"{browser} could not draw the report of {run}: {type(error).__name__}") from None


if __name__ == "__main__":
    sys.exit(main())
