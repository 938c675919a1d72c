"""Chooses among ranked candidates so that the answers differ: by their vectors, and by the values they share.

Knows scores, vectors and values; knows no item and no model.

Shapes: C candidates · D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def choose(
    scores: np.ndarray,
    vectors: np.ndarray,
    k: int,
    diversity: float = 0.0,
    caps: Sequence[tuple[Sequence[Hashable | None], int]] = (),
) -> list[int]:
    """At most `k` of the candidates, as positions, the first chosen first.

    scores (C,), best first; vectors (C, D) of length 1. Each step takes the candidate with the largest
    `(1 - diversity) · relevance - diversity · similarity`: relevance is the score, scaled to 0 .. 1 over the
    candidates, and similarity the largest cosine with what was chosen before. That is maximal marginal relevance
    (Carbonell and Goldstein, SIGIR 1998). `caps`: values (C,) and how many of the chosen may share one; None counts as
    no value.
    """
    spread = float(scores.max() - scores.min()) if len(scores) else 0.0
    relevance = (scores - scores.min()) / spread if spread > 0 else np.ones(len(scores))
    similarity = np.zeros(len(scores))
    left = np.ones(len(scores), dtype=bool)
    used: list[Counter[Hashable]] = [Counter() for _ in caps]
    chosen: list[int] = []
    while len(chosen) < k and left.any():
        worth = np.where(left, (1 - diversity) * relevance - diversity * similarity, -np.inf)
        best = int(worth.argmax())
        left[best] = False
        held = [values[best] for values, _ in caps]
        if any(v is not None and seen[v] >= cap[1] for v, seen, cap in zip(held, used, caps, strict=True)):
            continue
        for value, seen in zip(held, used, strict=True):
            seen[value] += 1
        cosine = vectors @ vectors[best] if diversity else similarity
        similarity = np.maximum(similarity, cosine) if chosen else cosine
        chosen.append(best)
    return chosen
