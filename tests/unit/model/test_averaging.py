"""The running mean of weights: what it is, and that nothing of the last weights is lost."""

import pytest
import torch
from torch import nn

from pixrec.model.averaging import WeightMean


@pytest.fixture
def weight():
    return nn.Parameter(torch.tensor([1.0, 2.0]))


def test_it_forgets_the_first_weights_and_then_averages(weight):
    mean, expected = WeightMean({"w": weight}, 0.5), weight.detach().clone()
    for step, decay in enumerate((0.1, 2 / 11, 0.25, 4 / 13), 1):
        weight.data += step
        mean.update(step)
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(mean.tensors()["mean/w"], expected)
    for step in range(20, 22):
        mean.update(step)
        expected = 0.5 * expected + 0.5 * weight.detach()
    torch.testing.assert_close(mean.tensors()["mean/w"], expected)


def test_the_last_weights_come_back_and_both_are_saved_whichever_is_in(weight):
    mean = WeightMean({"w": weight}, 0.9)
    weight.data += 10
    mean.update(1)
    outside = {name: tensor.clone() for name, tensor in mean.tensors().items()}
    with mean.applied():
        torch.testing.assert_close(weight.data, torch.tensor([10.0, 11.0]))
        for name, tensor in mean.tensors().items():
            torch.testing.assert_close(tensor, outside[name])
    torch.testing.assert_close(weight.data, torch.tensor([11.0, 12.0]))

    other = nn.Parameter(torch.zeros(2))
    resumed = WeightMean({"w": other}, 0.9)
    resumed.restore(outside)
    torch.testing.assert_close(other.data, weight.data)
    resumed.keep()
    torch.testing.assert_close(other.data, outside["mean/w"])


def test_without_decay_nothing_is_kept(weight):
    mean = WeightMean({"w": weight}, 0.0)
    weight.data += 1
    mean.update(1)
    with mean.applied():
        torch.testing.assert_close(weight.data, torch.tensor([2.0, 3.0]))
    mean.keep()
    mean.restore({})
    torch.testing.assert_close(weight.data, torch.tensor([2.0, 3.0]))
    assert mean.tensors() == {}
