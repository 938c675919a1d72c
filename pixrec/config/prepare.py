"""Settings of `pixrec prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pixrec.config.checks import above_zero, at_least
from pixrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    name: str | None = None
    """What the data set is called in the report. None: as the interactions' file, or as its folder where the file is
    only called what it holds (interactions.parquet)."""
    min_user_events: int = 1
    """Users with fewer events are left out (k-core, repeated until stable)."""
    min_item_events: int = 1
    """Items with fewer events are left out of the sequences (they stay in the catalog)."""
    min_rating: float | None = None
    """Events rated below this are left out; needs a rating column."""
    history_events: tuple[str, ...] | None = None
    """Kinds of events (view, cart, purchase, any word of the event column) that make a history; None: all. What is
    neither of these kinds nor of `target_events` is left out."""
    target_events: tuple[str, ...] | None = None
    """Kinds of events that may be a target of training, validation and test; None: all."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """How test and validation events are held out."""
    temporal_valid_fraction: float = 0.1
    """Share of events, by time, between the training period and the test period (temporal split)."""
    temporal_test_fraction: float = 0.1
    """Share of events, by time, in the test period (temporal split)."""
    cold_item_share: float = 0.0
    """Share of the items with events that are held out of training entirely, drawn at random: their events are left
    out, except where one is a user's test target. The items stay in the catalog, for content to find."""
    seed: int = 0
    """Seed of that draw."""
    image_size_px: int = 256
    """Pictures are stored once at no more than this on their longer side; no less than the model's own size."""
    max_image_bytes: int = 20_000_000
    """A larger file is rejected unread."""
    max_image_pixels: int = 64_000_000
    """A picture that claims more pixels is rejected undecoded (decompression bombs)."""
    num_cpus_per_task: float = 1.0
    """CPUs a decoding task claims."""
    fetch_concurrency: int = 32
    """Pictures a task fetches at the same time, from files, s3:// and http(s)://."""
    fetch_timeout_seconds: float = 20.0
    """Time for one attempt at an http(s):// picture, name lookup, redirects and body together."""
    fetch_retries: int = 3
    """Further attempts after one that failed in a way that may pass (no answer, HTTP 408, 425, 429, 5xx)."""
    fetch_backoff_seconds: float = 0.5
    """Longest wait before the second attempt; doubles from one to the next, the wait itself is random."""
    fetch_cache: str | None = "auto"
    """Folder, local or s3://, that keeps downloaded pictures, so that a rerun asks only for what is new. `auto`: the
    place of --out with `.pictures` behind its name. None: keep none."""
    allow_private_addresses: bool = False
    """Fetch pictures also from loopback, private and link-local addresses, which are refused otherwise."""

    def __post_init__(self) -> None:
        at_least(self, 1, "min_user_events", "min_item_events", "image_size_px", "max_image_bytes", "max_image_pixels")
        at_least(self, 1, "fetch_concurrency")
        at_least(self, 0, "num_cpus_per_task", "fetch_retries", "fetch_backoff_seconds")
        at_least(self, 0, "seed")
        above_zero(self, "fetch_timeout_seconds")
        for name in ("history_events", "target_events"):
            kinds = getattr(self, name)
            if kinds is not None and (not kinds or len(set(kinds)) < len(kinds) or "" in kinds):
                raise ConfigError(f"prepare.{name} is {list(kinds)}: must name kinds of events, each once")
        if not 0 <= self.cold_item_share < 1:
            raise ConfigError(f"prepare.cold_item_share is {self.cold_item_share}: must be at least 0 and below 1")
        for name in ("temporal_valid_fraction", "temporal_test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"prepare.{name} is {getattr(self, name)}: must lie between 0 and 1")
        if self.temporal_valid_fraction + self.temporal_test_fraction >= 1:
            raise ConfigError("prepare.temporal_valid_fraction and temporal_test_fraction leave no training period")
