from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model, write_model

from pixrec.artifact import Index, Model, knockout_uri
from pixrec.config import Config, EvaluateConfig
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Dataset
from pixrec.errors import ArtifactError, ConfigError, InputError
from pixrec.evaluation.protocol import evaluate_scorers
from pixrec.model.catalog import Catalog, Embedder
from pixrec.scorers.build import REPLACEMENTS, Sources, TowerScorer, aligned, build_scorers, tower_scorers

HISTORIES = [np.array([0, 1, 2]), np.array([7])]


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
    scores = TowerScorer("mine", embedder, catalog, vectors).scores(HISTORIES)
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
    both, text, image = (scorer.scores(HISTORIES) for scorer in scorers)
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
    expected = TowerScorer("own", embedder, catalog, vectors).scores(HISTORIES)
    torch.testing.assert_close(scorers[1].scores(HISTORIES), expected)


def test_a_model_of_one_modality_has_no_knockouts(tmp_path: Path, items: ItemTable):
    blind = tiny_model(tiny_config(model={"modalities": "text"}), items)
    scorers, made = tower_scorers(str(tmp_path), blind, items, None, silent)
    assert ([scorer.name for scorer in scorers], made) == (["pixrec"], {})
    # the whole model never looks at a picture, in the items or in the history
    without = tower_scorers(str(tmp_path), blind, tiny_items(with_pictures=False), None, silent)[0]
    torch.testing.assert_close(scorers[0].scores(HISTORIES), without[0].scores(HISTORIES))


def test_an_index_stands_in_for_the_item_tower(
    tmp_path: Path, items: ItemTable, model: Model, monkeypatch: pytest.MonkeyPatch
):
    expected = tower_scorers(str(tmp_path), model, items, None, silent)[0][0].scores(HISTORIES)
    index = index_of(model, items, np.arange(len(items))[::-1])
    embedded: list[str] = []
    items_of = Embedder.items
    monkeypatch.setattr(Embedder, "items", lambda self, *a, **k: embedded.append(self.modalities) or items_of(self, *a))
    scorers, _ = tower_scorers(str(tmp_path), model, items, index, silent)
    assert embedded == ["text", "image"]
    torch.testing.assert_close(scorers[0].scores(HISTORIES), expected)


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

    scores = TowerScorer("equal", Users(), None, vectors).scores(HISTORIES)
    assert scores.shape == (2, 1003)
    assert (scores == scores[:, :1]).all()


def test_replaced_modalities_are_scored_beside_the_knockouts(tmp_path: Path, items: ItemTable, model: Model):
    names = ["pixrec_image_constant", "pixrec_text_noise"]
    scorers, made = tower_scorers(str(tmp_path), model, items, None, silent, names)
    assert [scorer.name for scorer in scorers][3:] == names
    assert {name: made[name] for name in names} == dict.fromkeys(names, "replaced")
    both, _, _, constant, other = (scorer.scores(HISTORIES) for scorer in scorers)
    torch.testing.assert_close(constant[:, 0], constant[:, 6])  # their texts are alike, and so are all pictures now
    assert not torch.allclose(both[:, 0], both[:, 6])
    assert not torch.allclose(both, other)


def build(dataset: Dataset, model: Model | None = None, **settings):
    sources = Sources("nowhere", model) if model else Sources()
    return build_scorers(dataset, Config(evaluate=EvaluateConfig(**settings)), sources, silent)


def test_the_default_needs_neither_model_nor_content(dataset: Dataset):
    scorers, made = build(dataset)
    assert [s.name for s in scorers] == ["popularity", "recent_popularity", "repeat_last", "item_transition"]
    assert made == {}
    for scorer in scorers:
        scores = scorer.scores(HISTORIES)
        assert scores.shape == (2, 12)
        assert scores.isfinite().all()


def test_names_are_given_in_order_after_the_model(dataset: Dataset, model: Model):
    names = ("rrf", "content_linear", "pixrec_text_constant", "round_robin", "popularity")
    scorers, made = build(dataset, model, scorers=names, fused=("content_linear", "repeat_last"))
    own = ["pixrec", "pixrec_text_only", "pixrec_image_only", "pixrec_text_constant"]
    assert [s.name for s in scorers] == [*own, "rrf", "content_linear", "round_robin", "popularity"]
    assert made["pixrec_text_constant"] == "replaced"
    assert all(scorer.scores(HISTORIES).shape == (2, 12) for scorer in scorers)


def shuffled(dataset: Dataset, order: np.ndarray) -> Dataset:
    """The same items and events with the catalog in another order."""
    events = dataclasses.replace(dataset.events, rows=np.argsort(order)[dataset.events.rows])
    return dataclasses.replace(dataset, items=ItemTable(dataset.items._table.take(order)), events=events)


def test_no_figure_depends_on_the_order_of_the_catalog(items: ItemTable, model: Model):
    """Every scorer but those trained on the spot, ties included: titles and brands are shared, and all items of a kind
    were bought alike."""
    names = (
        "popularity",
        "recent_popularity",
        "repeat_last",
        "item_transition",
        "content_linear",
        "generative_bm25",
        "rrf",
        "round_robin",
        *REPLACEMENTS,
    )
    dataset = tiny_dataset(tiny_items(with_pictures=False), num_users=12)
    config = EvaluateConfig(scorers=names, ks=(1, 3, 10), bootstrap_samples=10)

    def measured(order: np.ndarray) -> dict:
        data = shuffled(dataset, order)
        scorers, _ = build_scorers(data, Config(evaluate=config), Sources("nowhere", model), silent)
        return evaluate_scorers(
            scorers,
            data.held_out("test"),
            config,
            training_counts=data.training_counts(),
            with_image=data.items.with_image,
            item_ids=data.items.item_ids,
        ).metrics_json("leave_one_out")

    straight = measured(np.arange(12))
    assert straight["guards"]["tie_share"]["pixrec"] > 0.5
    for seed in range(3):
        again = measured(np.random.default_rng(seed).permutation(12))
        assert again["results"] == straight["results"]
        assert again["guards"] == straight["guards"]


def test_recent_popularity_sees_training_events_only(dataset: Dataset):
    scorer = build(dataset, scorers=("recent_popularity",), recent_share=1.0)[0][0]
    counts = torch.from_numpy(dataset.training_counts())
    assert (
        scorer.scores(HISTORIES)[0]
        .argsort(descending=True, stable=True)
        .equal(counts.argsort(descending=True, stable=True))
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scorers": ("popularty",)}, ConfigError, "evaluate.scorers names 'popularty'; did you mean 'popularity'"),
        ({"scorers": ("rrf",), "fused": ("pixrec", "rrf")}, ConfigError, "evaluate.fused names 'rrf'"),
        ({"scorers": ("content_linear",)}, InputError, "needs a --model"),
        ({"scorers": ("pixrec_image_noise",)}, InputError, "names pixrec_image_noise, which needs a --model"),
        ({"scorers": ("generative_bm25",)}, InputError, "generative_bm25, which needs --model"),
    ],
)
def test_names_that_cannot_be_made(dataset: Dataset, settings, error, message):
    with pytest.raises(error, match=message):
        build(dataset, **settings)


def test_a_model_of_one_modality_cannot_lose_the_other(dataset: Dataset, items: ItemTable):
    blind = tiny_model(tiny_config(model={"modalities": "text"}), items)
    with pytest.raises(InputError, match="pixrec_image_noise, but nowhere was trained on one modality"):
        build(dataset, blind, scorers=("pixrec_image_noise",))
