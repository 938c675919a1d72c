"""What the ranks amount to, worked out by hand."""

import json

import numpy as np
import pytest
from fakes import FixedScorer
from six_items import FALLING, FLAT, evaluate

from pixrec.config import EvaluateConfig
from pixrec.data.sequences import HeldOut
from pixrec.evaluation import evaluate_scorers

LISTS = ("coverage", "novelty")


def test_metrics_json_has_the_promised_shape():
    metrics = evaluate().metrics_json("temporal")
    assert metrics["protocol"] == {"split": "temporal", "candidates": "all", "ties": "pessimistic", "seen": "allowed"}
    assert metrics["users"] == 4
    result = metrics["results"]["pixrec"]
    assert {k: result[k] for k in ("recall@1", "recall@2", "recall@10", "mrr")} == pytest.approx(
        {"recall@1": 1 / 4, "recall@2": 1 / 4, "recall@10": 1, "mrr": (1 / 3 + 1 / 6 + 1 + 1 / 4) / 4}
    )
    lists = {f"{name}@{k}" for name in ("coverage", "novelty") for k in (1, 2, 10)}
    assert set(result["ci95"]) == set(result) - {"ci95"} - lists
    assert set(result) >= {f"{name}@{k}" for name in ("recall", "ndcg", "mrr", "map") for k in (1, 2, 10)} | lists
    for metric, (low, high) in result["ci95"].items():
        assert low <= result[metric] <= high
    assert json.loads(json.dumps(metrics)) == metrics  # plain numbers only


def test_seen_filtered_swaps_the_two_settings():
    allowed, filtered = evaluate().metrics_json("x"), evaluate(seen="filtered").metrics_json("x")
    assert filtered["protocol"]["seen"] == "filtered"
    accuracy = lambda results: {s: {m: v for m, v in r.items() if not m.startswith(LISTS)} for s, r in results.items()}  # noqa: E731
    assert accuracy(filtered["results"]) == allowed["results_other_seen"]["results"]
    assert filtered["results_other_seen"] == {"seen": "allowed", "results": accuracy(allowed["results"])}
    # filtered, u1 is recommended item 1 first, u0 and u2 item 2, u3 item 0
    assert allowed["results"]["pixrec"]["coverage@1"] == pytest.approx(1 / 6)
    assert filtered["results"]["pixrec"]["coverage@1"] == pytest.approx(3 / 6)


def test_buckets_hold_every_user_once_a_pair():
    buckets = evaluate().metrics_json("x")["buckets"]
    users = {name: bucket["users"] for name, bucket in buckets.items()}
    assert users == {
        "target_warm": 3,
        "target_cold": 1,
        "target_head": 1,
        "target_tail": 2,
        "target_with_picture": 3,
        "target_without_picture": 1,
        "history_short": 2,
        "history_long": 2,
    }
    cold = buckets["target_cold"]["results"]["pixrec"]
    assert (cold["recall@10"], cold["ci95"]["recall@10"]) == (1.0, [1.0, 1.0])
    assert cold["ndcg@10"] == pytest.approx(1 / np.log2(7))


def test_the_buckets_of_rare_targets_compare_the_scorers_on_their_own_users():
    buckets = evaluate(ks=(2, 4)).metrics_json("x")["buckets"]
    assert [name for name in buckets if "differences" in buckets[name]] == ["target_cold", "target_tail"]
    found = buckets["target_cold"]["differences"]
    assert found["of"] == "pixrec"
    assert found["minus"]["popularity"]["ndcg@10"] == 0, "u1 alone: the target is last for both"
    assert found["minus"]["popularity"]["p_holm"] == {"recall@10": 1.0, "ndcg@10": 1.0}


def test_an_empty_bucket_has_no_results():
    held_out = HeldOut(["u"], [np.array([0])], np.array([1]))
    bucket = evaluate(held_out=held_out).metrics_json("x")["buckets"]["target_cold"]
    assert bucket["users"] == 0
    assert bucket["results"] == {}
    assert "differences" not in bucket


def test_guards():
    guards = evaluate([FALLING, FLAT, FixedScorer("worse", [float("nan")] * 6)]).metrics_json("x")["guards"]
    assert guards["repeat_share"] == 0.25
    assert guards["tie_share"] == {"pixrec": 0.0, "popularity": 1.0, "worse": 1.0}
    assert guards["chance_recall@10"] == 1.0
    assert guards["popularity_recall@10"] == 1.0
    assert guards["below_popularity"] == []


