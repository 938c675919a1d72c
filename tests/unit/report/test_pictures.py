"""Which users the report shows."""

import numpy as np
from fakes import FixedScorer

from pixrec.config import EvaluateConfig
from pixrec.data.sequences import HeldOut
from pixrec.report import choose_examples, choose_grids


def test_examples_follow_the_setting_for_seen_items(rising, held_out):
    allowed = choose_examples(rising, held_out, EvaluateConfig(), k=3)
    filtered = choose_examples(rising, held_out, EvaluateConfig(seen="filtered"), k=3)
    assert [e.recommended for e in allowed] == [[3, 2, 1], [3, 2, 1]]
    assert [e.recommended for e in filtered] == [[2, 1], [3, 2, 0]]
    assert choose_examples(rising, held_out, EvaluateConfig(report_histories=0)) == []


MANY = HeldOut([f"u{i}" for i in range(6)], [np.array([1])] * 6, np.array([3, 2, 1, 0, 3, 2]))


def test_grids_show_the_best_the_worst_and_the_cold(rising, evaluation):
    grids = {grid.title: grid for grid in choose_grids(rising, evaluation(MANY, report_cases=2), k=1)}
    assert set(grids) == {"Best cases", "Worst cases", "Cold items"}
    assert [e.rank for e in grids["Best cases"].examples] == [1, 1]
    assert [e.rank for e in grids["Worst cases"].examples] == [4, 3]
    assert {e.target for e in grids["Cold items"].examples} == {2}
    assert all(e.recommended == [3] for grid in grids.values() for e in grid.examples)
    assert choose_grids(rising, evaluation(MANY, report_cases=0)) == []


def test_cold_items_that_were_missed_are_shown_worst_first(monkeypatch, rising, evaluation):
    monkeypatch.setattr("pixrec.report.pictures.HIT_RANK", 1)
    missed = {grid.title: grid for grid in choose_grids(rising, evaluation(MANY))}["Cold items that were missed"]
    assert [(e.target, e.rank) for e in missed.examples] == [(2, 2), (2, 2)]


def test_what_text_alone_gets_wrong_is_shown_with_both_ranks(monkeypatch, rising, evaluation):
    monkeypatch.setattr("pixrec.report.pictures.HIT_RANK", 1)
    scorers = [rising, FixedScorer("pixrec_text_only", [3.0, 2.0, 1.0, 0.0])]
    grids = choose_grids(scorers[0], evaluation(MANY, scorers))
    assert grids[-1].title == "What text alone gets wrong"
    assert {(e.user_id, e.rank, e.note) for e in grids[-1].examples} == {
        ("u0", 1, "text alone: rank 4"),
        ("u4", 1, "text alone: rank 4"),
    }
