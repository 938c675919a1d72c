"""The synthetic shop: purchases are drawn from a known distribution, its law, so that every scorer can be compared with
the best possible one.

As in real shops, a product comes in many looks (colour, pattern, cut), each an item of its own, and all of them share
title, brand and price word for word: looks are seen in the pictures only. Shoppers go through the categories in a
cycle and have a hidden taste in looks that drifts slowly. Without the pictures the next purchase can only be guessed.

Draws products and purchases and writes them as tables and pictures; knows nothing of models.

Shapes: N items · C categories · Z tastes, one for each pair of a favourite colour and a favourite pattern
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pixrec import schema, storage
from pixrec.config import SyntheticConfig
from pixrec.data.drawing import COLOURS, CUTS, PATTERNS, draw_product

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Department(NamedTuple):
    """What the shop says about one category, none of it about looks."""

    category: str
    kind: str
    """The key of its drawing."""
    titles: tuple[str, ...]
    price: float
    """Typical price; the products' prices scatter around it."""


# In the order in which shoppers go through them.
DEPARTMENTS = (
    Department("T-Shirts", "t-shirt", ("Everyday Cotton Tee", "Weekend Jersey Tee"), 24.0),
    Department("Sneakers", "sneaker", ("Court Classic Sneaker", "City Canvas Sneaker"), 79.0),
    Department("Hats", "hat", ("Sunday Stroll Hat", "Market Day Hat"), 29.0),
    Department("Tote Bags", "tote bag", ("Canvas Carryall", "Farmers Market Tote"), 34.0),
    Department("Mugs", "mug", ("Stoneware Mug", "Morning Ritual Mug"), 16.0),
    Department("Lamps", "lamp", ("Reading Corner Lamp", "Linen Shade Lamp"), 89.0),
    Department("Chairs", "chair", ("Atelier Chair", "Upholstered Dining Chair"), 149.0),
    Department("Dresses", "dress", ("Garden Party Dress", "Day to Evening Dress"), 69.0),
)
BRANDS = (
    "Fennwick",
    "Lumera",
    "Tavish & Co",
    "Solvane",
    "Brackenfield",
    "Pellory",
    "Marlowe Lane",
    "Quillon",
    "Haverby",
    "Tessaly",
    "Wrenfold",
    "Orrin Works",
)

# The law. Favourites are strong enough that two to four purchases give them away, and drift is slow beside that.
NEXT_CATEGORY = 0.86
FAVOURITE_COLOUR = 0.86
FAVOURITE_PATTERN = 0.70
COLOUR_DRIFT = 0.05
PATTERN_DRIFT = 0.06
POPULARITY_EXPONENT = 0.4
PRICE_SPREAD = 0.3

START_MS = 1_735_689_600_000  # 2025-01-01 00:00 UTC
DAY_MS = 86_400_000
START_SPREAD_DAYS = 290
GAP_DAYS = 5.0
"""Typical days between two purchases of a shopper; the first lies within START_SPREAD_DAYS."""
GAP_SPREAD = 0.6
JPEG_QUALITY = 90

# Independent random streams, so that more shoppers never change the products.
_PRODUCTS, _SHOPPERS, _PICTURES = 0, 1, 2


@dataclass(frozen=True, eq=False)
class World:
    """The products and the distribution of purchases. Row i of every item array is the item `item_ids[i]`."""

    config: SyntheticConfig
    item_ids: list[str]
    department: Ints
    """(N,) index into DEPARTMENTS."""
    title: list[str]
    """Like `brand` and `price`, the same for all looks of a product."""
    brand: list[str]
    price: Floats
    colour: Ints
    """(N,) index into COLOURS; like `pattern` and `cut`, seen in the picture only."""
    pattern: Ints
    cut: Ints
    popularity: Floats
    """(N,) weight of an item among those that suit equally well."""
    category_transition: Floats
    """(C, C) P(category of the next event | category of this one). The first is uniform."""
    taste_transition: Floats
    """(Z, Z) P(taste at the next event | taste at this one). The first is uniform."""
    emission: Floats
    """(N, Z) P(item | its category, taste): popularity times fit, normalised within the category."""

    @property
    def category(self) -> list[str]:
        return [DEPARTMENTS[number].category for number in self.department]


