"""Settings of `pixrec serve`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pixrec.config.checks import above_zero, at_least, between
from pixrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    api_key: str | None = None
    """When set, every /v1 route wants it in `Authorization: Bearer` or `X-API-Key`."""
    api_keys: tuple[str, ...] = ()
    """Further keys, such as one for each client: what one may send in a second is counted for each key."""
    admin_key: str | None = None
    """The key of the /admin routes; None: those of the /v1 routes. Without any key the /admin routes are closed."""
    requests_per_second: float | None = None
    """What one key, or one address where no key is set, may send to each HTTP replica; more is answered 429."""
    request_burst: int = 50
    """Requests that may come at once before that rate counts."""
    max_batch_size: int = 32
    """Histories that go to the model in one call, and are encoded in one forward pass."""
    batch_wait_seconds: float = 0.0
    """Longest time that a call with fewer waits for those of other HTTP replicas, to be encoded with them."""
    num_replicas: int = 1
    """Replicas of the model deployment, where `max_replicas` does not let their number follow the load."""
    min_replicas: int = 1
    """With `max_replicas`, the fewest; 0: none while nobody asks, and the first request waits until one has started."""
    max_replicas: int | None = None
    """With it Serve adds and removes replicas of the model deployment by the number of ongoing requests."""
    target_ongoing_requests: float = 32.0
    """With `max_replicas`, the ongoing requests that each replica should have."""
    cpus_per_replica: float = 0.5
    """CPUs Ray reserves for each model replica."""
    gpus_per_replica: float = 0.0
    """GPUs Ray reserves for each model replica."""
    threads_per_replica: int = 2
    """Torch threads in each model replica."""
    num_retrieval_replicas: int = 0
    """Replicas of a deployment of its own for the search, which hold index and items and no model; 0: the replicas of
    the model search themselves. Vectors are mapped from one file by all processes of a node. A blend is ranked by the
    replicas of the model all the same."""
    retrieval_shards: int = 1
    """Parts that the index is cut into, each searched by a deployment of `num_retrieval_replicas`."""
    missing_shard: Literal["answer", "refuse"] = "refuse"
    """While a part of the index gives no answer: `answer` from the others and name it in `missing_shards`, or `refuse`
    with 503 and Retry-After."""
    shard_timeout_seconds: float = 2.0
    """A part that has not answered by then gives no answer."""
    cpus_per_retrieval: float = 0.5
    """CPUs Ray reserves for each retrieval replica."""
    num_ingress_replicas: int = 1
    """Replicas of the HTTP deployment, which checks requests and holds no model."""
    cpus_per_ingress: float = 0.1
    """CPUs Ray reserves for each HTTP replica."""
    max_ongoing_requests: int = 256
    """Requests that a replica handles at the same time; at least `max_batch_size`."""
    max_queued_requests: int = 512
    """Requests that wait in each HTTP replica, beyond those under way; more are answered 503 with Retry-After."""
    retry_after_seconds: int = 1
    """Value of the Retry-After header."""
    blend: bool | None = None
    """Rank recommendations by the mixture of the model with what followed an item, what sells best, what the shopper
    had before and what frozen encoders find alike, as the scorer `blend` of evaluation does. Its weights are taken when
    a replica starts, from the validation events of --data. None: where the model was trained by settings that say
    so."""
    new_item_share: float | None = None
    """What a blend gives to all items without a training event together, of a chance to be next of 1; the more, the
    more places of a list are theirs. None: what the model, what is alike and the validation events say."""
    poll_seconds: float = 10.0
    """Time between two looks for a newly published version, which is loaded beside the one in use and takes its place;
    0: only when /admin/reload is called."""
    canary_share: float = 0.0
    """While a version is pinned, the share of users who get a newer one that is current, always the same users; both
    are loaded then."""
    load_timeout_seconds: float = 600.0
    """Longest time that a call of an /admin route waits until all replicas have loaded a version."""
    log_format: Literal["text", "json"] = "text"
    """How the logs of the replicas are written; each line of a request holds its id."""
    traced_share: float = 0.0
    """Share of requests whose way through the server is traced, by OpenTelemetry, to OTEL_EXPORTER_OTLP_ENDPOINT."""
    request_timeout_seconds: float = 30.0
    """A request the model has not answered by then is answered 503."""
    popularity_half_life_days: float | None = None
    """With it the training events of the fallback are those of late: one that is so much older than the newest counts
    half. None: all count the same."""
    store: str = "index"
    """Where events, items and feedback that are sent are kept: a SQLite file on the node of all replicas, or the
    `redis://` URL of a server that all nodes reach; `index`: live.sqlite in the index folder where that is local and
    can be written; `none`: nothing is kept."""
    store_password: str | None = None
    """Of a Redis store; PIXREC_STORE_PASSWORD in the environment keeps it out of files and URLs."""
    store_half_life_days: float = 7.0
    """The fallback goes by the events of the store, of which one that is so old counts half, and where there are few of
    them by the training events as well. Another value begins to count anew."""
    max_items: int = 100
    """Most items in one request of /v1/items."""
    max_live_items: int = 100_000
    """Most items that were added, changed or hidden; each replica holds their vectors and columns."""
    max_events: int = 1000
    """Most events in one request."""
    max_events_kept: int = 1000
    """Events kept of each user, the newest."""
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
    max_image_bytes: int = 8_000_000
    """Largest picture in a request, in bytes of its file."""
    max_image_pixels: int = 64_000_000
    """Largest picture in a request, in pixels; what has more is not decoded."""
    image_uris: tuple[str, ...] = ("http://", "https://", "s3://")
    """Beginnings of the URIs by which a request of /v1/items may name a picture, which the server then reads: a folder
    or a bucket, such as `s3://pictures/`, too. []: pictures come with the request only."""
    allow_private_addresses: bool = False
    """Read such pictures also from loopback, private and link-local addresses, which are refused otherwise."""
    max_embedded: int = 64
    """Most texts, pictures, items and histories, all together, in one request of /v1/embed."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_batch_size", "num_replicas", "max_ongoing_requests", "max_k", "max_request_items")
        at_least(self, 1, "threads_per_replica", "num_ingress_replicas", "max_queued_requests", "retry_after_seconds")
        at_least(self, 1, "max_text_characters", "max_body_bytes", "max_new_items")
        at_least(self, 0, "batch_wait_seconds", "cpus_per_replica", "gpus_per_replica", "cpus_per_ingress")
        at_least(self, 1, "max_image_bytes", "max_image_pixels", "max_embedded", "request_burst", "max_replicas")
        at_least(self, 1, "max_events", "max_events_kept", "max_items", "max_live_items")
        at_least(self, 0, "num_retrieval_replicas", "cpus_per_retrieval", "min_replicas", "poll_seconds")
        at_least(self, 1, "retrieval_shards")
        between(self, 0, 1, "canary_share", "traced_share", "new_item_share")
        above_zero(self, "request_timeout_seconds", "load_timeout_seconds", "shard_timeout_seconds")
        if self.retrieval_shards > 1 and not self.num_retrieval_replicas:
            raise ConfigError(
                f"serve.retrieval_shards {self.retrieval_shards} needs serve.num_retrieval_replicas of at least 1"
            )
        above_zero(self, "requests_per_second", "target_ongoing_requests")
        above_zero(self, "popularity_half_life_days", "store_half_life_days")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ConfigError(f"serve.max_replicas {self.max_replicas} is below serve.min_replicas {self.min_replicas}")
        if not all(self.api_keys):
            raise ConfigError("serve.api_keys holds an empty key")
        if self.max_ongoing_requests < self.max_batch_size:
            raise ConfigError(
                f"serve.max_ongoing_requests {self.max_ongoing_requests} is below serve.max_batch_size "
                f"{self.max_batch_size}: batches would never fill"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key of the /v1 routes; none: they are open."""
        return (*([self.api_key] if self.api_key else []), *self.api_keys)

    @property
    def most_replicas(self) -> int:
        """Replicas of the model deployment at most."""
        return self.max_replicas or self.num_replicas

    @property
    def max_calls(self) -> int:
        """Calls that an HTTP replica has under way at most; what is asked meanwhile goes together in the next.

        A replica of the model computes one and has the next at hand. Where their number follows the load, there are as
        many as should be ongoing in all: Serve counts calls, and starts another replica by them.
        """
        of_each = 2.0 if self.max_replicas is None else max(2.0, self.target_ongoing_requests)
        return math.ceil(self.most_replicas * of_each / self.num_ingress_replicas)

    @property
    def max_in_flight(self) -> int:
        """Requests that an HTTP replica admits: those of its calls, and those that wait."""
        under_way = min(self.max_calls * self.max_batch_size, self.most_replicas * self.max_ongoing_requests)
        return under_way + self.max_queued_requests
