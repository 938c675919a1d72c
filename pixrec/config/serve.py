"""Settings of `pixrec serve`."""

from __future__ import annotations

from dataclasses import dataclass

from pixrec.config.checks import above_zero, at_least
from pixrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    api_key: str | None = None
    """When set, every /v1 route wants it in `Authorization: Bearer` or `X-API-Key`."""
    max_batch_size: int = 32
    """Histories encoded in one forward pass."""
    batch_wait_seconds: float = 0.005
    """Longest time that a request waits for others to fill its batch."""
    num_replicas: int = 1
    """Replicas of the model deployment."""
    cpus_per_replica: float = 0.5
    """CPUs Ray reserves for each model replica."""
    gpus_per_replica: float = 0.0
    """GPUs Ray reserves for each model replica."""
    threads_per_replica: int = 2
    """Torch threads in each model replica."""
    num_ingress_replicas: int = 1
    """Replicas of the HTTP deployment, which checks requests and holds no model."""
    cpus_per_ingress: float = 0.1
    """CPUs Ray reserves for each HTTP replica."""
    max_ongoing_requests: int = 256
    """Requests that a replica handles at the same time; at least `max_batch_size`."""
    max_queued_requests: int = 512
    """Requests waiting beyond that; more are answered 503 with Retry-After."""
    retry_after_seconds: int = 1
    """Value of the Retry-After header."""
    blend: bool | None = None
    """Rank recommendations by the mixture of the model with what followed an item, what sells best and what the shopper
    had before, as the scorer `blend` of evaluation does. Its weights are taken when a replica starts, from the
    validation events of --data. None: where the model was trained by settings that say so."""
    request_timeout_seconds: float = 30.0
    """A request the model has not answered by then is answered 503."""
    max_k: int = 200
    """Largest k a request may ask for."""
    max_request_items: int = 1000
    """Longest history, exclusion list or list of filter values a request may hold."""
    max_new_items: int = 20
    """Most `new_items` (items that the catalog lacks) in one request."""
    max_text_characters: int = 10_000
    """Longest text a search may hold."""
    max_body_bytes: int = 12_000_000
    """Largest request body."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_batch_size", "num_replicas", "max_ongoing_requests", "max_k", "max_request_items")
        at_least(self, 1, "threads_per_replica", "num_ingress_replicas", "max_queued_requests", "retry_after_seconds")
        at_least(self, 1, "max_text_characters", "max_body_bytes", "max_new_items")
        at_least(self, 0, "batch_wait_seconds", "cpus_per_replica", "gpus_per_replica", "cpus_per_ingress")
        above_zero(self, "request_timeout_seconds")
        if self.max_ongoing_requests < self.max_batch_size:
            raise ConfigError(
                f"serve.max_ongoing_requests {self.max_ongoing_requests} is below serve.max_batch_size "
                f"{self.max_batch_size}: batches would never fill"
            )
