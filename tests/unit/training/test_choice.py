"""What is trained where nobody says, by what the data is."""

import numpy as np
import pytest
from fakes import tiny_dataset, tiny_items

from pixrec.config import Config, change_config
from pixrec.data.items import ItemTable
from pixrec.training import choice
from pixrec.training.choice import choose


def bare_items(n: int = 12) -> ItemTable:
    """Items of which nothing but the id is known."""
    table = tiny_items(n, with_pictures=False)._table
    for name in ("title", "brand", "category", "description", "price"):
        table = table.set_column(table.column_names.index(name), name, [[None] * n])
    return ItemTable(table)


def chosen(dataset, **options) -> Config:
    return change_config(Config(), choose(dataset, **options).settings)


def test_content_and_the_extra_give_frozen_encoders_of_what_there_is():
    both, text = tiny_dataset(), tiny_dataset(tiny_items(with_pictures=False))
    assert chosen(both, pretrained=True).model.text_encoder == choice.TEXT_ENCODER
    assert chosen(both, pretrained=True).model.modalities == "both"
    assert chosen(text, pretrained=True).model.modalities == "text"
    assert "frozen pretrained encoders of texts, and learned ids" in choose(text, pretrained=True).why


def test_without_the_extra_the_tiny_backbone_reads_the_content():
    config = chosen(tiny_dataset(), pretrained=False)
    assert (config.model.backbone, config.model.text_encoder, config.model.user_tower) == (
        "pixrec-tiny", None, "compact"
    )  # fmt: skip
    assert "pixrec[pretrained] is not installed" in choose(tiny_dataset(), pretrained=False).why


@pytest.mark.parametrize("pretrained", [True, False])
def test_without_content_ids_are_learned_alone(pretrained):
    dataset = tiny_dataset(bare_items())
    config = chosen(dataset, pretrained=pretrained)
    assert config.model.backbone == "none"
    assert config.model.content_width == 0
    assert "neither text nor picture" in choose(dataset, pretrained=pretrained).why


def test_ids_of_many_events_are_dropped_less_and_content_is_learned_slowly_beside_them():
    few, many = tiny_dataset(), tiny_dataset(num_users=400)
    assert chosen(few, pretrained=True).train.compact.content_learning_rate is None
    assert chosen(many, pretrained=True).train.compact.content_learning_rate == choice.SLOW_CONTENT
    assert chosen(many, pretrained=False).train.compact.content_learning_rate is None
    dropped = [chosen(data, pretrained=True).model.compact.id_dropout_events for data in (few, many)]
    assert dropped == [None, choice.HALF_DROPPED_AT]


def test_many_events_an_item_give_a_wide_tower(monkeypatch):
    few, many = tiny_dataset(), tiny_dataset(num_users=400)
    assert chosen(few, pretrained=True).model.compact_width == 128
    assert np.mean(many.training_counts()) > choice.MANY_EVENTS
    assert chosen(many, pretrained=True).model.compact_width == 256
    monkeypatch.setattr(choice, "LARGE_CATALOG", 5)
    assert chosen(few, pretrained=True).train.compact.loss == "sampled"
    assert chosen(many, pretrained=True).train.compact.loss == "full"


def test_few_long_histories_are_taken_a_few_at_a_time(monkeypatch):
    few, many = tiny_dataset(), tiny_dataset(num_users=400)
    usual = Config().train.compact.histories_per_step
    assert chosen(few, pretrained=True).train.compact.histories_per_step == usual
    assert chosen(many, pretrained=True).train.compact.histories_per_step < usual
    monkeypatch.setattr(choice, "FEW_HISTORIES", 10)
    assert chosen(many, pretrained=True).train.compact.histories_per_step == usual


def test_what_is_chosen_is_served_blended_and_said_in_one_line():
    for pretrained in (True, False):
        assert chosen(tiny_dataset(), pretrained=pretrained).serve.blend
        assert "\n" not in choose(tiny_dataset(), pretrained=pretrained).why
