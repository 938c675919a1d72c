"""Ticks and curves of the report's plots."""

import pytest

from pixrec.report.plots import curves, round_ticks, trainings


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0), (0, 0.62), (-0.03, 0.2), (1.9, 7.3), (2, 2), (0, 3e-4), (-5, 0)]
)
def test_ticks_cover_the_values_with_round_numbers(low, high):
    ticks = round_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 7
    assert len({f"{tick:g}" for tick in ticks}) == len(ticks)


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
