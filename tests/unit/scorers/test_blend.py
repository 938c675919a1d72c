"""The mixture of a model's scores with counts, worked out by hand, and its weights where one part alone explains."""

import numpy as np
import pytest
import torch
from fakes import FixedScorer, tiny_dataset, users_of

from pixrec.data.sequences import HeldOut
from pixrec.scorers.blend import PARTS, Blend, Mixture, fit_weights, fitted_mixture

HISTORIES = [np.array([0, 1, 2]), np.array([0, 1, 3]), np.array([4, 4, 4])]
COUNTS = np.bincount(np.concatenate(HISTORIES), minlength=6)


@pytest.fixture
def mixture() -> Mixture:
    return Mixture(HISTORIES, COUNTS, temperature=0.5)


def held_out(histories: list[list[int]], targets: list[int]) -> HeldOut:
    users = users_of([np.array(h) for h in histories])
    return HeldOut(users.user_ids, users.histories, np.array(targets))


def weights_of(mixture: Mixture, **weights: float) -> None:
    mixture.weights = torch.tensor([weights.get(name.replace(" ", "_"), 0.0) for name in PARTS])


def test_each_part_is_a_distribution_over_what_it_may_give(mixture):
    scores = torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.0, 1.0], [0.1] * 6])
    parts = []
    for alone in torch.eye(len(PARTS)):
        mixture.weights = alone
        parts.append(mixture.probabilities(scores, [np.array([0, 1, 0]), np.array([], dtype=np.int64)]))
    for name, part in zip(PARTS, parts, strict=True):
        again = name.endswith("again")
        assert part[0].sum() == pytest.approx(1.0, abs=1e-5)
        assert not part[0][[2, 3, 4, 5] if again else [0, 1]].any()
        assert part[1].sum() == pytest.approx(0.0 if again else 1.0, abs=1e-5)
    wanted = (torch.tensor([0.5, 0, 0, 0, 0, 1.0]) / 0.5).exp() * torch.tensor([0, 0, 1.0, 1, 1, 1])
    torch.testing.assert_close(parts[0][0], wanted / wanted.sum())
    assert parts[5][0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0, 0]), "item 0 was the last, item 1 before it"
    assert parts[6].tolist() == [[0, 0, 0, 0, 0, 1]] * 2, "item 5 is the one without an event"


def test_the_share_of_cold_items_is_learned(mixture):
    scorer = FixedScorer("model", [0.9, 0.9, 0.9, 0.9, 0.9, -0.9])
    weights = mixture.fit(held_out([[0, 1]] * 40, [2] * 30 + [5] * 10), scorer.scores)
    assert weights["model cold"] == pytest.approx(0.25, abs=0.03), "though the model expects less"


def test_where_encoders_have_read_the_items_what_is_alike_is_a_part():
    """It finds an item that nobody has bought by what it is, also one that came after the data set."""
    content = np.eye(6, 12, dtype=np.float32)
    content[5] = content[4]
    mixture = Mixture(HISTORIES, COUNTS, 0.5, content)
    flat = FixedScorer("flat", [0.0] * 6)
    weights = mixture.fit(held_out([[1, 4]] * 40, [5] * 40), flat.scores)
    alike = sum(weight for name, weight in weights.items() if name.startswith("alike in text"))
    assert alike > weights["model"] > weights["transition"]
    found = mixture.probabilities(torch.zeros(1, 7), [np.array([1, 4])], (np.array([6]), content[4:5]))[0]
    assert found[6] == pytest.approx(found[5], rel=0.5)
    assert found[5] > 3 * found[0]
    assert [*Mixture(HISTORIES, COUNTS, 0.5).fit(held_out([[0]], [1]), flat.scores)] == [*PARTS]


def test_weights_are_those_of_the_part_that_explains_the_targets():
    rng = np.random.default_rng(0)
    likelihoods = torch.from_numpy(np.stack([rng.uniform(0.2, 0.4, 500), np.full(500, 0.01)], axis=1))
    weights = fit_weights(likelihoods)
    assert weights.sum() == pytest.approx(1.0)
    assert weights[0] > 0.98
    assert weights[1] > 0
    assert fit_weights(torch.zeros(0, 3)).tolist() == pytest.approx([1 / 3] * 3), "nobody to learn from"


def test_the_share_of_repeats_is_learned(mixture):
    flat = FixedScorer("flat", [0.0] * 6)
    repeats = held_out([[0, 4]] * 20 + [[0, 1]] * 20, [4] * 20 + [2] * 20)
    weights = mixture.fit(repeats, flat.scores)
    again = sum(weight for name, weight in weights.items() if name.endswith("again"))
    assert again == pytest.approx(0.5, abs=0.05)
    never = mixture.fit(held_out([[0, 1]] * 40, [2] * 40), flat.scores)
    assert sum(weight for name, weight in never.items() if name.endswith("again")) < 0.02
    assert never["transition"] > never["popularity"]


def test_a_blend_ranks_by_the_sum_of_what_its_parts_say(mixture):
    scorer = FixedScorer("model", [0.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    users = users_of([np.array([0, 1])])
    weights_of(mixture, model=1.0)
    assert Blend(scorer, mixture).scores(users)[0].argmax() == 5
    weights_of(mixture, transition=1.0)
    found = Blend(scorer, mixture).scores(users)[0]
    assert found[2] == found[3] > found[5], "what followed item 1, not what nobody took"
    weights_of(mixture, most_recent_again=1.0)
    assert Blend(scorer, mixture).scores(users)[0].argmax() == 1
    assert Blend(scorer, mixture).scores(users).isfinite().all()


def test_new_items_get_the_share_that_is_wanted_in_the_order_they_had(mixture):
    """Item 5 has no training event, nor has column 6, which the catalog lacks."""
    scores, histories = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0]]), [np.array([0])]
    weights_of(mixture, model=0.9, transition=0.1)
    before = mixture.probabilities(scores, histories)[0]
    mixture.new_item_share = 0.25
    (after,) = mixture.probabilities(scores, histories)
    assert after.sum().item() == pytest.approx(1, abs=1e-5)
    assert after[[5, 6]].sum().item() == pytest.approx(0.25, abs=1e-6)
    for rows in ([5, 6], [1, 2, 3, 4]):
        assert (after / before)[rows].std() < 1e-5
    weights_of(mixture, transition_again=1.0)
    assert mixture.probabilities(scores, histories).sum().item() == pytest.approx(1), "no new item has a chance"
    weights_of(mixture, model=0.9, transition=0.1)
    mixture.new_item_share = None
    assert torch.equal(mixture.probabilities(scores, histories)[0], before)


def test_fitted_on_the_validation_events_of_a_data_set():
    dataset = tiny_dataset()  # everybody goes on to the next row
    mixture = fitted_mixture(dataset, 1.0, FixedScorer("flat", [0.0] * len(dataset.items)).scores)
    weights = dict(zip(PARTS, mixture.weights.tolist(), strict=True))
    assert weights["transition"] > 10 * weights["popularity"]
