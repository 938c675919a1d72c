import numpy as np
import pytest
from fakes import tiny_items, tiny_model

from pixrec.model.encoding import Content, train_tokenizer


@pytest.fixture(scope="module")
def encoder():
    return tiny_model().encoder


PICTURE = np.zeros((32, 32, 3), np.uint8)


def test_an_item_is_its_text_then_its_picture(encoder):
    items = encoder.items([Content("Square", PICTURE), Content("Tile", None), Content("", PICTURE)])
    tokenizer = encoder.tokenizer
    row = items.token_ids[0][items.is_token[0]].tolist()
    text = len(encoder.tokenize(["Square"])[0])
    picture = ["<fake_token_around_image>", "<global-img>", *["<image>"] * 4, "<fake_token_around_image>"]
    assert tokenizer.convert_ids_to_tokens(row[text:]) == picture
    assert items.is_text[0].sum() == text
    assert items.picture_slot[0][items.picture_slot[0] >= 0].tolist() == [0, 1, 2, 3]
    assert (items.picture_slot[1] == -1).all()
    assert items.picture_slot[2][items.picture_slot[2] >= 0].tolist() == [4, 5, 6, 7]
    assert items.pixels.shape == (2, 32, 32, 3)


def test_a_history_is_its_items_each_closed_by_a_separator(encoder):
    items = encoder.items([Content("Square", PICTURE), Content("Tile", None)])
    sequences = encoder.histories(items, [np.array([1, 0, 1]), np.array([0])])
    rows = [items.token_ids[i][items.is_token[i]].tolist() for i in (0, 1)]
    separator = encoder.separator_id
    expected = [*rows[1], separator, *rows[0], separator, *rows[1], separator]
    assert sequences.token_ids[0].tolist() == expected
    assert sequences.token_ids[1][sequences.is_token[1]].tolist() == [*rows[0], separator]
    assert sequences.token_ids[0][sequences.separator_at[0]].tolist() == [separator] * 3
    assert sequences.item.tolist() == [[1, 0, 1], [0, -1, -1]]
    assert sequences.position[0].tolist() == [
        *[0] * (len(rows[1]) + 1), *[1] * (len(rows[0]) + 1), *[2] * (len(rows[1]) + 1)
    ]  # fmt: skip


def test_modalities_may_differ_from_item_to_item(encoder):
    contents = [Content("Square", PICTURE)] * 3
    items = encoder.items(contents, ["both", "text", "image"])
    assert items.pixels.shape[0] == 2
    assert items.is_text.any(dim=1).tolist() == [True, True, False]
    assert (items.picture_slot >= 0).any(dim=1).tolist() == [True, False, True]


def test_text_is_cut_to_the_limit(encoder):
    assert len(encoder.tokenize(["word " * 100])[0]) == encoder.max_text_tokens


def test_the_tokenizer_is_deterministic_and_loses_no_text():
    texts = [tiny_items().text(row) for row in range(12)]
    first, second = train_tokenizer(texts, 400), train_tokenizer(texts, 400)
    assert first.get_vocab() == second.get_vocab()
    unseen = "Ünïcode ✓ 漢字"
    assert first.decode(first(unseen)["input_ids"]).strip() == unseen
