"""The page: self-contained, escaped, and saying what metrics.json says."""

import re
from html.parser import HTMLParser

import pytest

from pixrec.config import EvaluateConfig
from pixrec.report import Example, choose_examples, choose_grids, notes, write_report


def page(tmp_path, metrics, items, **extra) -> str:
    write_report(str(tmp_path), metrics, data_name="Lamps & chairs", items=items, **extra)
    return (tmp_path / "index.html").read_text()


class Audit(HTMLParser):
    """Every tag and every attribute that a browser would load something from."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        self.loads += [value for name, value in attrs if name.startswith("on")]
        if tag not in ("meta", "link", "img", "line", "rect", "circle", "polyline", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def full_page(tmp_path, metrics, items, rising, held_out, evaluation) -> str:
    return page(
        tmp_path,
        metrics,
        items,
        examples=[
            *choose_examples(rising, held_out, EvaluateConfig(), k=2),
            Example("u2", [1, 2], 0, [1, 2]),
        ],
        training_log=[
            {"part": "text", "step": 1, "loss": 1.0},
            *({"part": "both", "step": s, "loss": 1.0, "loss_nig": 2.0, "loss_ut": 3 / s} for s in (1, 2)),
            {"part": "both", "step": 2, "valid_ndcg@10": 0.25},
            {"part": "both", "step": 3, "loss_nig": float("nan")},
            {"part": "both_compact", "step": 1, "loss": 2.0},
        ],
        grids=choose_grids(rising, evaluation()),
        notes=["A <b>note</b>."],
        ceiling={"name": "oracle", "recall@10": 0.9},
    )


def test_a_malicious_title_stays_text_and_nothing_is_loaded(full_page):
    html = full_page
    audit = Audit()
    audit.feed(html)
    assert audit.open == []  # every tag is closed in order
    assert "script" not in audit.tags
    assert audit.loads
    assert all(value.startswith("data:") for value in audit.loads)
    assert "&lt;script src=" in html
    assert "&lt;u1&gt;" in html
    assert "A &lt;b&gt;note&lt;/b&gt;." in html
    assert not re.search(r"url\(|@import", html)
    assert "default-src 'none'" in html


def test_the_page_says_what_the_numbers_say(full_page, metrics):
    html = full_page
    for text in ("Lamps &amp; chairs", "Hit at rank 2", "Hit at rank 1", "Miss: not in the first 2", "oracle 0.9000"):
        assert text in html
    for text in (
        "The compact user tower",
        "The knockout trained on text alone",
        "User against item",
        "0.25",
        "Split: leave one out",
        "of 4 items",
        "Ties are ranked pessimistically",
        "PixRec on Lamps &amp; chairs",
        "Evaluated: pixrec · leave-one-out split · 2 users · 4 items",
        "top 10 for 100 of 100 shoppers; the best-sellers list manages 100.",
    ):
        assert text in html
    assert f"{metrics['results']['pixrec']['mrr']:.4f}" in html
    assert html.count("data:image/jpeg;base64,")


def test_pictures_are_encoded_again_or_left_out(tmp_path, metrics, items, rising, held_out):
    examples = choose_examples(rising, held_out, EvaluateConfig(), k=2)
    html = page(tmp_path, metrics, items, examples=[*examples, Example("u2", [1, 2], 0, [1, 2])])
    assert html.count("data:image/jpeg;base64,") == 2 * 2 + 1 + 1  # pictures of a and d; c's bytes are no picture


def test_a_bare_metrics_json_is_enough(tmp_path, metrics, items):
    bare = {key: metrics[key] for key in ("protocol", "users", "results")}
    html = page(tmp_path, bare, items)
    assert "Training" not in html
    assert "Users drawn at random" not in html


def test_the_page_tells_what_stands_beside_the_results(tmp_path, metrics, items):
    metrics["knockouts"] = {"pixrec_text_only": "trained", "pixrec_image_noise": "replaced"}
    metrics["guards"]["audit"] = {
        "leaks": 0,
        "training_events": 1234,
        "training_windows_checked": 77,
        "windows_of": {"the towers": 70, "sasrec": 7},
        "targets_checked": {"valid": 5, "test": 6},
        "elsewhere": [
            {"stage": "joint", "data": "/a/boxes", "checked": True, "training_events": 2345,
             "training_windows_checked": 78, "events_after_test_start": 0},
        ],
    }  # fmt: skip
    metrics["predictions"] = {
        "scorer": "mine", "users": 3, "users_missing": 4, "users_unknown": 5, "items_unknown": 6, "items_repeated": 7,
    }  # fmt: skip
    figures = {"mean": 0.25, "sd": 0.015625, "values": [0.2, 0.3]}
    metrics["seeds"] = {"runs": ["a", "b"], "results": {"pixrec": dict.fromkeys(metrics["results"]["pixrec"], figures)}}
    metrics["guards"]["held_out_items"] = 1357
    metrics["buckets"]["target_cold"]["users"] = 10
    html = page(tmp_path, metrics, items, notes=notes(metrics))
    assert "1,357 items were held out of training entirely" in html
    assert "p = 1.00" in html[html.index("Target occurs in no training history") :], (
        "of the two scorers, which are alike"
    )
    for text in (
        "none of the 6 test and 5 validation targets",
        "1,234 events or in one of 77 windows of training (the towers, sasrec)",
        "trained in a stage joint on the data set boxes; none of the 2,345 events and 78 windows there",
    ):
        assert text in html
    for text in ("of 2 runs", "0.2500 ± 0.0156", "4 users without a list", "7 repeats", "replaced by a constant"):
        assert text in html
    for text in ("Coverage@10", "Novelty@50", "MAP@5", "trained the same way"):
        assert text in html
