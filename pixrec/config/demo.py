"""Settings of the synthetic catalog, which `pixrec demo` draws."""

from __future__ import annotations

from dataclasses import dataclass

from pixrec.config.checks import at_least
from pixrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The synthetic catalog and its shoppers."""

    num_items: int = 600
    """Products drawn."""
    num_users: int = 2500
    """Shoppers simulated."""
    min_events: int = 6
    """Shortest history."""
    max_events: int = 12
    """Longest history."""
    image_size_px: int = 128
    """Side of the drawn pictures."""
    seed: int = 7
    """Seed of products, shoppers and pictures."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_items", "num_users", "min_events", "image_size_px")
        at_least(self, 0, "seed")
        if self.max_events < self.min_events:
            raise ConfigError(f"demo.max_events {self.max_events} is below demo.min_events {self.min_events}")
