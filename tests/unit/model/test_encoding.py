import numpy as np
import pytest
from fakes import tiny_items, tiny_model
from transformers import Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from pixrec.model.encoding import Content, picture_facts, train_tokenizer


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


def test_pictures_and_stored_tokens_stand_in_one_batch(encoder):
    """Pictures still to be encoded come first among the picture tokens, whatever the order of the items."""
    tokens = [np.full((4, 32), value, np.float32) for value in (1, 2)]
    contents = [Content("", tokens[0]), Content("", PICTURE), Content("Tile", None), Content("", tokens[1])]
    items = encoder.items([*contents, Content("", PICTURE + 9)])
    assert items.pixels.amax(dim=(1, 2, 3)).tolist() == [0, 9]
    assert items.ready[:, 0, 0].tolist() == [1, 2]
    slots = [row[row >= 0].tolist() for row in items.picture_slot]
    assert slots == [[8, 9, 10, 11], [0, 1, 2, 3], [], [12, 13, 14, 15], [4, 5, 6, 7]]
    seen = encoder.items(contents, ["text", "both", "both", "image"])
    assert [row[row >= 0].tolist() for row in seen.picture_slot] == [[], [0, 1, 2, 3], [], [4, 5, 6, 7]]


@pytest.mark.parametrize("whole", [True, False], ids=["processor_config.json", "preprocessor_config.json"])
def test_pixel_statistics_are_those_of_the_saved_processor(tmp_path, whole):
    tokenizer = train_tokenizer(["Square Tile"], 300)
    processor = Idefics3ImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    (Idefics3Processor(processor, tokenizer) if whole else processor).save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists() is not whole
    assert picture_facts(str(tmp_path))[:2] == ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
