"""Intervals and p-values by their properties and by what theory gives."""

import math

import numpy as np
import pytest

from pixrec.evaluation import significance
from pixrec.evaluation.significance import bootstrap_ci, holm, paired_difference_ci, randomisation_p

NAN = float("nan")


def test_interval_contains_the_mean_and_shrinks_with_users():
    rng = np.random.default_rng(2)
    widths = []
    for users in (50, 500, 5000):
        values = rng.random(users) < 0.3
        low, high = bootstrap_ci(values, 1000, seed=0)
        assert low < values.mean() < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_interval_has_the_width_theory_gives():
    values = np.random.default_rng(3).normal(size=500)
    low, high = bootstrap_ci(values, 2000, seed=1)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(500), rel=0.1)


def test_interval_is_reproducible_in_any_blocks(monkeypatch):
    values = np.random.default_rng(4).normal(size=100)
    whole = bootstrap_ci(values, 200, seed=5)
    monkeypatch.setattr("pixrec.evaluation.significance.RESAMPLE_BLOCK", 700)
    assert bootstrap_ci(values, 200, seed=5) == pytest.approx(whole)
    assert bootstrap_ci(values, 200, seed=6) != pytest.approx(whole)


def test_interval_of_one_value_is_that_value():
    assert bootstrap_ci([0.25]) == (0.25, 0.25)


@pytest.mark.parametrize(("values", "samples"), [([], 10), ([NAN], 10), ([1.0], 0)])
def test_interval_refuses(values, samples):
    with pytest.raises(ValueError, match=r"values|samples"):
        bootstrap_ci(values, samples)


def test_pairing_takes_out_what_users_share():
    rng = np.random.default_rng(6)
    shared = rng.normal(size=400)
    a, b = shared + 0.1 + 0.01 * rng.normal(size=400), shared
    low, high = paired_difference_ci(a, b)
    assert 0.09 < low < 0.1 < high < 0.11
    with pytest.raises(ValueError, match="same users"):
        paired_difference_ci(a, b[:-1])


def test_many_distinct_values_are_grouped_without_harm(monkeypatch):
    values = np.random.default_rng(7).exponential(size=3000)
    whole = bootstrap_ci(values, 4000, seed=1)
    monkeypatch.setattr(significance, "MAX_GROUPS", 300)
    low, high = bootstrap_ci(values, 4000, seed=1)
    width = whole[1] - whole[0]
    assert (low, high) == pytest.approx(whole, abs=0.05 * width)  # two draws of 4,000 differ by as much


def test_p_of_a_few_users_is_that_of_all_signs():
    """Five users, all for the first: of the 32 choices of signs two are as extreme."""
    p = randomisation_p(np.ones(5), np.zeros(5), 20_000, seed=0)
    assert p == pytest.approx(2 / 32, abs=0.006)


def test_p_is_small_for_a_difference_and_large_for_none():
    rng = np.random.default_rng(8)
    noise = rng.normal(size=(2, 500))
    assert randomisation_p(noise[0] + 0.3, noise[1]) < 0.01
    same = [randomisation_p(a, b, 200) for a, b in rng.normal(size=(100, 2, 60))]
    assert 0.35 < np.mean(same) < 0.65  # uniform where there is nothing
    assert randomisation_p(noise[0], noise[0]) == 1
    assert randomisation_p(np.ones(400), np.zeros(400), 99) == pytest.approx(1 / 100)


def test_p_does_not_depend_on_who_is_first():
    a, b = np.random.default_rng(9).random((2, 80))
    assert randomisation_p(a, b, 300) == randomisation_p(b, a, 300)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