def build_world(config: SyntheticConfig) -> World:
    """The world of a configuration; the same seed and size give the same world."""
    rng = np.random.default_rng([config.seed, _PRODUCTS])
    n = config.num_items
    num_departments = min(n, len(DEPARTMENTS))
    department = rng.permutation(np.arange(n) % num_departments)
    title, brand = np.empty(n, dtype=object), np.empty(n, dtype=object)
    price, colour, pattern = np.empty(n), np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    for number in range(num_departments):
        members = np.flatnonzero(department == number)
        product, colour[members], pattern[members] = _variants(len(members), rng)
        for p in range(product.max() + 1):
            rows = members[product == p]
            title[rows] = rng.choice(DEPARTMENTS[number].titles)
            brand[rows] = rng.choice(BRANDS)
            level = DEPARTMENTS[number].price * np.exp(PRICE_SPREAD * rng.standard_normal())
            price[rows] = np.round(np.ceil(level) - 0.05, 2)  # 23.95
    popularity: Floats = np.power(rng.permutation(n) + 1 + n / 10, -POPULARITY_EXPONENT)
    colour_drift = _neighbours(len(COLOURS), COLOUR_DRIFT)
    pattern_drift = _mostly(np.arange(len(PATTERNS)), len(PATTERNS), 1 - PATTERN_DRIFT)
    return World(
        config=config,
        item_ids=[f"p{row:05d}" for row in range(n)],
        department=department,
        title=title.tolist(),
        brand=brand.tolist(),
        price=price,
        colour=colour,
        pattern=pattern,
        cut=rng.integers(CUTS, size=n),
        popularity=popularity,
        category_transition=_mostly((np.arange(num_departments) + 1) % num_departments, num_departments, NEXT_CATEGORY),
        taste_transition=np.asarray(np.kron(colour_drift, pattern_drift), dtype=np.float64),
        emission=_emission(department, colour, pattern, popularity),
    )


