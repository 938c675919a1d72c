"""Settings of `pixrec evaluate`, and of the baseline SASRec that it can train on the spot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pixrec.config.checks import at_least, between
from pixrec.config.model import CompactConfig
from pixrec.config.train import SequenceConfig
from pixrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    ks: tuple[int, ...] = (1, 5, 10, 50)
    """Cut-offs of the metrics; 1 and 10 are always reported."""
    seen: Literal["allowed", "filtered"] = "allowed"
    """Whether items of the history may be recommended again, in `results`; the other way is reported beside it."""
    scorers: tuple[str, ...] = ("popularity", "recent_popularity", "repeat_last", "item_transition")
    """Scorers beside the model and its knockouts. Also: sasrec, sasrec_full, sasrec_sampled, sasrec_gbce (trained on
    the spot), content_linear, content_neighbours (of a model with frozen encoders), generative_bm25, blend (the model
    mixed with counts, as `serve.blend` serves), rrf, round_robin (both of `fused`), and inference-time knockouts:
    pixrec_image_constant (one grey picture for all items), pixrec_image_noise (a picture of noise for each),
    pixrec_text_constant (one text for all), pixrec_text_noise (another item's text)."""
    fused: tuple[str, ...] = ("pixrec", "item_transition")
    """The scorers that `rrf` and `round_robin` merge."""
    recent_share: float = 0.05
    """The last share of the training events, by time, that `recent_popularity` counts."""
    transition_steps: int = 2
    """Steps over the graph of item transitions; 1 is what followed directly."""
    transition_damping: float = 0.3
    """Weight of each further step, relative to the step before."""
    generate_beams: int = 4
    """Texts that `generative_bm25` generates for a user."""
    generate_tokens: int = 24
    """Longest text it generates."""
    bootstrap_samples: int = 1000
    """Bootstrap resamples of the users for each 95 % interval, and random sign flips for each p-value."""
    batch_size: int = 64
    """Histories in one forward pass; fewer where the catalog is so large that their scores would not fit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run and scores are ranked; `auto` takes a GPU where there is one."""
    num_actors: int = 0
    """Ray actors that the users are spread over; 0 ranks in this process."""
    cpus_per_actor: float = 1.0
    """CPUs Ray reserves for each actor."""
    gpus_per_actor: float = 0.0
    """GPUs Ray reserves for each actor."""
    max_users: int | None = None
    """Evaluate on a seeded sample of the test users (None: all)."""
    report_histories: int = 8
    """Histories drawn at random that the report shows as pictures."""
    report_cases: int = 4
    """Histories in each of the report's grids: best, worst, cold, and what text alone gets wrong."""
    seed: int = 0
    """Seed of the bootstrap and of the samples."""

    def __post_init__(self) -> None:
        at_least(self, 1, "bootstrap_samples", "batch_size", "max_users", "transition_steps")
        at_least(self, 1, "generate_beams", "generate_tokens")
        at_least(self, 0, "report_histories", "report_cases", "seed", "num_actors", "cpus_per_actor", "gpus_per_actor")
        between(self, 0, 1, "transition_damping")
        if not 0 < self.recent_share <= 1:
            raise ConfigError(f"evaluate.recent_share is {self.recent_share}: must lie above 0 and not above 1")
        if len(set(self.fused)) < 2:
            raise ConfigError(f"evaluate.fused is {list(self.fused)}: name two different scorers or more")
        if min(self.ks, default=1) < 1:
            raise ConfigError(f"evaluate.ks is {list(self.ks)}: every cut-off must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SasrecTowerConfig(CompactConfig):
    """Shape of SASRec. It always has id vectors and no content, so `id_embedding` and `id_dropout` have no effect."""

    max_history_items: int = 50
    """Only this many of the newest events of a history are read."""
    layers: int = 1
    """Transformer layers."""
    heads: int = 1
    """Attention heads."""
    dropout: float = 0.5
    """Dropout of inputs and residual branches."""
    positions: Literal["rotary", "learned"] = field(default="learned", repr=False)
    """As `model.compact.positions`; SASRec as published learns them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None:
            raise ConfigError(f"sasrec.tower.width is {self.width}: leave it out and set sasrec.width")
        if self.time != "none":
            raise ConfigError(f"sasrec.tower.time is {self.time}: SASRec reads no timestamps; leave it at none")


@dataclass(frozen=True, kw_only=True)
class SasrecTrainingConfig(SequenceConfig):
    """How SASRec learns."""

    loss: Literal["full", "sampled", "gbce"] = "sampled"
    """As `train.compact.loss`; the scorers `sasrec_full`, `sasrec_sampled` and `sasrec_gbce` have their own."""


@dataclass(frozen=True, kw_only=True)
class SasrecConfig:
    """The baseline SASRec (Kang & McAuley 2018), which `evaluate.scorers` can name: the compact tower on learned
    vectors alone. Defaults are those published as strong on the Amazon sets."""

    width: int = 64
    """Width of its vectors."""
    tower: SasrecTowerConfig = field(default_factory=SasrecTowerConfig)
    training: SasrecTrainingConfig = field(default_factory=SasrecTrainingConfig)
    refit: bool = False
    """Once validation has found the number of epochs, train again from the start for that many, on the validation
    events as well. The towers never see those events: use this to reproduce published tables, not to compare with the
    towers."""
    seed: int = 0
    """Seed of weights, order and dropout."""

    def __post_init__(self) -> None:
        at_least(self, 1, "width")
        self.tower.check_width(self, "width")
