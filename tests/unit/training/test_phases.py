"""What a training that goes on from an earlier model begins with. All else of a phase's beginning is seen under Ray, in
tests/cluster/test_train.py."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model, write_model, write_prepared

from pixrec.artifact import load_model
from pixrec.data.sequences import load_dataset
from pixrec.model.catalog import Catalog
from pixrec.training.phases import begin


@pytest.fixture
def origin(tmp_path: Path) -> str:
    """A model that knows half of the items by a vector of their own."""
    items = tiny_items()
    model = tiny_model(tiny_config(model={"user_tower": "compact", "compact": {"id_embedding": True}}), items)
    torch.nn.init.normal_(model.tower.compact.id_embedding.weight)
    write_model(tmp_path / "origin", model)
    write_prepared(tmp_path / "data", tiny_dataset(items))
    return str(tmp_path / "origin")


def continued(origin: str):
    config = tiny_config(model={"user_tower": "compact", "compact": {"id_embedding": True}})
    return dataclasses.replace(config, train=dataclasses.replace(config.train, start=origin))


def test_the_compact_tower_goes_on_by_id_and_new_items_begin_as_their_content(origin: str, tmp_path: Path):
    before, data = load_model(origin), str(tmp_path / "data")
    begun = begin("compact", [data], continued(origin), "cpu", start=origin)
    tower, ids = begun.model.tower.compact, begun.model.embedded_ids
    known = before.embedded_ids.rows_of(pa.array(list(ids)))
    assert 0 < (known >= 0).sum() < len(ids)
    torch.testing.assert_close(
        tower.id_embedding.weight[known >= 0], before.tower.compact.id_embedding.weight[known[known >= 0]]
    )
    assert not tower.id_embedding.weight[known < 0].any()
    for name, weight in before.tower.compact.state_dict().items():
        if name != "id_embedding.weight":
            torch.testing.assert_close(tower.state_dict()[name], weight, msg=name)
    catalog = Catalog(load_dataset(data).items, before.encoder)
    expected = before.embedder().items(catalog, np.arange(len(catalog)))
    np.testing.assert_allclose(begun.trainer.item_vectors().numpy(), expected, atol=1e-5)
    first = next(iter(begun.trainer.validations(begun.held_out)))
    assert (first["epoch"], begun.trainer.step) == (0, 0), "what it began with may be the best"


def test_the_item_tower_goes_on_without_the_compact_one(origin: str, tmp_path: Path):
    before = load_model(origin)
    begun = begin("interleaved", [str(tmp_path / "data")], continued(origin), "cpu", start=origin)
    assert begun.model.tower.compact is None
    assert len(begun.model.embedded_ids) == 0
    assert not [name for name in begun.trainer.named if name.startswith("compact.")]
    for name, weight in before.tower.backbone.state_dict().items():
        torch.testing.assert_close(begun.model.tower.backbone.state_dict()[name], weight)
