"""The page: self-contained, escaped, and saying what metrics.json says."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pixrec.config import EvaluateConfig
from pixrec.data.items import ItemTable
from pixrec.data.sequences import HeldOut
from pixrec.evaluation import evaluate_scorers
from pixrec.report import Example, choose_examples, choose_grids, format_table, notes, write_report
from pixrec.report.plots import curves, round_ticks, trainings
from pixrec.report.words import guard_sentences, meaning, metric_name, probability, protocol_sentences, warnings
from pixrec.scorers import Scorer, Users

MALICIOUS = '"><script src="https://evil.example/x.js"></script><img src=https://evil.example onerror=alert(1)>'


class Rising(Scorer):
    def __init__(self, name: str) -> None:
        self.name = name

    def scores(self, users: Users) -> torch.Tensor:
        return torch.arange(4.0).expand(len(users.histories), -1)


HELD_OUT = HeldOut(["u0", "<u1>"], [np.array([3, 0]), np.array([1])], np.array([2, 3]))


def png() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def items() -> ItemTable:
    return ItemTable(
        pa.table(
            {
                "item_id": ["a", "b", "c", "d"],
                "title": ["A lamp", MALICIOUS, None, "A chair"],
                "image": pa.array([png(), None, b"no picture", png()], pa.binary()),
                "image_status": ["ok", "missing", "ok", "ok"],
            }
        )
    )


class Falling(Rising):
    def scores(self, users: Users) -> torch.Tensor:
        return -super().scores(users)


SCORERS = (Rising("pixrec"), Rising("popularity"))


def evaluation(held_out: HeldOut = HELD_OUT, scorers=SCORERS, **config):
    config = EvaluateConfig(**{"bootstrap_samples": 20} | config)
    counts = np.array([1, 1, 0, 2])
    return evaluate_scorers(scorers, held_out, config, training_counts=counts, with_image=np.ones(4, bool))


@pytest.fixture
def metrics() -> dict:
    return evaluation().metrics_json("leave_one_out")


def page(tmp_path, metrics, items, **extra) -> str:
    write_report(str(tmp_path), metrics, title="Lamps & chairs", items=items, **extra)
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


def full_page(tmp_path, metrics, items) -> str:
    return page(
        tmp_path,
        metrics,
        items,
        examples=[
            *choose_examples(Rising("pixrec"), HELD_OUT, EvaluateConfig(), k=2),
            Example("u2", [1, 2], 0, [1, 2]),
        ],
        training_log=[
            {"part": "text", "step": 1, "loss": 1.0},
            *({"part": "both", "step": s, "loss": 1.0, "loss_nig": 2.0, "loss_ut": 3 / s} for s in (1, 2)),
            {"part": "both", "step": 2, "valid_ndcg@10": 0.25},
            {"part": "both", "step": 3, "loss_nig": float("nan")},
            {"part": "both_compact", "step": 1, "loss": 2.0},
        ],
        grids=choose_grids(Rising("pixrec"), evaluation()),
        notes=["A <b>note</b>."],
        ceiling={"name": "oracle", "recall@10": 0.9},
    )


def test_a_malicious_title_stays_text_and_nothing_is_loaded(tmp_path, metrics, items):
    html = full_page(tmp_path, metrics, items)
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


def test_the_page_says_what_the_numbers_say(tmp_path, metrics, items):
    html = full_page(tmp_path, metrics, items)
    for text in ("Lamps &amp; chairs", "Hit at rank 2", "Hit at rank 1", "Miss: not in the first 2", "oracle 0.9000"):
        assert text in html
    for text in (
        "The compact user tower",
        "The knockout trained on text alone",
        "User against item",
        "0.25",
        "Split: leave one out",
        "of 4 items",
        "Ties count against",
        "100.0\N{NO-BREAK SPACE}%",
    ):
        assert text in html
    assert f"{metrics['results']['pixrec']['mrr']:.4f}" in html
    assert html.count("data:image/jpeg;base64,")


def test_pictures_are_encoded_again_or_left_out(tmp_path, metrics, items):
    examples = choose_examples(Rising("pixrec"), HELD_OUT, EvaluateConfig(), k=2)
    html = page(tmp_path, metrics, items, examples=[*examples, Example("u2", [1, 2], 0, [1, 2])])
    assert html.count("data:image/jpeg;base64,") == 2 * 2 + 1 + 1  # pictures of a and d; c's bytes are no picture


def test_a_bare_metrics_json_is_enough(tmp_path, metrics, items):
    bare = {key: metrics[key] for key in ("protocol", "users", "results")}
    html = page(tmp_path, bare, items)
    assert "Training" not in html
    assert "Users drawn at random" not in html


def test_examples_follow_the_setting_for_seen_items():
    allowed = choose_examples(Rising("pixrec"), HELD_OUT, EvaluateConfig(), k=3)
    filtered = choose_examples(Rising("pixrec"), HELD_OUT, EvaluateConfig(seen="filtered"), k=3)
    assert [e.recommended for e in allowed] == [[3, 2, 1], [3, 2, 1]]
    assert [e.recommended for e in filtered] == [[2, 1], [3, 2, 0]]
    assert choose_examples(Rising("pixrec"), HELD_OUT, EvaluateConfig(report_histories=0)) == []


def test_table_for_the_terminal(metrics):
    *lines, cold = format_table(metrics).splitlines()
    assert cold == (
        "Recall@10 of 1 cold targets: pixrec 1.0000 (1.0000 to 1.0000), popularity 1.0000 (1.0000 to 1.0000)"
    )
    metrics["buckets"]["target_cold"] |= {"users": 0, "results": {}}
    assert format_table(metrics).splitlines() == lines
    assert [line.split()[0] for line in lines[2:]] == ["pixrec", "popularity"]
    assert "1.0000 to 1.0000" in lines[2]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0), (0, 0.62), (-0.03, 0.2), (1.9, 7.3), (2, 2), (0, 3e-4), (-5, 0)]
)
def test_ticks_cover_the_values_with_round_numbers(low, high):
    ticks = round_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 7
    assert len({f"{tick:g}" for tick in ticks}) == len(ticks)


MANY = HeldOut([f"u{i}" for i in range(6)], [np.array([1])] * 6, np.array([3, 2, 1, 0, 3, 2]))


def test_grids_show_the_best_the_worst_and_the_cold():
    rising = Rising("pixrec")
    grids = {grid.title: grid for grid in choose_grids(rising, evaluation(MANY, report_cases=2), k=1)}
    assert set(grids) == {"Best cases", "Worst cases", "Cold items"}
    assert [e.rank for e in grids["Best cases"].examples] == [1, 1]
    assert [e.rank for e in grids["Worst cases"].examples] == [4, 3]
    assert {e.target for e in grids["Cold items"].examples} == {2}
    assert all(e.recommended == [3] for grid in grids.values() for e in grid.examples)
    assert choose_grids(rising, evaluation(MANY, report_cases=0)) == []


def test_what_text_alone_gets_wrong_is_shown_with_both_ranks(monkeypatch):
    monkeypatch.setattr("pixrec.report.pictures.HIT_RANK", 1)
    scorers = [Rising("pixrec"), Falling("pixrec_text_only")]
    grids = choose_grids(scorers[0], evaluation(MANY, scorers))
    assert grids[-1].title == "What text alone gets wrong"
    assert {(e.user_id, e.rank, e.note) for e in grids[-1].examples} == {
        ("u0", 1, "text alone: rank 4"),
        ("u4", 1, "text alone: rank 4"),
    }


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


def test_warnings():
    assert warnings({}) == []
    checked = {"data": "/a/boxes", "checked": True, "training_events": 1234, "training_windows_checked": 77}
    elsewhere = [
        {"stage": "joint", "data": None, "checked": False, "reason": "model.json does not say where it lay"},
        {"stage": "", **checked, "events_after_test_start": 5},
        {"stage": "joint", **checked, "events_after_test_start": 0},
    ]
    told = warnings({"guards": {"below_popularity": ["pixrec"], "audit": {"elsewhere": elsewhere}}})
    assert told == [
        "Below popularity in Recall@10: pixrec.",
        "The model was trained in a stage joint on the data set of unknown place, which could not be audited "
        "(model.json does not say where it lay): it may have seen events of this test there.",
        "The model was trained on another data set, boxes, with 5 events of the test period: none of this test, but of "
        "its time.",
    ]


def test_names_and_probabilities():
    named = [metric_name(m) for m in ("recall@10", "ndcg@10", "mrr", "map@5", "coverage@1")]
    assert named == ["Recall@10", "NDCG@10", "MRR", "MAP@5", "Coverage@1"]
    assert [probability(p) for p in (0.001, 0.01, 0.5, 1.0)] == ["p < .01", "p = .01", "p = .50", "p = 1.00"]


def test_a_loss_without_parts_is_drawn():
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert [curve["name"] for curve in curves(log)] == ["Training loss"]
    assert [curve["name"] for curve in curves([{**row, "loss_ut": 1.0} for row in log])] == ["User against item"]


def test_every_part_of_a_training_is_drawn_the_models_own_first():
    parts = ["text_joint", "text", "text_compact", "both_joint", "both", "both_compact", "both_compact_joint"]
    log = [{"part": part, "step": step, "loss": 1.0} for part in parts for step in (1, 2)]
    own, text = trainings([*log, {"part": "text_empty", "step": 1}, log[-1]])
    assert (own["knockout"], text["knockout"]) == (None, "text")
    names = ["The towers, stage joint", "The towers", "The compact user tower", "Both towers together"]
    assert [stage["name"] for stage in own["stages"]] == names
    assert [stage["name"] for stage in text["stages"]] == names[:3]
    assert trainings([]) == []


def test_a_scorer_is_told_by_what_it_is_made_of():
    settings = {"evaluate": {"fused": ["sasrec", "popularity"], "max_users": 5}}
    metrics = {"knockouts": {"pixrec_text_only": "trained"}, "predictions": {"scorer": "mine"}, "settings": settings}
    told = {name: meaning(name, metrics) for name in ("pixrec_text_only", "mine", "rrf", "round_robin", "unheard")}
    assert told == {
        "pixrec_text_only": "the same, trained on text alone",
        "mine": "ranked lists read from a file",
        "rrf": "sasrec and popularity by reciprocal rank",
        "round_robin": "sasrec and popularity taking turns",
        "unheard": "",
    }
    assert meaning("rrf", {}) == "two scorers by reciprocal rank"


def test_a_sample_and_timestamps_without_time_are_told(metrics):
    plain = [*protocol_sentences(metrics), *guard_sentences(metrics)]
    assert not any("max_users" in sentence or "no clock" in sentence for sentence in plain)
    metrics["settings"] = {"evaluate": {"max_users": 2}}
    metrics["guards"]["timestamps_tell_time"] = False
    metrics["results"]["recent_popularity"] = metrics["results"]["popularity"]
    metrics["protocol"]["split"] = "temporal"
    assert "Users: 2, drawn at random where there are more (evaluate.max_users)." in protocol_sentences(metrics)
    assert any("no clock" in sentence for sentence in guard_sentences(metrics))
    assert any("The split is by time, but" in sentence for sentence in warnings(metrics))
