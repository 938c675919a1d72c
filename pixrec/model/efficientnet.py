"""EfficientNet-Lite as the package efficientnet-lite-pytorch builds it: as an encoder of one vector a picture, and as
the part of it that a vision-language model looks through.

Plain torch: knows no transformers.

Shapes: P pictures · X numbers of a vector · S side in pixels · C channels of the last block · R rows and columns of
its map.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pixrec.errors import ConfigError

EFFICIENTNET_LITE = "efficientnet-lite"


def network(name: str) -> Any:
    """The package's own module, with random weights. Raises ConfigError where the package is not installed."""
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        raise ConfigError(f"{name} needs efficientnet-lite-pytorch; pip install 'pixrec[pretrained]'")
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name(name)


class EfficientNetLite(nn.Module):
    """Pixels (P, 3, S, S) to vectors (P, X).

    A picture's vector is the mean of its last block's features beside that of its head's, of equal length: the head's
    alone are made for the classes of ImageNet (benchmarks/LOG.md).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = network(name).to(memory_format=torch.channels_last)  # half again as fast on a CPU

    def forward(self, pixels: Tensor) -> Tensor:
        network, pixels = self.network, pixels.contiguous(memory_format=torch.channels_last)
        states = network._swish(network._bn0(network._conv_stem(pixels)))
        for block in network._blocks:
            states = block(states)
        head = network._swish(network._bn1(network._conv_head(states)))
        return torch.cat([F.normalize(features.mean((2, 3)), dim=-1) for features in (states, head)], dim=-1)


class FeatureMap(nn.Module):
    """Pixels (P, 3, S, S) to the map of the last block (P, C, R, R), each channel with mean 0 and variance 1 over the
    pictures that the network was trained on.

    Batch norms are folded into the convolutions before them, so nothing differs between training and use. The last one
    has its scale and shift left out, which makes its output standardised.
    """

    def __init__(self, network: Any) -> None:
        """network: an EfficientNet with its weights, which is altered."""
        super().__init__()
        pairs = list(_convolutions(network))
        for convolution, owner, name in pairs:
            norm = getattr(owner, name)
            affine = (norm.weight, norm.bias) if convolution is not pairs[-1][0] else (None, None)
            weight, bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, *affine
            )
            convolution.weight, convolution.bias = weight, bias
            setattr(owner, name, nn.Identity())
        self.stem, self.activation, self.blocks = network._conv_stem, network._swish, network._blocks

    def forward(self, pixels: Tensor) -> Tensor:
        states = self.activation(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            states = block(states)
        return states


def _convolutions(network: Any) -> Iterator[tuple[Any, Any, str]]:
    """Each convolution up to the last block, with the module that holds its batch norm and that one's name there."""
    yield network._conv_stem, network, "_bn0"
    for block in network._blocks:
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if hasattr(block, convolution):
                yield getattr(block, convolution), block, norm
