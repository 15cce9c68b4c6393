"""What is particular to Gated DeltaNet."""

import pytest
import torch

from mneme.layers import GatedDeltaNet
from mneme.layers.matrix.gated_delta_net import RATES
from mneme.layers.parts.step_gate import STEP_RANGE
from mneme.ops.gated_delta import gated_delta_naive
from tests.helpers import assert_close


def layer(**options):
    torch.manual_seed(0)
    return GatedDeltaNet(16, **options).double()


def test_it_is_the_papers_block_around_the_naive_recurrence():
    net = layer(heads=2, expand_v=2.0)
    x = torch.randn(2, 30, 16).double()
    qkv, decay, beta = net.in_proj(x).split([64, 2, 2], -1)
    qkv = torch.nn.functional.silu(net.conv(qkv).y)
    q, k, v = (t.unflatten(-1, (2, -1)) for t in qkv.split([16, 16, 32], -1))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    decay = -net.decay.A_log.exp() * torch.nn.functional.softplus(decay + net.decay.dt_bias)
    y, memory = gated_delta_naive(q, k, v, decay, beta.sigmoid())
    y = net.norm(y).flatten(-2) * torch.nn.functional.silu(net.gate_proj(x))
    output = net(x)
    assert_close(output.y, net.out_proj(y), "output")
    assert_close(output.state.memory, memory, "memory")


def test_chunk_size_is_not_part_of_the_function():
    x = torch.randn(1, 50, 16).double()
    assert_close(
        layer(heads=2, chunk_size=8)(x).y, layer(heads=2, chunk_size=64)(x).y, "other chunks"
    )


def test_gates_start_where_the_docstring_says():
    net = GatedDeltaNet(64, heads=8)
    parts = RATES[1] / 8
    assert [int(rate // parts) for rate in net.decay.A_log.exp()] == list(range(8))
    steps = torch.nn.functional.softplus(net.decay.dt_bias)
    assert (steps >= 0.99 * STEP_RANGE[0]).all()
    assert (steps <= 1.01 * STEP_RANGE[1]).all()


def test_negative_eigenvalues_double_the_write_strength():
    x = torch.randn(1, 1, 16).double()
    plain, doubled = (layer(heads=1, negative_eigenvalues=n)(x).state.memory for n in (False, True))
    assert_close(doubled, 2 * plain, "first write")


def test_the_memory_stays_fp32_in_bf16():
    net = GatedDeltaNet(16, heads=2).bfloat16()
    state = net(torch.randn(1, 8, 16).bfloat16()).state
    assert state.memory.dtype == torch.float32
    assert state.conv.tail.dtype == torch.bfloat16


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"heads \(3\) must divide d_model \(16\)"):
        GatedDeltaNet(16, heads=3)
