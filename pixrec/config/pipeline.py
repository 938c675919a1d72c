"""Settings of `pixrec pipeline`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pixrec.config.checks import above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    publish: Literal["if_not_worse", "always", "never"] = "if_not_worse"
    """Whether the new model takes the place of the one in use. `if_not_worse`: unless the test users say that it may be
    worse by more than `margin`."""
    metric: Literal["recall@1", "recall@10", "ndcg@10", "mrr"] = "ndcg@10"
    """The metric by which the two models are compared, user by user."""
    margin: float = 0.01
    """The new model is published when the lower end of the 95 % interval of its metric minus the other one's is not
    below minus this. The interval of few users is wide: they need a larger margin."""
    store: str = "none"
    """The store of a server, as `serve.store` names it (`index`: live.sqlite in the index folder, if it is there),
    whose events and new items are learned from beside the tables. `none`: the tables alone."""
    store_every_hours: float = 24.0
    """Events count up to the last whole period of so many hours, of UTC: 24, up to midnight. Runs within one period see
    the same events, so that one that was killed is gone on with."""
    start: Literal["fresh", "served"] = "fresh"
    """What training begins with: fresh weights, or those of the model in use (`train.start`; the stages of
    `train.stages` it has behind it)."""
    keep_versions: int | None = 5
    """How many versions of the index stay after a publication, each with its model, its data and its report; what no
    version names is deleted. None: everything stays."""

    def __post_init__(self) -> None:
        at_least(self, 0, "margin")
        above_zero(self, "store_every_hours")
        at_least(self, 2, "keep_versions")  # a new model's that was refused, and the one in use
