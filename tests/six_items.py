"""A catalog of six items and four users, small enough to work out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from fakes import FixedScorer

from pixrec.config import EvaluateConfig
from pixrec.data.sequences import HeldOut
from pixrec.evaluation import Evaluation, evaluate_scorers
from pixrec.scorers import Scorer

NUM_ITEMS = 6
COUNTS = np.array([9, 1, 2, 1, 3, 0])  # item 5 is cold, item 0 alone is head
WITH_IMAGE = np.array([True, True, True, True, False, False])
HELD_OUT = HeldOut(
    ["u0", "u1", "u2", "u3"],
    [np.array([0, 1]), np.array([0]), np.array([4, 0, 1]), np.array([1])],
    np.array([2, 5, 0, 3]),
)

FALLING = FixedScorer("pixrec", [6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
FLAT = FixedScorer("popularity", [1.0] * NUM_ITEMS)


def evaluate(scorers: Sequence[Scorer] = (FALLING, FLAT), held_out: HeldOut = HELD_OUT, **config) -> Evaluation:
    config = EvaluateConfig(**{"ks": (2,), "bootstrap_samples": 50, "batch_size": 3} | config)
    return evaluate_scorers(list(scorers), held_out, config, training_counts=COUNTS, with_image=WITH_IMAGE)
