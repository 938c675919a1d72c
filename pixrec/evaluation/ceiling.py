"""What the best possible scorer of the synthetic shop reaches on its held-out events: the ceiling of any model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixrec.config import EvaluateConfig
from pixrec.data.sequences import Dataset, sample_users
from pixrec.data.synthetic import World
from pixrec.evaluation.significance import bootstrap_ci
from pixrec.metrics import count_ties, target_ranks, user_random_tie_metrics
from pixrec.scorers.oracle import Oracle


def ceilings(world: World, dataset: Dataset, config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Recall@1 and @10 with `ci95`, ties broken at random, of the oracle that sees `both` and of the `text_only` one.

    `dataset` is the world's catalog, prepared; the users are those that `evaluate` ranks under `config`.
    """
    held_out = sample_users(dataset.held_out("test"), config.max_users, config.seed)
    best: dict[str, dict[str, Any]] = {}
    for name, text_only in (("both", False), ("text_only", True)):
        scores = Oracle(world, dataset.items.item_ids, text_only).scores(held_out.users)
        ranks, ties = target_ranks(scores, held_out.targets), count_ties(scores, held_out.targets)
        recalls = {m: v for m, v in user_random_tie_metrics(ranks, ties, (1, 10)).items() if m.startswith("recall")}
        intervals = {m: list(bootstrap_ci(v, config.bootstrap_samples)) for m, v in recalls.items()}
        best[name] = {**{m: float(v.mean()) for m, v in recalls.items()}, "ci95": intervals}
    return best


def verdict(results: Mapping[str, Any], guards: Mapping[str, Any], best: Mapping[str, Mapping[str, Any]]) -> str:
    """How near `pixrec` comes to the ceilings, and how far above text alone it is: a line a metric."""
    lines = []
    for metric in ("recall@1", "recall@10"):
        both = results["pixrec"][metric]
        line = (
            f"{metric}: {both:.3f}, best possible {best['both'][metric]:.3f} ({both / best['both'][metric]:.0%} of it)"
        )
        if "pixrec_text_only" in results:
            text = guards["random_ties"]["pixrec_text_only"][metric]
            ratio = f"{both / text:.1f}x" if text else "far above"
            line += f"; text alone {text:.3f} (ties broken at random), "
            line += f"best possible {best['text_only'][metric]:.3f}; pictures: {ratio}"
        lines.append(line)
    return "\n".join(lines)
