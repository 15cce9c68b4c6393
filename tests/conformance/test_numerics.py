"""Every registered layer computes the same in fp32 as in fp64, and learns from padding safely."""

import copy
import re
from functools import partial

import pytest
import torch

from mneme.layers import is_loss
from mneme.models.optim import make_optimizer
from tests.helpers import LAYER_EXAMPLES, assert_close, example_input, example_layer

every_layer = pytest.mark.parametrize(
    ("name", "example"), LAYER_EXAMPLES, ids=lambda value: str(value)
)
LENGTH = 20
DECAYS = re.compile(
    r"(_proj|proj\.\d|conv|router|reader)\.weight$|^weight$"  # linear layers and filters
    r"|(write_proj|recurrent|persistent|keys|cores|\bC)$"  # ... held as they are; learned tokens
)
"""Names of what weight decay may move: no norm, bias, decay parameter or initial state."""


@every_layer
def test_fp32_agrees_with_fp64(name, example):
    # The reads of a young memory are small: a norm whose epsilon is that of the dtype tells them
    # apart by the dtype.
    exact = example_layer(name, example)
    rounded = copy.deepcopy(exact).float()
    for scale in (1.0, 1e-3):
        x = scale * example_input(name, length=LENGTH)
        assert_close(rounded(x.float()).y, exact(x).y, f"fp32 at inputs of {scale}", 1e-3)


@every_layer
def test_gradients_are_bounded_on_a_run_of_zero_tokens(name, example):
    layer = example_layer(name, example, torch.float32)
    x = example_input(name, length=LENGTH, dtype=torch.float32)
    x[0, :6] = x[1, 7:13] = 0.0  # at the start, and after some text
    output = layer(x.requires_grad_())
    (output.y.sum() + sum(v for key, v in output.aux.items() if is_loss(key))).backward()
    gradients = {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    largest = {n: g.to_dense().abs().max().item() for n, g in gradients.items() if g is not None}
    # A norm passes 1 / sqrt(eps) of what comes in at zero: 316, `l2_norm` 1,000. Layers have up to
    # four in series; one division by a norm that is only kept above 1e-12 passes more than all.
    large = {n: value for n, value in largest.items() if not value < 1e10}
    assert not large


@every_layer
def test_weight_decay_moves_linear_layers_and_filters_only(name, example):
    layer = example_layer(name, example)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    optimizer = make_optimizer(layer, partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {n for n, p in layer.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in moved if not DECAYS.search(n)} == set()
    assert moved or not any(n.endswith("_proj.weight") for n in before)
