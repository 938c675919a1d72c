"""A server in this process: the HTTP application over a replica, without Ray Serve and without a port."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client, about packages that it may prefer one day
    from starlette.testclient import TestClient

from pixrec.config import ServeConfig
from pixrec.serving.backend import Backend
from pixrec.serving.http import create_api
from pixrec.serving.published import Source
from pixrec.serving.replicas import RecommenderReplica, store_of

if TYPE_CHECKING:
    from collections.abc import Iterator


class OneByOne(RecommenderReplica):
    """Answers each call by itself: Ray Serve gathers them."""

    def __init__(self, source: Source, config: ServeConfig) -> None:
        super().__init__(source, config)
        self._answer_together: Any = self.answer_all


class Served:
    """What a client of the server and its operator can do."""

    def __init__(self, client: TestClient, replica: OneByOne) -> None:
        self.client, self._replica = client, replica

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer. Raises where it is no success."""
        return self.client.post(path, json=body).raise_for_status().json()

    def reload(self) -> None:
        """Serve what was published last. Raises AssertionError where that is refused."""
        assert self.client.portal is not None
        assert self.client.portal.call(self._replica.reload).outcome != "refused"


@contextmanager
def served(source: Source, config: ServeConfig) -> Iterator[Served]:
    replica = OneByOne(source, config)
    store = store_of(config)
    headers = {"X-API-Key": config.admin_key or ""}
    with TestClient(create_api(cast(Backend, replica), config, None, store), headers=headers) as client:
        yield Served(client, replica)
    if store is not None:
        store.close()
