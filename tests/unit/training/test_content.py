"""The vectors that a compact tower learns on: a table in memory and one in a mapped file are the same."""

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model

from pixrec.model.catalog import Catalog
from pixrec.training import content as module
from pixrec.training.content import content_table


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXREC_CACHE", str(tmp_path))
    config = tiny_config(model={"user_tower": "compact"})
    dataset = tiny_dataset(tiny_items(11), num_users=4)
    model = tiny_model(config, dataset.items)
    return model, Catalog(dataset.items, model.encoder), config, config.model.embedding_width


def test_a_large_table_is_written_in_blocks_and_mapped(parts, tmp_path, monkeypatch):
    expected = content_table(*parts)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "MAPPED_FROM", 1)
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 4)
    found = content_table(*parts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # batches of other sizes round otherwise
    (file,) = tmp_path.iterdir()
    np.testing.assert_array_equal(np.load(file), found.numpy())


def test_a_run_that_goes_on_finds_the_table_and_another_model_does_not(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAPPED_FROM", 1)
    content_table(*parts)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(module, "item_table", lambda *args, **kwargs: pytest.fail("computed again"))
    content_table(*parts)
    monkeypatch.undo()
    monkeypatch.setenv("PIXREC_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "MAPPED_FROM", 1)
    with torch.no_grad():
        parts[0].tower.item_proj.weight.mul_(2)
    content_table(*parts)
    assert len(list(tmp_path.iterdir())) == 2
    assert file.exists()
