"""Settings of `pixrec embed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pixrec.config.checks import above_zero, at_least
from pixrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    batch_size: int = 128
    """Items in one forward pass."""
    num_actors: int = 1
    """Most model actors in the pool, which begins with one and grows while CPUs are left to read and decode."""
    cpus_per_actor: float = 0.5
    """CPUs Ray reserves for each actor."""
    threads_per_actor: int = 2
    """Torch threads in each actor."""
    gpus_per_actor: float = 0.0
    """GPUs Ray reserves for each actor."""
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """Type of the stored vectors; int8 has a scale for each vector."""
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` runs the towers under autocast: several times as fast on a GPU; a cosine moves by about 1e-3. Vectors
    that an index has already stay as they were made."""
    cpus_per_decode: float = 0.5
    """CPUs Ray reserves for each task that reads and decodes items."""
    picture_tokens: str | None = "auto"
    """For a model with a frozen vision part or frozen encoders: the folder, local or s3://, of what these made of each
    picture and text. What is there is not encoded again; vectors differ by rounding only. `auto`: the place of --data
    with `.tokens` appended. None: encode all."""
    max_part_items: int = 1024
    """Items whose vectors an actor stores together; when a run is killed, each actor loses at most that many."""
    approximate_above: int | None = 300_000
    """An index of more items gets a structure for approximate search, which needs faiss
    (`pip install 'pixrec[approximate]'`); smaller ones, and without faiss all, are searched exactly. None: always."""
    approximate_codes: Literal["float16", "int8", "pq"] = "int8"
    """How that structure holds a vector: in 2 bytes a value, in 1, or in a quarter (product quantization). The items it
    proposes are ranked again by their full vectors."""
    approximate_recall: float = 0.98
    """Share of the ten nearest items that a search is to find. Measured when the index is published; how many lists a
    search reads is chosen by it."""

    live_items: str | None = "index"
    """The store of items that a server was sent, as `serve.store` names it: what the data set lacks becomes part of the
    version. `index`: live.sqlite in the index folder, if it is there. None: none."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "num_actors", "threads_per_actor", "max_part_items")
        if self.approximate_above is not None:
            at_least(self, 0, "approximate_above")
        above_zero(self, "approximate_recall")
        if self.approximate_recall > 1:
            raise ConfigError(f"embed.approximate_recall is {self.approximate_recall}: it is a share, 1 at most")
        at_least(self, 0, "cpus_per_actor", "gpus_per_actor", "cpus_per_decode")
