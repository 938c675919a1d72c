import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from pixrec import storage
from pixrec.config import SyntheticConfig
from pixrec.data import synthetic
from pixrec.data.drawing import COLOURS, PATTERNS
from pixrec.data.synthetic import DEPARTMENTS, build_world, picture, shop, write_catalog

LOOK_WORDS = {
    *COLOURS,
    *PATTERNS,
    *("red", "blue", "purple", "black", "white", "grey", "gray", "brown", "beige", "gold", "colour", "color"),
    *("stripe", "striped", "dot", "dotted", "polka", "check", "checked", "gingham", "solid", "pattern", "patterned"),
    *(
        "short",
        "long",
        "low",
        "high",
        "sleeve",
        "sleeveless",
        "wide",
        "tall",
        "small",
        "large",
        "mini",
        "maxi",
        "tripod",
    ),
}


@pytest.fixture(scope="module")
def world():
    return build_world(SyntheticConfig(num_items=600, num_users=400))


@pytest.fixture(scope="module")
def events(world):
    return shop(world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("catalog"))
    write_catalog(build_world(SyntheticConfig(num_items=24, num_users=10, image_size_px=32)), folder)
    return folder


def texts(world):
    return list(zip(world.title, world.brand, world.category, world.price.tolist(), strict=True))


def test_the_same_seed_gives_the_same_world_shoppers_and_pictures():
    one, two = (build_world(SyntheticConfig(num_items=50, num_users=20, image_size_px=32)) for _ in range(2))
    assert texts(one) == texts(two)
    for name in ("department", "price", "colour", "pattern", "cut", "emission"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert all(np.array_equal(a, b) for a, b in zip(shop(one), shop(two), strict=True))
    assert picture(one, 7) == picture(two, 7)


def test_another_seed_gives_another_world():
    one, two = (build_world(SyntheticConfig(seed=seed)) for seed in (1, 2))
    assert not np.array_equal(one.colour, two.colour)
    assert not np.array_equal(shop(one).item[:100], shop(two).item[:100])


def test_more_shoppers_leave_the_products_as_they_are():
    few, many = (build_world(SyntheticConfig(num_users=n)) for n in (5, 50))
    assert texts(few) == texts(many)
    assert np.array_equal(few.emission, many.emission)


@pytest.mark.parametrize("num_items", [1, 2, 7, 8, 9])
def test_any_size_works(num_items):
    world = build_world(SyntheticConfig(num_items=num_items, num_users=5))
    assert len(set(world.item_ids)) == num_items
    assert len(world.category_transition) == min(num_items, len(DEPARTMENTS))
    assert set(shop(world).item) <= set(range(num_items))


def test_every_row_of_the_law_is_a_distribution(world):
    assert np.allclose(world.category_transition.sum(axis=1), 1)
    assert np.allclose(world.taste_transition.sum(axis=1), 1)
    for number in range(len(DEPARTMENTS)):
        assert np.allclose(world.emission[world.department == number].sum(axis=0), 1)


def test_every_category_holds_every_pair_of_colour_and_pattern(world):
    for number in range(len(DEPARTMENTS)):
        here = world.department == number
        assert len(set(zip(world.colour[here], world.pattern[here], strict=True))) == len(COLOURS) * len(PATTERNS)


def test_no_word_for_a_look_is_in_any_text(world):
    words = {word for text in texts(world) for part in text for word in re.findall("[a-z]+", str(part).lower())}
    assert not words & LOOK_WORDS


def test_all_looks_of_a_product_share_its_text_word_for_word():
    world = build_world(SyntheticConfig(num_items=512))
    for text in set(texts(world)):
        rows = [row for row, other in enumerate(texts(world)) if other == text]
        colours, patterns = np.bincount(world.colour[rows]), np.bincount(world.pattern[rows])
        assert len(set(colours)) == len(set(patterns)) == 1, "a text favours no colour and no pattern"


def test_titles_are_shared_by_many_products(world):
    for department in DEPARTMENTS:
        assert 1 < len(department.titles) <= 4
    assert all(world.title.count(title) > 15 for title in set(world.title))


def test_item_ids_and_prices_tell_nothing_of_the_looks(world):
    level = np.log(world.price / np.array([entry.price for entry in DEPARTMENTS])[world.department])
    for look in (world.colour, world.pattern, world.cut):
        assert abs(np.corrcoef(np.arange(len(look)), look)[0, 1]) < 0.1
        assert abs(np.corrcoef(level, look)[0, 1]) < 0.1


def test_histories_are_as_long_as_configured_and_times_increase_strictly(world, events):
    assert (np.diff(events.timestamp) >= 0).all()
    for user in range(world.config.num_users):
        times = events.timestamp[events.user == user]
        assert world.config.min_events <= len(times) <= world.config.max_events
        assert (np.diff(times) > 0).all()


def test_shoppers_start_all_over_the_year(events):
    first = np.array([events.timestamp[events.user == user][0] for user in np.unique(events.user)])
    days = (first - synthetic.START_MS) / synthetic.DAY_MS
    assert days.min() < 20
    assert days.max() > 250


def test_categories_follow_their_order(world, events):
    followed = total = 0
    for user in np.unique(events.user):
        department = world.department[events.item[events.user == user]]
        followed += ((department[:-1] + 1) % len(DEPARTMENTS) == department[1:]).sum()
        total += len(department) - 1
    assert followed / total == pytest.approx(synthetic.NEXT_CATEGORY, abs=0.03)


def test_a_shopper_stays_with_a_colour_far_above_chance(world, events):
    same = []
    for user in np.unique(events.user):
        colour = world.colour[events.item[events.user == user]]
        same.extend(colour[:-1] == colour[1:])
    assert np.mean(same) > 5 / len(COLOURS)


def test_the_written_tables_are_what_prepare_reads(folder):
    items = pq.read_table(f"{folder}/items.parquet")
    assert items.column_names == ["item_id", "title", "brand", "category", "price", "description", "image_uri"]
    assert items["description"].null_count == 24
    for uri in items["image_uri"].to_pylist():
        assert storage.read_bytes(storage.resolve(uri, folder)).startswith(b"\xff\xd8")
    interactions = pq.read_table(f"{folder}/interactions.parquet")
    assert interactions.column_names == ["user_id", "item_id", "timestamp"]
    assert len(set(interactions["user_id"].to_pylist())) == 10
    assert set(interactions["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())


def test_progress_counts_every_picture(tmp_path):
    seen = []
    world = build_world(SyntheticConfig(num_items=3, num_users=1, image_size_px=16))
    write_catalog(world, str(tmp_path), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