def _variants(size: int, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """Product number, colour and pattern of `size` items of one category, in random order.

    A product comes in every colour once and in every pattern equally often, so that knowing the product (all that the
    text can tell) says little about the look, even by heart. Four products in a row hold every pair of the two.

    A price of its own for each item would undo this: it serves as an item id, and a small transformer over the words
    alone learned those by heart within ten epochs (recall@10 0.53, over the true looks 0.66; with shared prices 0.14).
    """
    num_colours, num_patterns = len(COLOURS), len(PATTERNS)
    product = np.arange(size) // num_colours
    colour, pattern = np.empty((2, product.max() + 1, num_colours), dtype=np.int64)
    for p in range(product.max() + 1):
        if p % num_patterns == 0:
            first = rng.permutation(np.arange(num_colours) % num_patterns)
        colour[p] = rng.permutation(num_colours)
        pattern[p] = (first[colour[p]] + p) % num_patterns
    order = rng.permutation(size)
    return product[order], colour.ravel()[:size][order], pattern.ravel()[:size][order]


def _emission(department: Ints, colour: Ints, pattern: Ints, popularity: Floats) -> Floats:
    """(N, Z) P(item | its category, taste)."""
    colour_fit = _mostly(np.arange(len(COLOURS)), len(COLOURS), FAVOURITE_COLOUR)
    pattern_fit = _mostly(np.arange(len(PATTERNS)), len(PATTERNS), FAVOURITE_PATTERN)
    favourite_colour, favourite_pattern = np.divmod(np.arange(len(COLOURS) * len(PATTERNS)), len(PATTERNS))
    fit = colour_fit[favourite_colour][:, colour] * pattern_fit[favourite_pattern][:, pattern]
    weight = popularity[:, None] * fit.T
    total = np.stack([weight[department == c].sum(axis=0) for c in range(department.max() + 1)])
    return weight / total[department]


def _mostly(favourite: Ints, size: int, share: float) -> Floats:
    """Rows of probabilities: `share` on the row's favourite, the rest spread evenly over the others."""
    if size == 1:
        return np.ones((len(favourite), 1))
    rows = np.full((len(favourite), size), (1 - share) / (size - 1))
    rows[np.arange(len(favourite)), favourite] = share
    return rows


def _neighbours(size: int, chance: float) -> Floats:
    """Stay, or step to either neighbour on a ring."""
    eye: Floats = np.eye(size)
    return (1 - chance) * eye + chance / 2 * (np.roll(eye, 1, axis=1) + np.roll(eye, -1, axis=1))


class Events(NamedTuple):
    """All purchases in time order, as aligned arrays: shopper number, item row, milliseconds since the epoch."""

    user: Ints
    item: Ints
    timestamp: Ints


def shop(world: World) -> Events:
    """Let the shoppers shop: `config.num_users` draws from the law, each with strictly increasing times."""
    config = world.config
    rng = np.random.default_rng([config.seed, _SHOPPERS])
    num_users, num_steps = config.num_users, config.max_events
    department = rng.integers(len(world.category_transition), size=num_users)
    taste = rng.integers(len(world.taste_transition), size=num_users)
    items = np.empty((num_users, num_steps), dtype=np.int64)
    for step in range(num_steps):
        if step:
            department = _draw(world.category_transition[department], rng)
            taste = _draw(world.taste_transition[taste], rng)
        items[:, step] = _purchases(world, department, taste, rng)
    gaps_days = GAP_DAYS * np.exp(GAP_SPREAD * rng.standard_normal((num_users, num_steps)))
    gaps_days[:, 0] = START_SPREAD_DAYS * rng.random(num_users)
    times = START_MS + np.cumsum(np.maximum(gaps_days * DAY_MS, 1).astype(np.int64), axis=1)
    length = rng.integers(config.min_events, config.max_events + 1, size=num_users)
    user, place = np.nonzero(np.arange(num_steps) < length[:, None])
    order = np.argsort(times[user, place], kind="stable")
    return Events(user[order], items[user, place][order], times[user, place][order])


def _draw(rows: Floats, rng: np.random.Generator) -> Ints:
    """One index from each row of probabilities."""
    thresholds = rng.random((len(rows), 1)) * rows.sum(axis=1, keepdims=True)
    return np.minimum((np.cumsum(rows, axis=1) <= thresholds).sum(axis=1), rows.shape[1] - 1)


def _purchases(world: World, department: Ints, taste: Ints, rng: np.random.Generator) -> Ints:
    """The item each shopper takes, given category and taste."""
    chance = rng.random(len(department))
    items = np.empty(len(department), dtype=np.int64)
    for c in np.unique(department):
        members = np.flatnonzero(world.department == c)
        cumulative = np.cumsum(world.emission[members], axis=0)
        for z in np.unique(taste[department == c]):
            shoppers = np.flatnonzero((department == c) & (taste == z))
            place = np.searchsorted(cumulative[:, z], chance[shoppers] * cumulative[-1, z], side="right")
            items[shoppers] = members[np.minimum(place, len(members) - 1)]
    return items


def write_catalog(world: World, folder: str, progress: Callable[[int, int], None] | None = None) -> None:
    """Write `images/`, `items.parquet` and `interactions.parquet` below `folder` (local or s3://).

    `progress(done, total)` is called after every picture. Raises OutputError when the place cannot be written.
    """
    uris = [f"images/{item_id}.jpg" for item_id in world.item_ids]
    for row, uri in enumerate(uris):
        storage.write_bytes(storage.join(folder, uri), picture(world, row))
        if progress:
            progress(row + 1, len(uris))
    items = _items(world).append_column(schema.IMAGE_URI, pa.array(uris, pa.string()))
    storage.write_table(storage.join(folder, "items.parquet"), items)
    storage.write_table(storage.join(folder, "interactions.parquet"), _interactions(world))


def catalog_tables(world: World) -> tuple[pa.Table, pa.Table]:
    """Items, with their pictures' bytes in `image`, and interactions: what `write_catalog` writes, in memory."""
    pictures = pa.array([picture(world, row) for row in range(len(world.item_ids))], pa.binary())
    return _items(world).append_column(schema.IMAGE, pictures), _interactions(world)


def _items(world: World) -> pa.Table:
    columns = {
        schema.ITEM_ID: pa.array(world.item_ids, pa.string()),
        schema.TITLE: pa.array(world.title, pa.string()),
        schema.BRAND: pa.array(world.brand, pa.string()),
        schema.CATEGORY: pa.array(world.category, pa.string()),
        schema.PRICE: pa.array(world.price, pa.float64()),
        schema.DESCRIPTION: pa.nulls(len(world.item_ids), pa.string()),
    }
    return pa.table(columns)


def _interactions(world: World) -> pa.Table:
    events = shop(world)
    columns = {
        schema.USER_ID: pa.array([f"u{user:06d}" for user in events.user], pa.string()),
        schema.ITEM_ID: pa.array([world.item_ids[row] for row in events.item], pa.string()),
        schema.TIMESTAMP: pa.array(events.timestamp, pa.int64()),
    }
    return pa.table(columns)


def picture(world: World, row: int) -> bytes:
    """The JPEG of an item; pose, light and background depend on seed and row alone."""
    rng = np.random.default_rng([world.config.seed, _PICTURES, row])
    kind = DEPARTMENTS[world.department[row]].kind
    look = (int(world.colour[row]), int(world.pattern[row]), int(world.cut[row]))
    image = draw_product(kind, *look, size_px=world.config.image_size_px, rng=rng)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
