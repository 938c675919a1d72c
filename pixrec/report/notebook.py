"""The report outside of its page: its figures as rows, its table and picture grids inline in a notebook.

IPython is used where a notebook runs and is no dependency. The picture grids are read back from the page, so that a
report is shown wherever its folder lies.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from html import escape
from html.parser import HTMLParser
from typing import Any, overload

import pyarrow as pa

from pixrec.report.words import HEADLINE_METRICS, format_table, metric_name, number

_PICTURE_PX = 64
_CELL = "padding:2px 10px;text-align:right"


class ResultTable(Sequence[dict[str, Any]]):
    """The results, a row a scorer: `scorer`, then each metric with the ends of its 95 % interval, as `recall@10`,
    `recall@10_low` and `recall@10_high`; None where a metric has none. In the order of the report.

    A sequence of dicts that pyarrow, pandas and Polars take as a table, by the Arrow C stream protocol.
    """

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self._metrics = metrics
        results = metrics["results"]
        names = dict.fromkeys(name for result in results.values() for name in result if name != "ci95")
        self._rows = [{"scorer": scorer, **_row(names, result)} for scorer, result in results.items()]

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self._rows[at]

    def __len__(self) -> int:
        return len(self._rows)

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return pa.Table.from_pylist(self._rows).__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        return format_table(self._metrics)

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="{_CELL}">{escape(metric_name(m))}</th>' for m in HEADLINE_METRICS)
        rows = "".join(
            f'<tr><th style="text-align:left">{escape(row["scorer"])}</th>'
            + "".join(f'<td style="{_CELL}">{_figure(row, m)}</td>' for m in HEADLINE_METRICS)
            + "</tr>"
            for row in self._rows
        )
        return f'<table><tr><th style="text-align:left">scorer</th>{head}</tr>{rows}</table>'


def _row(names: Mapping[str, None], result: Mapping[str, Any]) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for name in names:
        row[name] = result.get(name)
        if name in result["ci95"]:
            row[f"{name}_low"], row[f"{name}_high"] = result["ci95"][name]
    return row


def _figure(row: Mapping[str, Any], metric: str) -> str:
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    return f"{number(row[metric])}<br><small>{number(low)} to {number(high)}</small>"


def show(table: ResultTable, page: str, place: str) -> None:
    """Show the table and the picture grids of `page` (HTML) in a notebook; elsewhere print the table and `place`."""
    if not _in_notebook():
        print(f"{table!r}\nreport: {place}")
        return
    from IPython.display import HTML, display

    display(HTML(f"{table._repr_html_()}{picture_grids(page)}<p>The whole report: {escape(place)}</p>"))


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # a notebook's kernel has imported it long before us
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def picture_grids(page: str) -> str:
    """The users of a report's page with their pictures, as HTML that needs no style sheet: viewers of notebooks drop
    those. A tick stands before the item that the user took next."""
    reader = _GridReader()
    reader.feed(page)
    return "".join(reader.parts)


class _GridReader(HTMLParser):
    """Keeps of a page the users (`section.example`) with the heading above them: headings, verdicts and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._heading = ""
        self._in_user = False
        self._collected: tuple[str, list[str]] | None = None  # the tag whose text is being read

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        classes = set(given.get("class", "").split())
        if tag == "section" and "example" in classes:
            self.parts += [f"<h4>{escape(self._heading)}</h4>" if self._heading else "", "<p>"]
            self._heading, self._in_user = "", True
        elif tag == "h2" or (self._in_user and (tag == "h3" or classes & {"verdict", "shelf-name", "no-picture"})):
            self._collected = (tag, [])
        elif self._in_user and tag == "figure" and "ring" in classes:
            self.parts.append("<b>✓</b>")
        elif self._in_user and tag == "img":
            title, source = escape(given["alt"]), escape(given["src"])
            self.parts.append(f'<img width="{_PICTURE_PX}" title="{title}" alt="{title}" src="{source}"> ')

    def handle_data(self, data: str) -> None:
        if self._collected:
            self._collected[1].append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._collected and self._collected[0] == tag:
            text, self._collected = " ".join("".join(self._collected[1]).split()), None
            if tag == "h2":
                self._heading = text
            else:
                self.parts.append(f"<b>{escape(text)}</b> " if tag == "h3" else f"{escape(text)}<br>")
        elif self._in_user and tag == "section":
            self.parts.append("</p>")
            self._in_user = False
