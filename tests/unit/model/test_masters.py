"""Float32 copies of bf16 weights: what bf16 alone rounds away arrives, and nothing else changes."""

import torch
from torch import nn

from pixrec.model.masters import Masters


def moved(steps, with_masters):
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = Masters({"weight": weight} if with_masters else {})
    optimizer = torch.optim.SGD(masters.of([weight]), lr=1e-3)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        masters.take_gradients()
        optimizer.step()
        masters.give_weights()
    return weight, masters


def test_small_updates_add_up():
    """1 - 0.001 is 1 in bf16, whose next number below is 0.996."""
    assert torch.equal(moved(20, False)[0], torch.ones(4, dtype=torch.bfloat16))
    weight, masters = moved(20, True)
    assert torch.allclose(masters.named["weight"], torch.tensor(0.98))
    assert torch.equal(weight, torch.full((4,), 0.98, dtype=torch.bfloat16))
    assert weight.grad is None


def test_float32_parameters_are_moved_themselves():
    wide, narrow = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    masters = Masters({"wide": wide, "narrow": narrow})
    assert masters.of([wide])[0] is wide
    assert masters.of([narrow])[0].dtype == torch.float32
    assert list(masters.tensors()) == ["narrow/master"]
    wide.grad = torch.ones(2)
    masters.take_gradients()
    assert wide.grad is not None


def test_copies_go_on_where_they_were():
    _, masters = moved(3, True)
    again = Masters({"weight": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))})
    again.restore(masters.tensors())
    assert torch.equal(again.named["weight"], masters.named["weight"])
