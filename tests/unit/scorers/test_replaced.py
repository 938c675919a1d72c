import numpy as np
import pytest
from fakes import tiny_items

from pixrec.data.images import decode_image
from pixrec.data.items import ItemTable
from pixrec.scorers.replaced import REPLACED, ReplacedItems

ITEMS = tiny_items(with_pictures={0, 1, 2})


@pytest.mark.parametrize("how", REPLACED)
def test_one_modality_is_replaced_and_all_else_stays(how):
    before = ITEMS.with_image.copy()
    items = ReplacedItems(ITEMS, how, 16)
    texts, pictures = ([f(row) for row in range(len(items))] for f in (items.text, items.image))
    kept = how.startswith("text")
    assert (pictures == [ITEMS.image(row) for row in range(len(items))]) == kept
    assert (texts == [ITEMS.text(row) for row in range(len(items))]) != kept
    assert items.with_image.all() != kept
    assert items.item_ids == ITEMS.item_ids
    assert items.fields(3) == ITEMS.fields(3)
    np.testing.assert_array_equal(ITEMS.with_image, before)


def test_a_constant_is_one_and_noise_is_one_each_again_and_again():
    grey, noise = (ReplacedItems(ITEMS, how, 16) for how in ("image_constant", "image_noise"))
    assert len({grey.image(row) for row in range(12)}) == 1
    assert decode_image(grey.image(0), 16).std() == 0
    assert len({noise.image(row) for row in range(12)}) == 12
    assert noise.image(5) == ReplacedItems(ITEMS, "image_noise", 16).image(5)
    assert noise.image(5) != ReplacedItems(ITEMS, "image_noise", 16, seed=1).image(5)
    assert decode_image(noise.image(5), 16).std() > 50
    assert len({ReplacedItems(ITEMS, "text_constant", 16).text(row) for row in range(12)}) == 1


def test_every_item_gets_the_text_of_another_one():
    items = ReplacedItems(ITEMS, "text_noise", 16)
    others = items._other
    assert sorted(others) == list(range(12))
    assert (others != np.arange(12)).all()
    assert [items.text(row) for row in range(12)] == [ITEMS.text(int(other)) for other in others]


@pytest.mark.parametrize("how", ["image_noise", "text_noise"])
def test_noise_follows_the_item_wherever_it_lies(how):
    order = np.random.default_rng(0).permutation(12)
    straight, shuffled = (
        ReplacedItems(items, how, 16) for items in (tiny_items(), ItemTable(tiny_items()._table.take(order)))
    )
    for row, before in enumerate(order.tolist()):
        assert shuffled.image(row) == straight.image(before)
        assert shuffled.text(row) == straight.text(before)
