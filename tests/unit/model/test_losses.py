import math

import pytest
import torch
import torch.nn.functional as F

from pixrec.model.losses import gather_with_gradient, info_nce, next_item_generation


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_info_nce_equals_its_definition():
    anchors, candidates, target = unit(3, 8), unit(5, 8, seed=1), torch.tensor([0, 4, 2])
    part = info_nce(anchors, candidates, target, torch.arange(5), torch.tensor(0.5))
    scores = (anchors @ candidates.T / 0.5).exp()
    expected = -sum(math.log(scores[i, t] / scores[i].sum()) for i, t in enumerate(target.tolist()))
    assert float(part.total) == pytest.approx(expected, rel=1e-5)
    assert float(part.examples) == 3


def test_the_same_item_in_another_row_is_never_a_negative():
    anchors, candidates, target = unit(2, 8), unit(4, 8, seed=1), torch.tensor([0, 1])
    ids = torch.tensor([7, 8, 7, 9])  # row 2 is anchor 0's own target once more
    part = info_nce(anchors, candidates, target, ids, torch.tensor(0.1))
    without = info_nce(anchors[:1], candidates[[0, 1, 3]], target[:1], ids[[0, 1, 3]], torch.tensor(0.1))
    other = info_nce(anchors[1:], candidates, target[1:], ids, torch.tensor(0.1))
    assert float(part.total) == pytest.approx(float(without.total + other.total), rel=1e-6)


def test_one_candidate_alone_teaches_nothing():
    """The one-class softmax of a batch of one: zero loss, zero gradient."""
    anchors = unit(1, 8).requires_grad_()
    part = info_nce(anchors, unit(1, 8, seed=1), torch.tensor([0]), torch.tensor([3]), torch.tensor(0.5))
    part.total.backward()
    assert float(part.total.detach()) == 0
    assert float(anchors.grad.abs().max()) == 0


def test_log_q_makes_the_expected_denominator_that_of_the_catalog():
    """Items drawn with chance q and weighted 1/q: over many draws the sum of negatives meets the whole catalog's."""
    generator = torch.Generator().manual_seed(0)
    anchor, catalog = unit(1, 8), unit(40, 8, seed=1)
    inclusion = torch.linspace(0.1, 0.9, 40)
    sums = []
    for _ in range(3000):
        drawn = torch.rand(40, generator=generator) < inclusion
        drawn[0] = True
        rows = drawn.nonzero().squeeze(1)
        part = info_nce(anchor, catalog[rows], torch.tensor([0]), rows, torch.tensor(1.0), inclusion[rows].log())
        own = (anchor @ catalog[:1].T).exp()
        sums.append(float(part.total.exp() * own - own))
    exact = float((anchor @ catalog[1:].T).exp().sum())
    assert sum(sums) / len(sums) == pytest.approx(exact, rel=0.02)


def test_next_item_generation_is_a_sum_over_tokens():
    logits, tokens = torch.randn(6, 11), torch.arange(6)
    part = next_item_generation(logits, tokens)
    assert float(part.total) == pytest.approx(float(F.cross_entropy(logits, tokens) * 6), rel=1e-6)
    assert float(part.examples) == 6


def test_gather_in_one_process_is_the_tensor_itself():
    tensor = torch.randn(3, 2, requires_grad=True)
    gathered, start = gather_with_gradient(tensor)
    assert gathered is tensor
    assert start == 0
