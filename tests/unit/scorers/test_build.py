from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model, users_of

from pixrec.artifact import Model
from pixrec.config import Config, EvaluateConfig
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Dataset
from pixrec.errors import ConfigError, InputError
from pixrec.evaluation import evaluate_scorers
from pixrec.scorers import Inputs, build_scorers
from pixrec.scorers.towers import REPLACEMENTS

USERS = users_of([np.array([0, 1, 2]), np.array([7])])


def silent(stage: str, done: int, total: int | None) -> None:
    pass


def build(dataset: Dataset, model: Model | None = None, **settings):
    inputs = Inputs("nowhere", model) if model else Inputs()
    return build_scorers(dataset, Config(evaluate=EvaluateConfig(**settings)), inputs, silent)


def test_the_default_needs_neither_model_nor_content(dataset: Dataset):
    scorers, made = build(dataset)
    assert [s.name for s in scorers] == ["popularity", "recent_popularity", "repeat_last", "item_transition"]
    assert made == {}
    for scorer in scorers:
        scores = scorer.scores(USERS)
        assert scores.shape == (2, 12)
        assert scores.isfinite().all()


def test_names_are_given_in_order_after_the_model(dataset: Dataset, model: Model):
    names = ("rrf", "content_linear", "pixrec_text_constant", "round_robin", "popularity")
    scorers, made = build(dataset, model, scorers=names, fused=("content_linear", "repeat_last"))
    own = ["pixrec", "pixrec_text_only", "pixrec_image_only", "pixrec_text_constant"]
    assert [s.name for s in scorers] == [*own, "rrf", "content_linear", "round_robin", "popularity"]
    assert made["pixrec_text_constant"] == "replaced"
    assert all(scorer.scores(USERS).shape == (2, 12) for scorer in scorers)


def test_neighbours_by_content_need_frozen_encoders(dataset: Dataset, model: Model):
    with pytest.raises(InputError, match="names content_neighbours, but the model has no frozen encoders"):
        build(dataset, model, scorers=("content_neighbours",))
    with pytest.raises(InputError, match="names content_neighbours, which needs a --model"):
        build(dataset, scorers=("content_neighbours",))


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
        scorers, _ = build_scorers(data, Config(evaluate=config), Inputs("nowhere", model), silent)
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
        scorer.scores(USERS)[0]
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
        ({"scorers": ("rrf",)}, InputError, "evaluate.fused names pixrec, which needs a --model"),
        ({"scorers": ("generative_bm25",)}, InputError, "generative_bm25, which needs a --model"),
    ],
)
def test_names_that_cannot_be_made(dataset: Dataset, settings, error, message):
    with pytest.raises(error, match=message):
        build(dataset, **settings)


def test_a_model_without_the_knockout_that_is_merged(dataset: Dataset, items: ItemTable):
    blind = tiny_model(tiny_config(model={"modalities": "text"}), items)
    with pytest.raises(InputError, match="names pixrec_text_only, which needs a --model that has it"):
        build(dataset, blind, scorers=("rrf",), fused=("pixrec_text_only", "popularity"))


def test_a_model_of_one_modality_cannot_lose_the_other(dataset: Dataset, items: ItemTable):
    blind = tiny_model(tiny_config(model={"modalities": "text"}), items)
    with pytest.raises(InputError, match="pixrec_image_noise, but nowhere was trained on one modality"):
        build(dataset, blind, scorers=("pixrec_image_noise",))