@pytest.mark.parametrize("seen", ["allowed", "filtered"])
def test_ties_broken_at_random_are_never_worse_than_against_the_scorer(seen):
    """In the setting of `results`: of a filtered list the seen items that tie with the target are no rivals."""
    measured = evaluate(seen=seen)
    metrics = measured.metrics_json("leave_one_out")
    assert measured.outcomes["popularity"].ties.tolist() == ([5] * 4 if seen == "allowed" else [3, 4, 3, 4])
    flat = metrics["guards"]["random_ties"]["popularity"]
    candidates = np.array([6] * 4 if seen == "allowed" else [4, 5, 4, 5])
    assert flat["recall@1"] == pytest.approx((1 / candidates).mean())
    assert flat["recall@1"] >= metrics["results"]["popularity"]["recall@1"]


def test_guard_names_the_scorer_below_popularity():
    held_out = HeldOut(["u"], [np.array([0])], np.array([20]))
    mask = np.zeros(21, bool)
    best_last = FixedScorer("popularity", list(range(21)))
    best_first = FixedScorer("pixrec", list(range(21, 0, -1)))
    evaluation = evaluate_scorers(
        [best_first, best_last], held_out, EvaluateConfig(), training_counts=mask + 1, with_image=mask
    )
    assert evaluation.metrics_json("x")["guards"]["below_popularity"] == ["pixrec"]


def test_the_alarm_is_about_the_model_and_what_was_trained_beside_it():
    """Not about baselines, nor about the model with its input removed or replaced, which may well be worse."""
    held_out = HeldOut(["u"], [np.array([0])], np.array([20]))
    best_last, best_first = list(range(21)), list(range(21, 0, -1))
    names = ["pixrec", "pixrec_text_only", "pixrec_image_only", "pixrec_image_noise", "repeat_last"]
    evaluation = evaluate_scorers(
        [*(FixedScorer(name, best_first) for name in names), FixedScorer("popularity", best_last)],
        held_out,
        EvaluateConfig(bootstrap_samples=5),
        training_counts=np.ones(21, int),
        with_image=np.zeros(21, bool),
    )
    knockouts = {"pixrec_text_only": "trained", "pixrec_image_only": "scored", "pixrec_image_noise": "replaced"}
    metrics = evaluation.metrics_json("x", knockouts)
    assert metrics["guards"]["below_popularity"] == ["pixrec", "pixrec_text_only"]
    assert metrics["knockouts"] == knockouts


def test_differences_are_taken_from_the_first_scorer():
    differences = evaluate().metrics_json("x")["differences"]
    assert differences["of"] == "pixrec"
    assert differences["minus"]["popularity"]["recall@1"] == 0.25
    low, high = differences["minus"]["popularity"]["ci95"]["recall@1"]
    assert 0 <= low < 0.25 < high < 1
    other = differences["minus"]["popularity"]
    assert 0 < other["p"]["mrr"] == other["p_holm"]["mrr"] <= 1


def test_the_blend_is_compared_with_each_other_scorer_too():
    assert "differences_of_blend" not in evaluate().metrics_json("x")
    metrics = evaluate([FALLING, FLAT, FixedScorer("blend", [1.0] * 6)]).metrics_json("x")
    assert metrics["differences"]["minus"].keys() == {"popularity", "blend"}
    found = metrics["differences_of_blend"]
    assert (found["of"], found["minus"].keys()) == ("blend", {"pixrec", "popularity"})
    assert found["minus"]["pixrec"]["recall@1"] == -metrics["differences"]["minus"]["blend"]["recall@1"]
    assert metrics["buckets"]["target_cold"]["differences_of_blend"]["of"] == "blend"


def test_p_values_are_adjusted_for_the_number_of_scorers():
    minus = evaluate([FALLING, FLAT, FixedScorer("third", [1.0] * 6)]).metrics_json("x")["differences"]["minus"]
    assert minus["third"]["p_holm"]["mrr"] == pytest.approx(min(1.0, 2 * minus["third"]["p"]["mrr"]))
