"""Settings of `pixrec submit`: how a command runs as a job of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from pixrec.config.checks import above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    address: str = "http://127.0.0.1:8265"
    """The cluster's job server; RAY_API_SERVER_ADDRESS goes before it where it is set."""
    cpus: float = 1.0
    """CPUs Ray reserves for the command itself, so that it runs on a worker node. 0: on the head."""
    memory_gib: float = 2.0
    """Memory Ray reserves for it."""
    working_dir: str | None = None
    """A folder that is sent along and is where the command runs; None: the nodes have all it needs."""
    env: tuple[str, ...] = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION")
    """Variables that the job takes over from whoever submits it. Ray shows them to everybody who sees the job: no key
    or password belongs here."""
    attempts: int = 3
    """How often a job is begun that ends otherwise than done or by an input at fault, as when its node is lost."""
    poll_seconds: float = 2.0
    """How often a job that goes on is asked how it is."""

    def __post_init__(self) -> None:
        at_least(self, 0, "cpus", "memory_gib")
        at_least(self, 1, "attempts")
        above_zero(self, "poll_seconds")
