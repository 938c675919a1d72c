"""The demo's table and pictures come from one run: `python -m benchmarks.figures`, without a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from benchmarks import figures
from pixrec.errors import InputError

ROOT = Path(__file__).parents[2]
CARD = '<section class="card example"><span class="verdict {}-text">{}</span></section>'


def result(r1: float, r10: float) -> dict[str, Any]:
    return {"recall@1": r1, "recall@10": r10, "ci95": {"recall@1": [r1, r1 + 0.01], "recall@10": [r10, r10 + 0.02]}}


METRICS: dict[str, Any] = {
    "protocol": {"split": "leave_one_out", "seen": "allowed"},
    "users": 2500,
    "items": 600,
    "results": {"pixrec": result(0.09, 0.638), "popularity": result(0.0, 0.026)},
    "knockouts": {},
    "guards": {
        "tie_share": {"pixrec": 0.0, "popularity": 0.4},
        "random_ties": {"pixrec": result(0.09, 0.638), "popularity": result(0.003, 0.03)},
    },
    "ceiling": {"name": "best possible scorer", **result(0.2, 0.69), "text_only": result(0.02, 0.2)},
    "provenance": {
        "pixrec": "0.1.0",
        "model_fingerprint": "70e8c64240c83e7c",
        "data_fingerprint": "b6632b6f86174e69",
        "index_version": "20261128T115459787864-70e8c642",
    },
}
PAGE = (
    "<head></head><main><h2>Best cases</h2>"
    + CARD.format("hit", "best")
    + f"<h2>{figures.RANDOM_USERS}</h2>"
    + CARD.format("miss", "first miss")
    + CARD.format("miss", "second miss")
    + CARD.format("hit", "first hit")
    + "</main>"
)


def draw(page: str, run: Path) -> Image.Image:
    picture = Image.new("RGB", (figures.WIDTH_PX, figures.TALL_PX), "white")
    ImageDraw.Draw(picture).rectangle((100, 50, 899, 449), fill="teal")
    return picture


@pytest.fixture
def run(tmp_path: Path) -> Path:
    report = tmp_path / "run" / "report"
    report.mkdir(parents=True)
    (report / "metrics.json").write_text(json.dumps(METRICS))
    (report / "index.html").write_text(PAGE)
    return tmp_path / "run"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "docs").mkdir(parents=True)
    (tmp_path / "root" / "README.md").write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    return tmp_path / "root"


def test_table_and_pictures_name_the_same_run(run: Path, root: Path) -> None:
    assert figures.main([str(run)], root, draw) == 0
    text = (root / "README.md").read_text()
    stamp = "run of 2026-11-28, model 70e8c642, data b6632b6f, PixRec 0.1.0"
    assert re.fullmatch(r"before\n.*\nafter\n", text, re.DOTALL)
    assert "old" not in text
    assert figures.stamp_in(text) == stamp
    assert figures.picture_stamp(root / figures.REPORT_PICTURE) == stamp
    assert figures.picture_stamp(root / figures.HISTORIES_PICTURE) == stamp
    with Image.open(root / figures.HISTORIES_PICTURE) as histories:
        assert histories.size == (820, 420)  # trimmed to what is drawn, and a margin


def test_the_table_has_a_row_for_each_scorer_and_both_ways_of_breaking_ties() -> None:
    rows = figures.table(METRICS).splitlines()[4:]
    assert rows == [
        "| best possible scorer | | | .200 [.200, .210] | .690 [.690, .710] |",
        "| best possible from text alone | | | .020 [.020, .030] | .200 [.200, .220] |",
        "| `pixrec`: pictures and text | .090 [.090, .100] | .638 [.638, .658] | the same | the same |",
        "| `popularity`: the best-sellers list, the same for everybody | .000 [.000, .010] | .026 [.026, .046] | "
        ".003 [.003, .013] | .030 [.030, .050] |",
    ]


def test_the_picture_shows_a_hit_and_a_miss_that_were_drawn_at_random() -> None:
    page = figures.examples_page(PAGE)
    assert re.findall(r"-text\">([^<]+)<", page) == ["first hit", "first miss"]
    all_missed = PAGE.replace("hit-text", "miss-text")
    assert re.findall(r"-text\">([^<]+)<", figures.examples_page(all_missed)) == ["first miss", "second miss"]


def test_the_report_has_what_the_picture_is_cut_from() -> None:
    template = (ROOT / "pixrec" / "report" / "report.html").read_text()
    assert figures.RANDOM_USERS in template
    assert figures.EXAMPLE.search(template)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("run/report/metrics.json", None, "no such file"),
        ("run/report/metrics.json", json.dumps(METRICS | {"provenance": {}}), "does not name the run"),
        ("run/report/metrics.json", json.dumps({k: v for k, v in METRICS.items() if k != "ceiling"}), "ceiling"),
        ("run/report/index.html", "<main></main>", "fewer than two users"),
        ("root/README.md", "no markers\n", "README.md must hold"),
    ],
)
def test_one_line_says_what_is_missing_and_nothing_is_written(
    run: Path, root: Path, file: str, content: str | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = run.parent / file
    place.unlink() if content is None else place.write_text(content)
    before = (root / "README.md").read_text()
    assert figures.main([str(run)], root, draw) == 2
    line = capsys.readouterr().err
    assert told in line
    assert line.count("\n") == 1
    assert (root / "README.md").read_text() == before
    assert list((root / "docs").iterdir()) == []


def test_without_a_browser_the_line_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="apt-get install chromium"):
        figures.browser_screenshot("<main></main>", Path("run"))
