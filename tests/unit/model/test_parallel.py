"""In one process: clipping as torch's own, averaging and gathering as nothing at all."""

import pytest
import torch

from pixrec.model.parallel import average_gradients, clip_gradients, like, whole


def weights():
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.nn.Parameter(torch.zeros(3, 2)),
        torch.nn.Parameter(torch.zeros(())),
        torch.nn.Parameter(torch.zeros(4)),
    ]
    for tensor in tensors[:2]:
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    return tensors


@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_clipping_is_that_of_torch(limit):
    ours, theirs = weights(), weights()
    norm = clip_gradients(ours, limit)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, limit)), rel=1e-6)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5)
    assert ours[2].grad is None


def test_alone_there_is_nothing_to_average_or_to_gather():
    tensors = weights()
    before = tensors[0].grad.clone()
    average_gradients(tensors)
    assert torch.equal(tensors[0].grad, before)
    assert whole(tensors[0]) is tensors[0]
    assert torch.equal(like(before, tensors[0]), before)
