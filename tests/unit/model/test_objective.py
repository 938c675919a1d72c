"""What counts as a negative, and how often."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import tiny_config, tiny_items, tiny_model

from pixrec.model.catalog import Catalog
from pixrec.model.losses import info_nce
from pixrec.model.objective import Batch, Extra, TrainingTask, among, history_rows


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def task(**train):
    config = tiny_config(train=train)
    return TrainingTask(tiny_model(config).tower, config.train)


def test_every_example_knows_all_items_of_its_history():
    model = tiny_model()
    catalog = Catalog(tiny_items(), model.encoder)
    distinct, _, histories = catalog.histories([np.array([5, 3, 5]), np.array([2, 9])])
    rows = history_rows(histories, torch.from_numpy(distinct))
    assert rows.tolist() == [[5, 3, 5], [5, 3, 5], [2, 9, -1]]


def test_items_of_the_own_history_are_found_among_candidates():
    found = among(torch.tensor([7, 2, 9, 5]), torch.tensor([[5, 7], [9, -1]]))
    assert found.tolist() == [[True, False, False, True], [False, False, True, False]]


def test_excluded_candidates_are_no_negatives():
    anchors, candidates, target = unit(2, 8), unit(5, 8, seed=1), torch.tensor([0, 3])
    excluded = torch.tensor([[False, True, False, False, True], [True, False, False, True, False]])
    part = info_nce(anchors, candidates, target, torch.arange(5), torch.tensor(0.5), None, excluded)
    scores = (anchors @ candidates.T / 0.5).exp()
    kept = [[0, 2, 3], [1, 2, 3, 4]]  # a target stays, even where it is excluded
    expected = -sum(torch.log(scores[i, target[i]] / scores[i, kept[i]].sum()) for i in (0, 1))
    assert float(part.total) == pytest.approx(float(expected), rel=1e-5)


def test_extra_items_join_the_candidates_with_the_chance_of_either_way():
    own, extra = unit(3, 16), unit(2, 16, seed=1)
    inclusion, drawn = torch.tensor([0.5, 0.1, 0.2]), torch.tensor([0.1, 0.3])
    more = Extra(extra, torch.tensor([1, 8]), drawn.log(), 0.25)
    candidates = task().candidates(own, torch.tensor([4, 1, 6]), inclusion.log(), more)
    assert candidates.ids.tolist() == [4, 1, 6, 1, 8]
    assert torch.equal(candidates.vectors, torch.cat([own, extra]))
    expected = 1 - (1 - torch.cat([inclusion, drawn])) * 0.75
    assert candidates.log_inclusion.exp().numpy() == pytest.approx(expected.numpy(), rel=1e-6)
    assert task(logq_correction=False).candidates(own, torch.tensor([4, 1, 6]), inclusion, more).log_inclusion is None


def test_symmetric_is_the_mean_of_both_directions():
    both, one = task(symmetric=True, logq_correction=False), task(logq_correction=False)
    anchors, items, rows = unit(4, 16), unit(3, 16, seed=1), torch.tensor([7, 8, 9])
    target = torch.tensor([0, 1, 2, 1])  # two users bought the same item: neither is a negative of the other
    candidates = both.candidates(items, rows, torch.zeros(3), None)
    forward = one.contrast(anchors, target, None, candidates, None, 0)
    pool, start = both.pool(anchors, rows[target])
    part = both.contrast(anchors, target, None, candidates, pool, start)
    scores = (items[target] @ anchors.T / both.temperature()).exp()
    kept = [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3]]
    backward = -sum(torch.log(scores[i, i] / scores[i, kept[i]].sum()) for i in range(4))
    assert torch.allclose(part.total, (forward.total + backward) / 2, rtol=1e-5)
    assert float(part.examples) == 4


def test_a_fixed_temperature_gets_no_gradient():
    assert task().temperature().requires_grad
    assert not task(learnable_temperature=False).temperature().requires_grad


def test_views_and_purchases_share_the_loss_of_both():
    """Sums and counts of each part: those of the targets of one kind and of the other are those of all."""
    model, rows = tiny_model(tiny_config(train={"mask_history": True})), [np.array([5, 3, 1, 4]), np.array([2, 9, 8])]
    objective = TrainingTask(model.tower, tiny_config(train={"mask_history": True}).train)
    distinct, items, _ = Catalog(tiny_items(), model.encoder).histories(rows)
    local = [np.searchsorted(distinct, row) for row in rows]

    def totals(views):
        histories = model.encoder.histories(items, local, views)
        return objective(Batch(items, histories, torch.from_numpy(distinct), torch.zeros(len(distinct))))[1]

    views = [np.array([False, True, False, False]), np.array([False, False, True])]
    others = [~view & (np.arange(len(view)) > 0) for view in views]
    whole = totals(None)
    assert whole[1:, 1].tolist() == [5, 5]
    assert totals(views)[1:, 1].tolist() == [2, 2]
    torch.testing.assert_close(totals(views) + totals(others), whole)
