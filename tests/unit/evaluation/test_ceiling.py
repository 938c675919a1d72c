"""The ceilings of the synthetic shop, over the users that an evaluation ranks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pixrec.config import EvaluateConfig, PrepareConfig, SyntheticConfig
from pixrec.data.interactions import split_block
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Dataset, Events
from pixrec.data.synthetic import World, build_world, shop
from pixrec.evaluation.ceiling import ceilings, verdict
from pixrec.schema import PREPARED_ITEM_FIELDS

CONFIG = EvaluateConfig(bootstrap_samples=200)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(SyntheticConfig(num_items=200, num_users=300))


@pytest.fixture(scope="module")
def dataset(world: World) -> Dataset:
    """The shop as `prepare` leaves it, without its pictures."""
    events = shop(world)
    order = np.argsort(events.user, kind="stable")
    user = events.user[order]
    offsets = np.concatenate([[0], np.flatnonzero(np.diff(user)) + 1, [len(user)]]).astype(np.int64)
    columns = {name: pa.nulls(len(world.item_ids), kind) for name, kind in PREPARED_ITEM_FIELDS}
    items = ItemTable(pa.table({**columns, "item_id": world.item_ids}))
    told = Events([f"u{u}" for u in user[offsets[:-1]]], offsets, events.item[order], events.timestamp[order])
    return Dataset("memory", items, {"split": split_block(told.timestamps, PrepareConfig())}, told)


def test_pictures_raise_the_ceiling(world: World, dataset: Dataset):
    best = ceilings(world, dataset, CONFIG)
    assert best.keys() == {"both", "text_only"}
    for figures in best.values():
        assert figures.keys() == {"recall@1", "recall@10", "ci95"}
        for name, (low, high) in figures["ci95"].items():
            assert low < figures[name] < high
    assert best["both"]["ci95"]["recall@10"][0] > best["text_only"]["ci95"]["recall@10"][1]


def test_the_users_are_those_of_the_evaluation(world: World, dataset: Dataset):
    few = EvaluateConfig(bootstrap_samples=200, max_users=40)
    width, wider = (
        np.diff(ceilings(world, dataset, config)["both"]["ci95"]["recall@10"])[0] for config in (CONFIG, few)
    )
    assert wider > 1.5 * width


def test_the_verdict_says_how_near_the_ceiling_is():
    best = {"both": {"recall@1": 0.2, "recall@10": 0.8}, "text_only": {"recall@1": 0.02, "recall@10": 0.3}}
    results = {"pixrec": {"recall@1": 0.1, "recall@10": 0.6}}
    assert verdict(results, {}, best).splitlines() == [
        "recall@1: 0.100, best possible 0.200 (50% of it)",
        "recall@10: 0.600, best possible 0.800 (75% of it)",
    ]
    results["pixrec_text_only"] = {}
    guards = {"random_ties": {"pixrec_text_only": {"recall@1": 0.0, "recall@10": 0.2}}}
    first, second = verdict(results, guards, best).splitlines()
    assert first.endswith("text alone 0.000 (ties broken at random), best possible 0.020; pictures: far above")
    assert second.endswith("best possible 0.300; pictures: 3.0x")
