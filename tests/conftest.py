"""Keeps one tiny catalog and model for the whole run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# `make test` runs two things at a time. So a process of the tests has one thread, and where a setting asks for two they
# do not wait for each other by turning in circles. Read when torch, faiss and NumPy are loaded.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
import torch
from fakes import tiny_dataset, tiny_items, tiny_model

from pixrec.artifact import Model
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Dataset

# Around every test pytest hooks each logger that does not propagate. Torch has 55 of them: 2 ms a test.
for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch")]:
    logging.getLogger(name).propagate = True


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Also after a test that set another number, as whoever embeds, ranks or trains does for its whole process."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def items() -> ItemTable:
    return tiny_items()


@pytest.fixture(scope="session")
def dataset(items: ItemTable) -> Dataset:
    return tiny_dataset(items)


@pytest.fixture(scope="session")
def model(items: ItemTable) -> Model:
    """Interleaved user tower; read only."""
    return tiny_model(items=items)
