"""The losses over the catalog against their plain twins, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pixrec.model import softmax
from pixrec.model.softmax import catalog_softmax, generalised_bce, sampled_softmax


def tensors(examples=37, items=50, width=8):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(examples, width, generator=generator, requires_grad=True)
    table = torch.randn(items, width, generator=generator, requires_grad=True)
    return states, table, torch.randint(items, (examples,), generator=generator)


def gradients(loss, *leaves):
    return torch.autograd.grad(3 * loss, leaves)


def test_blocks_equal_the_plain_cross_entropy(monkeypatch):
    monkeypatch.setattr(softmax, "BLOCK_SCORES", {"cpu": 5 * 50})  # five examples a block, and a tail of two
    states, table, target = tensors()
    plain = F.cross_entropy(states @ table.T, target, reduction="sum")
    ours = catalog_softmax(states, table, target)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, theirs in zip(gradients(ours, states, table), gradients(plain, states, table), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_steps_of_any_number_of_examples_multiply_few_shapes(monkeypatch):
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            if call is torch.ops.aten.mm.default:
                shapes.add(tuple(args[0].shape))
            return call(*args, **(kwargs or {}))

    monkeypatch.setattr(softmax, "BLOCK_SCORES", {"cpu": 200 * 50})
    found = []
    for examples in (1, 60, 64, 120, 200, 393):
        shapes: set[tuple[int, ...]] = set()
        with Products():
            catalog_softmax(*(t.detach() for t in tensors(examples)))
        found.append(shapes)
    assert set.union(*found) == {s for rows in (64, 128, 192) for s in ((rows, 8), (rows, 50), (50, rows))}


def test_large_scores_do_not_overflow():
    states, table, target = tensors()
    plain = F.cross_entropy(200 * states @ table.T, target, reduction="sum")
    assert catalog_softmax(200 * states, table, target).item() == pytest.approx(plain.item(), rel=1e-5)


def test_bfloat16_is_near():
    states, table, target = tensors()
    exact, near = catalog_softmax(states, table, target), catalog_softmax(states, table, target, bfloat16=True)
    assert near.item() == pytest.approx(exact.item(), rel=1e-2)
    for mine, theirs in zip(gradients(near, states, table), gradients(exact, states, table), strict=True):
        assert F.cosine_similarity(mine.flatten(), theirs.flatten(), 0) > 0.999


def test_sampling_every_other_item_is_the_whole_softmax():
    states, table, target = tensors()
    same = torch.arange(len(table)) == target.unsqueeze(1)
    sampled = sampled_softmax(states, table[target], table, same)
    assert sampled.item() == pytest.approx(catalog_softmax(states, table, target).item(), rel=1e-6)


def test_gbce_without_calibration_is_binary_cross_entropy():
    states, table, target = tensors()
    negatives = table[:10]
    same = torch.arange(10) == target.unsqueeze(1)
    against = (states @ negatives.T).masked_fill(same, float("-inf"))
    loss = generalised_bce((states * table[target]).sum(1), against, 10 / 49, 0.0)
    scores = torch.cat([(states * table[target]).sum(1, keepdim=True), states @ negatives.T], 1)
    labels = torch.zeros_like(scores)
    labels[:, 0] = 1
    each = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    each[:, 1:][same] = 0
    assert loss.item() == pytest.approx(each.sum().item() / 11, rel=1e-5)


def test_calibrated_gbce_has_probabilities_where_plain_bce_overrates():
    """With t = 1 the best score of an item that follows with probability p is logit(p) (gSASRec, theorem 4.1)."""
    share, rate = 0.2, 0.1  # one item follows in a fifth of the cases; each other item is drawn in a tenth
    score = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([score], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        positive = generalised_bce(score[0], torch.zeros(1, 0), rate, 1.0)
        negative = rate * F.softplus(score).sum()
        loss = share * positive + (1 - share) * negative
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = share * rate / (share * rate + (1 - share) * rate)
    assert torch.sigmoid(score).item() == pytest.approx(expected, abs=1e-3)
