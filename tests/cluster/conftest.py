from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors, but for those that Ray raises about itself."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."))
            item.add_marker(pytest.mark.filterwarnings(r"ignore::FutureWarning:ray\."))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The one Ray instance of the test run."""
    from pixrec.cluster.session import connect

    with connect(progress=False):
        yield
