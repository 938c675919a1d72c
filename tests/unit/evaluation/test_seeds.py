import copy

import pytest

from pixrec.errors import InputError
from pixrec.evaluation.seeds import aggregate


def run(recall: float, **facts) -> dict:
    return {
        "protocol": {"split": "leave_one_out", "seen": "allowed"},
        "users": 5,
        "items": 9,
        "provenance": {"data_fingerprint": "d"},
        "results": {"pixrec": {"recall@10": recall, "mrr": 0.5, "ci95": {"recall@10": [0, 1]}}},
    } | facts


def test_means_and_deviations_over_runs():
    first, second = run(0.1), run(0.3)
    first["results"]["only_here"] = {"recall@10": 1.0}
    found = aggregate({"a": first, "b": second})
    assert found["runs"] == ["a", "b"]
    assert set(found["results"]) == {"pixrec"}
    recall = found["results"]["pixrec"]["recall@10"]
    assert recall["mean"] == pytest.approx(0.2)
    assert recall["sd"] == pytest.approx(0.1 * 2**0.5)  # n - 1
    assert recall["values"] == [0.1, 0.3]
    assert found["results"]["pixrec"]["mrr"]["sd"] == 0
    assert "ci95" not in found["results"]["pixrec"]


def test_one_run_has_no_deviation():
    assert aggregate({"a": run(0.1)})["results"]["pixrec"]["mrr"]["sd"] is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"users": 6}, "number of users is 6, that of a is 5"),
        ({"items": 8}, "number of items"),
        ({"protocol": {"split": "temporal", "seen": "allowed"}}, "protocol"),
        ({"provenance": {"data_fingerprint": "other"}}, "data set"),
        ({"results": None}, "no metrics.json"),
    ],
)
def test_unlike_runs_are_refused(change, what):
    with pytest.raises(InputError, match=f"b: .*{what}"):
        aggregate({"a": run(0.1), "b": copy.deepcopy(run(0.1)) | change})


def test_the_same_model_twice_is_no_second_seed():
    facts = {"data_fingerprint": "d", "model_fingerprint": "m"}
    with pytest.raises(InputError, match="b: measures the same model as a"):
        aggregate({"a": run(0.1, provenance=facts), "b": run(0.1, provenance=facts)})
