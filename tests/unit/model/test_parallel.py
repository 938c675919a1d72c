"""In one process: clipping as torch's own, averaging and gathering as nothing at all."""

import pytest
import torch

from pixrec.model.parallel import average_gradients, clip_gradients, restore_optimizer, whole


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


@pytest.mark.parametrize("kind", ["plain", "capturable", "fused"])
def test_a_restored_counter_of_steps_lies_where_the_optimiser_counts(kind):
    """The parameter's device stands for a GPU, on which a plain optimiser would have to look at every step."""
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.param_groups[0][kind] = True
    device = "meta" if kind == "plain" else "cpu"  # where the tensors come from
    saved = {f"weight/{key}": torch.ones(3, device=device) for key in ("exp_avg", "exp_avg_sq")}
    saved["weight/step"] = torch.tensor(7.0, device="cpu")
    restore_optimizer(optimizer, {"weight": parameter}, saved)
    state = optimizer.state[parameter]
    assert state["step"].device.type == ("cpu" if kind == "plain" else "meta")
    assert state["exp_avg"].device.type == state["exp_avg_sq"].device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_counter_of_steps_that_was_read_to_a_gpu_comes_back():
    parameter = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    optimizer = torch.optim.AdamW([parameter])
    saved = {f"weight/{key}": torch.ones((), device="cuda") for key in ("exp_avg", "exp_avg_sq", "step")}
    restore_optimizer(optimizer, {"weight": parameter}, saved)
    assert optimizer.state[parameter]["step"].device.type == "cpu"
