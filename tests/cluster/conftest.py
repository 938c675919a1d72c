from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pixrec import storage

HERE = Path(__file__).parent
BUCKET = "s3://warehouse"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors, but for those that Ray raises about itself."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."))
            item.add_marker(pytest.mark.filterwarnings(r"ignore::FutureWarning:ray\."))


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An empty bucket on a server on the loopback, known to this process and its children by the usual variables."""
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        patch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    fs, _ = storage._locate(BUCKET)
    fs.clear_instance_cache()  # another test's server
    fs, _ = storage._locate(BUCKET)
    fs.mkdir(BUCKET.removeprefix("s3://"))
    yield BUCKET
    fs.clear_instance_cache()
    server.stop()
    patch.undo()


@pytest.fixture(scope="session")
def ray_session(bucket: str) -> Iterator[None]:
    """The one Ray instance of the test run; its workers know the bucket's server."""
    from pixrec.cluster.session import connect

    with connect(progress=False):
        yield
