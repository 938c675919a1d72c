import numpy as np
import pytest
import torch
from fakes import users_of

from pixrec.config import SyntheticConfig
from pixrec.data.drawing import PATTERNS
from pixrec.data.synthetic import build_world, shop
from pixrec.errors import InputError
from pixrec.metrics import count_ties, random_tie_metrics, target_ranks
from pixrec.scorers.oracle import Oracle


@pytest.fixture(scope="module")
def world():
    return build_world(SyntheticConfig(num_users=1500))


@pytest.fixture(scope="module")
def histories(world):
    events = shop(world)
    order = np.argsort(events.user, kind="stable")
    return np.split(events.item[order], np.flatnonzero(np.diff(events.user[order])) + 1)


@pytest.fixture(scope="module")
def recalls(world, histories):
    """Recall of both oracles and of popularity on the last event of every shopper."""
    past, targets = [h[:-1] for h in histories], np.array([h[-1] for h in histories])
    popularity = np.bincount(np.concatenate(past), minlength=len(world.item_ids))
    scores = {name: Oracle(world, world.item_ids, name == "text").scores(users_of(past)) for name in ("both", "text")}
    scores["popularity"] = torch.from_numpy(popularity).expand(len(past), -1)
    return {name: expected_recall(s, targets, (1, 10)) for name, s in scores.items()}


def expected_recall(scores, targets, ks):
    return random_tie_metrics(target_ranks(scores, targets), count_ties(scores, targets), ks)


def brute_force(world, history, text_only):
    """(N,) P(next item | history) by summing the joint probability over every path of tastes."""
    emission = world.emission
    if text_only:
        texts = list(zip(world.title, world.brand, world.department, world.price, strict=True))
        same = np.array([[one == other for other in texts] for one in texts], dtype=float)
        emission = same @ emission
    num_tastes = emission.shape[1]
    first, second = history
    step = world.taste_transition
    paths = (
        np.full(num_tastes, 1 / num_tastes)[:, None, None]
        * emission[first][:, None, None]
        * step[:, :, None]
        * emission[second][None, :, None]
        * step[None, :, :]
    )
    category = world.category_transition[world.department[second], world.department]
    joint = np.einsum("abc,nc->n", paths, emission) * category
    if text_only:
        joint /= same.sum(axis=1)
    return joint / paths.sum()


@pytest.mark.parametrize("text_only", [False, True])
def test_the_forward_filter_equals_the_sum_over_all_paths(text_only):
    world = build_world(SyntheticConfig(num_items=60))
    history = np.array([3, 41])
    scores = Oracle(world, world.item_ids, text_only).scores(users_of([history]))[0]
    assert scores.numpy() == pytest.approx(brute_force(world, history, text_only), rel=1e-5)


@pytest.mark.parametrize("text_only", [False, True])
def test_scores_are_probabilities(world, histories, text_only):
    scores = Oracle(world, world.item_ids, text_only).scores(users_of(histories[:20]))
    assert scores.shape == (20, len(world.item_ids))
    assert scores.dtype == torch.float32
    assert scores.sum(dim=1).numpy() == pytest.approx(np.ones(20), abs=1e-5)
    assert scores.min() > 0


def test_tastes_are_a_distribution_and_recent_purchases_give_them_away(world):
    oracle = Oracle(world, world.item_ids, text_only=False)
    alike = np.flatnonzero((world.colour == 2) & (world.pattern == 1))[:4]
    belief = oracle.tastes(alike)
    assert belief.sum() == pytest.approx(1)
    assert belief.argmax() == 2 * len(PATTERNS) + 1
    assert belief.max() > 0.7


def test_text_alone_cannot_tell_apart_items_that_share_their_text(world, histories):
    scores = Oracle(world, world.item_ids, text_only=True).scores(users_of(histories[:3]))
    texts = list(zip(world.title, world.brand, world.category, world.price, strict=True))
    rows = [row for row, text in enumerate(texts) if text == texts[0]]
    assert len(rows) > 1
    assert (scores[:, rows] == scores[:, rows[:1]]).all()


def test_the_order_and_choice_of_rows_are_the_callers(world):
    history = [world.item_ids[5], world.item_ids[80]]
    whole = Oracle(world, world.item_ids, text_only=False).scores(users_of([np.array([5, 80])]))[0]
    chosen = [*reversed(world.item_ids[:100])]
    rows = np.array([chosen.index(item_id) for item_id in history])
    part = Oracle(world, chosen, text_only=False).scores(users_of([rows]))[0]
    assert torch.allclose(part, whole[:100].flip(0))


def test_an_item_of_another_world_is_refused(world):
    with pytest.raises(InputError, match="'nowhere'"):
        Oracle(world, ["nowhere"], text_only=False)


def test_the_pictures_are_worth_the_look(recalls):
    both, text, popularity = recalls["both"], recalls["text"], recalls["popularity"]
    assert 0.55 < both["recall@10"] < 0.8
    assert both["recall@10"] > 3 * text["recall@10"]
    assert both["recall@1"] > 5 * text["recall@1"]
    assert text["recall@10"] > popularity["recall@10"]
    assert popularity["recall@10"] < 0.05


def test_no_scorer_that_knows_the_true_colours_beats_the_oracle(world, histories, recalls):
    """Next category in the ring, looks of the last item, popularity: all known, but no filtering."""
    past, targets = [h[:-1] for h in histories], np.array([h[-1] for h in histories])
    last = np.array([h[-1] for h in past])
    category = world.category_transition[world.department[last]][:, world.department]
    same = (world.colour[last][:, None] == world.colour) * 4.0 + (world.pattern[last][:, None] == world.pattern) * 2.0
    rival = torch.from_numpy(category * np.exp(same) * world.popularity)
    assert expected_recall(rival, targets, (10,))["recall@10"] < recalls["both"]["recall@10"]
