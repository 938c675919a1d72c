from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from pixrec.errors import InputError
from pixrec.query import COSINE, MAX_TIMESTAMP, Answer, Query


@pytest.mark.parametrize(
    "query",
    [
        Query([]),
        Query(["a"], 1),
        Query([], timestamps=[]),
        Query(["a", "b"], timestamps=[5, 5]),
        Query(["a", "b"], timestamps=[-MAX_TIMESTAMP, MAX_TIMESTAMP]),
    ],
)
def test_a_sound_query_passes(query: Query):
    query.check()
    assert query.problem() is None


@pytest.mark.parametrize(
    ("query", "field", "message"),
    [
        (Query(["a"], 0), "k", "k is 0: must be at least 1"),
        (Query(["a"], -3), "k", "k is -3"),
        (Query(["a", "b"], timestamps=[1]), "timestamps", "holds 1 values for 2 items of history"),
        (Query([], timestamps=[1]), "timestamps", "holds 1 values for 0 items"),
        (Query(["a", "b", "c"], timestamps=[1, 3, 2]), "timestamps", r"timestamps\[2\] 2 is before"),
        (Query(["a"], timestamps=[MAX_TIMESTAMP + 1]), "timestamps", "10,000 years"),
        (Query(["a", "b"], timestamps=[-MAX_TIMESTAMP - 1, 0]), "timestamps", "10,000 years"),
    ],
)
def test_a_query_at_fault_names_the_field(query: Query, field: str, message: str):
    found = query.problem()
    assert found is not None
    assert found[0] == field
    with pytest.raises(InputError, match=message):
        query.check()


def test_what_is_asked_for_when_nothing_is_said():
    assert dataclasses.asdict(Query(["a"])) == {
        "history": ["a"],
        "k": 10,
        "exclude": (),
        "exclude_history": True,
        "filters": {},
        "new_items": {},
        "timestamps": None,
        "diversity": 0.0,
        "max_per": {},
        "reasons": False,
        "user_id": None,
    }


def test_an_answer_as_json_has_every_field_once():
    answer: Any = Answer([("a", 0.5)], COSINE, "m", "i", ["ghost"], fallback=False)
    assert answer.to_dict() == {
        "items": [{"item_id": "a", "score": 0.5}],
        "score_kind": "cosine",
        "model_version": "m",
        "index_version": "i",
        "unknown_items": ["ghost"],
        "fallback": False,
    }
    answer = dataclasses.replace(answer, reasons={"a": "b"}, missing_shards=[1], store_away=True)
    assert list(answer.to_dict()) == [field.name for field in dataclasses.fields(Answer)]


def test_it_stands_on_nothing_heavy():
    loaded = (
        "import sys, pixrec.query; print(*sorted(m for m in ('numpy', 'torch', 'ray', 'pyarrow') if m in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == ""
