"""Users of the report beside what was recommended to them, as pictures. Knows scorers, ranks and items; no HTML.

Whatever comes from a catalog is re-encoded: catalogs are written by strangers.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixrec.config import EvaluateConfig
from pixrec.data.images import shrink_image
from pixrec.data.items import ItemTable
from pixrec.data.sequences import HeldOut, sample_users
from pixrec.errors import UnreadableImage
from pixrec.evaluation import Evaluation
from pixrec.metrics import top_rows
from pixrec.schema import TITLE
from pixrec.scorers import Scorer

THUMBNAIL_PX = 128  # shown at half of that on a dense screen
MAX_HISTORY_SHOWN = 9  # a shelf of a desktop's width, with the target after them
MAX_CASE_HISTORY_SHOWN = 4  # of half that width
HIT_RANK = 10
TEXT_ONLY = "pixrec_text_only"


@dataclass(frozen=True)
class Example:
    """One held-out user beside what was recommended; items by row."""

    user_id: str
    history: list[int]
    target: int
    recommended: list[int]
    """rows, best first"""
    rank: int | None = None
    """the target's rank among all items, where it is known"""
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """Users chosen for a reason."""

    title: str
    reason: str
    examples: list[Example]


def choose_examples(scorer: Scorer, held_out: HeldOut, config: EvaluateConfig, k: int = 10) -> list[Example]:
    """`config.report_histories` users drawn at random by `config.seed`, hits and misses alike, with the first `k`."""
    return _examples(scorer, sample_users(held_out, config.report_histories, config.seed), config, k)


def choose_grids(scorer: Scorer, evaluation: Evaluation, k: int = 5) -> list[Grid]:
    """Best and worst cases of `scorer`, cold targets found and missed, and hits of it that text alone misses, where
    there are any.

    At most `config.report_cases` users a grid, the first `k` recommended to each. Of equal cases, those drawn by
    `config.seed`.
    """
    config, users = evaluation.config, evaluation.held_out
    ranks = evaluation.outcomes[scorer.name].ranks[config.seen]
    draw = np.random.default_rng(config.seed).permutation(len(ranks))
    cold = evaluation.cold[users.targets]
    wanted: list[tuple[str, str, np.ndarray, np.ndarray, np.ndarray | None]] = [
        ("Best cases", "The next item was ranked first, or close to it.", np.ones(len(ranks), bool), ranks, None),
        ("Worst cases", "The next item was ranked far down.", np.ones(len(ranks), bool), -ranks, None),
        ("Cold items", "The next item is in no training history: only its content can place it. Best ranks first.",
         cold, ranks, None),
        ("Cold items that were missed", f"As above, but not in the top {HIT_RANK}. Worst ranks first.",
         cold & (ranks > HIT_RANK), -ranks, None),
    ]  # fmt: skip
    if TEXT_ONLY in evaluation.outcomes and scorer.name != TEXT_ONLY:
        text = evaluation.outcomes[TEXT_ONLY].ranks[config.seen]
        missed = (ranks <= HIT_RANK) & (text > HIT_RANK)
        reason = f"In the top {HIT_RANK} with pictures, but not for {TEXT_ONLY}. Largest gaps first."
        wanted.append(("What text alone gets wrong", reason, missed, ranks - text, text))
    grids = []
    for title, reason, mask, order, text_ranks in wanted:
        candidates = draw[mask[draw]]
        chosen = candidates[np.argsort(order[candidates], kind="stable")][: config.report_cases]
        if len(chosen):
            by_text: list[str] = (
                [] if text_ranks is None else [f"text alone: rank {text_ranks[user]:,}" for user in chosen]
            )
            examples = _examples(scorer, users.only(chosen), config, k, ranks[chosen].tolist(), by_text)
            grids.append(Grid(title, reason, examples))
    return grids


def _examples(
    scorer: Scorer,
    users: HeldOut,
    config: EvaluateConfig,
    k: int,
    ranks: Sequence[int] = (),
    remarks: Sequence[str] = (),
) -> list[Example]:
    if not users.user_ids:
        return []
    others = [h[h != target] for h, target in zip(users.histories, users.targets, strict=True)]
    top = top_rows(scorer.scores(users.users), k, seen=others if config.seen == "filtered" else None)
    return [
        Example(
            users.user_ids[i],
            [int(row) for row in users.histories[i]],
            int(users.targets[i]),
            [int(row) for row in top[i] if row >= 0],
            ranks[i] if ranks else None,
            remarks[i] if remarks else "",
        )
        for i in range(len(users.user_ids))
    ]


def example_view(example: Example, items: ItemTable, max_history: int = MAX_HISTORY_SHOWN) -> dict[str, Any]:
    """What the template shows of an example."""
    listed = example.recommended.index(example.target) + 1 if example.target in example.recommended else None
    return {
        "user_id": example.user_id,
        "history": [_item_view(row, items) for row in example.history[-max_history:]],
        "left_out": max(0, len(example.history) - max_history),
        "target": _item_view(example.target, items),
        "recommended": [_item_view(row, items) | {"hit": row == example.target} for row in example.recommended],
        "place": listed,
        "rank": example.rank,
        "hit": listed is not None or (example.rank is not None and example.rank <= HIT_RANK),
        "note": example.note,
    }


def grid_view(grid: Grid, items: ItemTable) -> dict[str, Any]:
    views = [example_view(example, items, MAX_CASE_HISTORY_SHOWN) for example in grid.examples]
    return {"title": grid.title, "reason": grid.reason, "examples": views}


def _item_view(row: int, items: ItemTable) -> dict[str, Any]:
    title = str(items.fields(row).get(TITLE) or items.item_ids[row])
    return {"title": title, "picture": _thumbnail(items.image(row))}


def _thumbnail(data: bytes | None) -> str | None:
    """The picture re-encoded as base64 JPEG, or None."""
    if data is None:
        return None
    try:
        return base64.b64encode(shrink_image(data, THUMBNAIL_PX)).decode()
    except UnreadableImage:
        return None
