from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_items, tiny_model, users_of, write_model

from pixrec.artifact import Index, Model, knockout_uri
from pixrec.data.items import ItemTable
from pixrec.errors import ArtifactError
from pixrec.model.catalog import Catalog, Embedder
from pixrec.scorers.towers import TowerScorer, aligned, tower_scorers

HISTORIES = [np.array([0, 1, 2]), np.array([7])]
USERS = users_of(HISTORIES)


def silent(stage: str, done: int, total: int | None) -> None:
    pass


def index_of(model: Model, items: ItemTable, rows: np.ndarray) -> Index:
    vectors = model.embedder().items(Catalog(items, model.encoder), rows)
    return Index("v1", [items.item_ids[row] for row in rows], vectors, {})


@pytest.mark.parametrize("user_tower", ["compact", "interleaved"])
def test_scores_are_cosines_of_users_and_items(items: ItemTable, user_tower: str):
    model = tiny_model(tiny_config(model={"user_tower": user_tower}), items)
    catalog, embedder = Catalog(items, model.encoder), model.embedder()
    vectors = embedder.items(catalog, np.arange(len(items)))
    scores = TowerScorer("mine", embedder, catalog, vectors).scores(USERS)
    assert (tuple(scores.shape), scores.dtype) == ((2, 12), torch.float32)
    users = embedder.users(catalog, HISTORIES, vectors)
    np.testing.assert_allclose(scores.numpy(), users @ vectors.T, atol=1e-6)
    assert scores.abs().max() <= 1 + 1e-5


def test_a_model_without_knockouts_is_scored_with_one_modality_removed(tmp_path: Path, items: ItemTable, model: Model):
    stages: list[tuple[str, int, int | None]] = []
    scorers, made = tower_scorers(str(tmp_path), model, items, None, lambda *row: stages.append(row))
    assert [scorer.name for scorer in scorers] == ["pixrec", "pixrec_text_only", "pixrec_image_only"]
    assert made == {"pixrec_text_only": "scored", "pixrec_image_only": "scored"}
    assert stages == [(f"items of {scorer.name}", 12, 12) for scorer in scorers]
    both, text, image = (scorer.scores(USERS) for scorer in scorers)
    assert not torch.allclose(both, text)
    assert not torch.allclose(both, image)
    # items 0 and 6 share title, brand and price: the text alone cannot tell them apart, the pictures can
    torch.testing.assert_close(text[:, 0], text[:, 6])
    assert not torch.allclose(image[:, 0], image[:, 6])


def test_a_knockout_that_was_trained_is_used(tmp_path: Path, items: ItemTable, model: Model):
    config = tiny_config(model={"modalities": "text"}, train={"seed": 5})
    knockout = write_model(knockout_uri(str(tmp_path), "text"), tiny_model(config, items))
    scorers, made = tower_scorers(str(tmp_path), model, items, None, silent)
    assert made == {"pixrec_text_only": "trained", "pixrec_image_only": "scored"}
    catalog, embedder = Catalog(items, knockout.encoder), knockout.embedder()
    vectors = embedder.items(catalog, np.arange(len(items)))
    expected = TowerScorer("own", embedder, catalog, vectors).scores(USERS)
    torch.testing.assert_close(scorers[1].scores(USERS), expected)


def test_a_model_of_one_modality_has_no_knockouts(tmp_path: Path, items: ItemTable):
    blind = tiny_model(tiny_config(model={"modalities": "text"}), items)
    scorers, made = tower_scorers(str(tmp_path), blind, items, None, silent)
    assert ([scorer.name for scorer in scorers], made) == (["pixrec"], {})
    # the whole model never looks at a picture, in the items or in the history
    without = tower_scorers(str(tmp_path), blind, tiny_items(with_pictures=False), None, silent)[0]
    torch.testing.assert_close(scorers[0].scores(USERS), without[0].scores(USERS))


def test_an_index_stands_in_for_the_item_tower(
    tmp_path: Path, items: ItemTable, model: Model, monkeypatch: pytest.MonkeyPatch
):
    expected = tower_scorers(str(tmp_path), model, items, None, silent)[0][0].scores(USERS)
    index = index_of(model, items, np.arange(len(items))[::-1])
    embedded: list[str] = []
    items_of = Embedder.items
    monkeypatch.setattr(Embedder, "items", lambda self, *a, **k: embedded.append(self.modalities) or items_of(self, *a))
    scorers, _ = tower_scorers(str(tmp_path), model, items, index, silent)
    assert embedded == ["text", "image"]
    torch.testing.assert_close(scorers[0].scores(USERS), expected)


def test_an_index_must_hold_the_very_same_items(items: ItemTable, model: Model):
    rows = np.arange(len(items))
    index = index_of(model, items, rows[::-1])
    np.testing.assert_array_equal(aligned(index, items), index.vectors[::-1])
    short = index_of(model, items, rows[:-1])
    other = dataclasses.replace(index, item_ids=["new", *index.item_ids[1:]])
    for each, count in ((short, 11), (other, 12)):
        with pytest.raises(ArtifactError, match=f"index version v1 holds {count} items, the data set 12.*pixrec embed"):
            aligned(each, items)


def test_equal_items_get_equal_scores_wherever_they_lie():
    """Also among the last rows of a product, which BLAS sums in another order."""
    vectors = np.repeat(np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32), 1003, axis=0)

    class Users:
        device = torch.device("cpu")

        def users(self, catalog, histories, item_vectors, timestamps=None):
            return np.random.default_rng(1).normal(size=(len(histories), 40)).astype(np.float32)

    scores = TowerScorer("equal", Users(), None, vectors).scores(USERS)
    assert scores.shape == (2, 1003)
    assert (scores == scores[:, :1]).all()


def test_replaced_modalities_are_scored_beside_the_knockouts(tmp_path: Path, items: ItemTable, model: Model):
    names = ["pixrec_image_constant", "pixrec_text_noise"]
    scorers, made = tower_scorers(str(tmp_path), model, items, None, silent, names)
    assert [scorer.name for scorer in scorers][3:] == names
    assert {name: made[name] for name in names} == dict.fromkeys(names, "replaced")
    both, _, _, constant, other = (scorer.scores(USERS) for scorer in scorers)
    torch.testing.assert_close(constant[:, 0], constant[:, 6])  # their texts are alike, and so are all pictures now
    assert not torch.allclose(both[:, 0], both[:, 6])
    assert not torch.allclose(both, other)
