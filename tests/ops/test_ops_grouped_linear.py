"""Products of groups of rows, against one linear layer at a time."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mneme.ops.grouped_linear import grouped_linear

ROWS = [[3, 0, 5, 1], [0, 0, 9, 0], [4], [0, 0], [1] * 6]
every_grouping = pytest.mark.parametrize("rows", ROWS, ids=lambda rows: "-".join(map(str, rows)))


def operands(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(rows), 5), (len(rows), 3, 5)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def one_by_one(x, weight, rows):
    return torch.cat([F.linear(part, w) for part, w in zip(x.split(rows), weight, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_grouping
def test_it_is_one_linear_map_after_another(rows, dtype):
    x, weight = operands(rows, dtype)
    y, expected = grouped_linear(x, weight, rows), one_by_one(x, weight, rows)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, weight], dy)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [x, weight], dy))


@every_grouping
def test_its_gradient_is_that_of_finite_differences(rows):
    def call(x, weight):
        return grouped_linear(x, weight, rows)

    assert torch.autograd.gradcheck(call, operands(rows))


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors = operands(ROWS[0])
    tensors[frozen].requires_grad_(False)
    grouped_linear(*tensors, ROWS[0]).sum().backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad.abs().sum() > 0


def test_autocast_rounds_it_as_any_linear_map():
    x, weight = operands(ROWS[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = grouped_linear(x, weight, ROWS[0]), one_by_one(x, weight, ROWS[0])
        wide = grouped_linear(x.double(), weight.double(), ROWS[0])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    assert wide.dtype == torch.float64
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_its_products_are_counted():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = grouped_linear(torch.zeros(9, 5), torch.zeros(4, 3, 5), ROWS[0])
    assert y.shape == (9, 3)
    assert counter.get_total_flops() == 2 * 9 * 5 * 3
