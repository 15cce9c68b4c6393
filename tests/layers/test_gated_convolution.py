"""The first layer of recall models against PyTorch's own convolution."""

import torch
from torch import nn

from mneme.layers import GatedConvolution
from tests.helpers import assert_close, example_input


def test_it_is_baseconv_with_the_biases_of_the_public_code():
    # BaseConv of Zoology: nn.Conv1d with its default bias, and nn.Linear with its own.
    layer = GatedConvolution(16, conv_size=3).double()
    conv = nn.Conv1d(16, 16, 3, groups=16, padding=2).double()
    with torch.no_grad():
        conv.weight[:, 0] = layer.conv.weight
        conv.bias.copy_(layer.conv.bias)
    x = example_input("GatedConvolution", length=9)
    convolved = conv(x.mT)[..., :9].mT
    expected = convolved * nn.functional.linear(x, *layer.gate_proj.parameters()) + x
    assert_close(layer(x).y, expected, "output", 1e-12)
    assert layer.conv.bias.abs().min() > 0
