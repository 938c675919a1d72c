"""The report outside its page: rows to compute with, and HTML that a notebook shows without a style sheet."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from fakes import FixedScorer, tiny_items

from pixrec.config import EvaluateConfig
from pixrec.data.items import ItemTable
from pixrec.data.sequences import HeldOut
from pixrec.evaluation.protocol import evaluate_scorers
from pixrec.report import choose_examples, choose_grids, format_table, write_report
from pixrec.report.notebook import ResultTable, picture_grids, show

EVIL = '"><script src="https://evil.example/x.js"></script>'
HELD_OUT = HeldOut(["u0", "<u1>"], [np.array([3, 0]), np.array([1])], np.array([2, 3]))


def rising(name: str) -> FixedScorer:
    return FixedScorer(name, [0.0, 1.0, 2.0, 3.0])


@pytest.fixture(scope="module")
def items() -> ItemTable:
    table = tiny_items(4, with_pictures=[0, 1, 3])._table
    titles = pa.array(["A lamp", EVIL, "A hat", "A chair"])
    return ItemTable(table.set_column(table.schema.get_field_index("title"), "title", titles))


@pytest.fixture(scope="module")
def evaluation():
    scorers, config = (rising("pixrec"), rising("popularity")), EvaluateConfig(bootstrap_samples=10)
    counts = np.array([1, 0, 2, 0])
    return evaluate_scorers(scorers, HELD_OUT, config, training_counts=counts, with_image=np.ones(4, bool))


@pytest.fixture(scope="module")
def metrics(evaluation) -> dict:
    return evaluation.metrics_json("leave_one_out")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, evaluation, metrics: dict, items: ItemTable) -> str:
    folder, scorer = tmp_path_factory.mktemp("report"), rising("pixrec")
    examples = choose_examples(scorer, HELD_OUT, evaluation.config)
    grids = choose_grids(scorer, evaluation)
    write_report(str(folder), metrics, data_name="A shop", items=items, examples=examples, grids=grids)
    return (folder / "index.html").read_text()


def test_the_table_is_rows_with_their_intervals(metrics: dict):
    table = ResultTable(metrics)
    assert [row["scorer"] for row in table] == ["pixrec", "popularity"]
    first, told = table[0], metrics["results"]["pixrec"]
    assert first["recall@10"] == told["recall@10"]
    assert [first["recall@10_low"], first["recall@10_high"]] == told["ci95"]["recall@10"]
    assert "coverage@10" in first
    assert "coverage@10_low" not in first, "it has no interval"
    assert len({tuple(row) for row in table}) == 1
    assert table[:1] == [first]


def test_others_take_it_as_a_table(metrics: dict):
    table = ResultTable(metrics)
    assert pa.table(table).to_pylist() == list(table)
    frame = pd.DataFrame.from_arrow(table)
    assert list(frame.columns) == list(table[0])
    assert frame.set_index("scorer").loc["pixrec", "mrr"] == table[0]["mrr"]


def test_it_prints_as_the_command_does_and_shows_as_a_table(metrics: dict):
    table = ResultTable(metrics)
    assert repr(table) == format_table(metrics)
    html = table._repr_html_()
    assert html.count("<tr>") == 3
    assert f"{metrics['results']['pixrec']['mrr']:.4f}" in html
    evil = ResultTable({**metrics, "results": {EVIL: metrics["results"]["pixrec"]}})
    assert "<script" not in evil._repr_html_()


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_grids_hold_every_user_of_the_page_and_every_picture(page: str):
    grids, shown = picture_grids(page), Tags()
    shown.feed(grids)
    pictures = [given["src"] or "" for tag, given in shown.tags if tag == "img"]
    assert pictures == re.findall(r'src="(data:image/jpeg[^"]+)"', page)
    assert len(pictures) > 10
    headings = re.findall(r"<h4>(.*?)</h4>", grids)
    assert headings[:2] == ["Best cases", "Worst cases"]
    assert headings[-1] == "Users drawn at random"
    assert grids.count("&lt;u1&gt;") == page.count("&lt;u1&gt;")
    assert "Recommended" in grids
    assert "A hat" in grids, "an item without a picture is named"


def test_the_next_item_is_marked(page: str):
    ringed = len(re.findall(r'<figure class="item ring"', page))
    assert picture_grids(page).count("✓") == ringed > 0


def test_nothing_of_a_catalog_becomes_markup(page: str):
    shown = Tags()
    shown.feed(picture_grids(page))
    assert {tag for tag, _ in shown.tags} <= {"h4", "p", "b", "br", "img"}
    assert {name for _, given in shown.tags for name in given} <= {"src", "width", "title", "alt"}


def test_a_page_without_users_has_no_grids():
    assert picture_grids("<h2>How this was measured</h2><img src='x'>") == ""


def test_show_prints_where_there_is_no_notebook(metrics: dict, page: str, capsys: pytest.CaptureFixture[str]):
    show(ResultTable(metrics), page, "out/report/index.html")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scorer")
    assert lines[-1] == "report: out/report/index.html"


def test_show_displays_in_a_notebook(
    metrics: dict, page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shown: list[str] = []
    display = SimpleNamespace(HTML=lambda html: html, display=shown.append)
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()), display=display)
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    show(ResultTable(metrics), page, str(Path("out") / "index.html"))
    (html,) = shown
    assert html.startswith("<table>")
    assert "Best cases" in html
    assert "out/index.html" in html
    assert capsys.readouterr().out == ""
