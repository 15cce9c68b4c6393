"""What is particular to each matrix memory, and what a mixture of memories asks of all of them."""

from functools import partial
from math import log

import pytest
import torch
from torch.nn import functional as F

from mneme.layers import (
    LAYERS,
    DeltaNet,
    GatedLinearAttention,
    LinearAttention,
    Mamba2,
    MatrixMemory,
    MixtureOfMemories,
    state_tensors,
)
from mneme.layers.matrix.linear_attention import elu_map, taylor_map, taylor_size
from mneme.layers.matrix.retention import Retention
from mneme.layers.parts.rotary import rotate
from mneme.layers.parts.step_gate import STEP_RANGE
from mneme.ops.delta import delta_naive
from mneme.ops.diagonal_decay import diagonal_decay_naive
from mneme.ops.scalar_decay import scalar_decay_naive
from tests.helpers import (
    LAYER_EXAMPLES,
    assert_close,
    assert_states_close,
    example_input,
    example_layer,
    run_in_pieces,
)

every_matrix_memory = pytest.mark.parametrize(
    ("name", "example"),
    [(n, e) for n, e in LAYER_EXAMPLES if issubclass(LAYERS[n].cls, MatrixMemory)],
    ids=str,
)


def layer(cls, **options):
    torch.manual_seed(0)
    return cls(16, **options).double()


def text(*shape):
    return torch.randn(*(shape or (2, 30, 16)), generator=torch.Generator().manual_seed(1)).double()


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1))


# Inside a mixture of memories


@every_matrix_memory
def test_masked_tokens_leave_the_memory_as_it_is_and_read_it(name, example):
    net, x = example_layer(name, example), example_input(name)
    memory = net(x).state.memory
    qkv, raw = net.in_proj(x).tensor_split([sum(net.widths)], dim=-1)
    operands = net.operands(qkv, raw, net.positions(net(x).state.position, x.shape[1]))
    operands = operands.masked(torch.zeros(x.shape[:2], dtype=torch.bool))
    y, after = net.rule(operands, memory)
    assert_states_close(after, memory, 0.0)
    skip = net.D[:, None] * operands.v if name == "Mamba2" else 0.0  # beside what it reads
    assert_close(y - skip, net.read(operands.q, memory), "read")


@every_matrix_memory
def test_a_mixture_of_one_memory_is_the_memory(name, example):
    memory = partial(LAYERS[name].cls, **LAYERS[name].examples[example])
    mixture, x = layer(MixtureOfMemories, memory=memory, memories=1, top_k=1, shared=False), text()
    y, state, _ = mixture(x)
    alone = mixture.base(x)
    assert_close(y, alone.y, "output")
    for mixed, of_base in zip(
        state_tensors(state.memories), state_tensors(alone.state.memory), strict=True
    ):
        assert_close(mixed[:, 0], of_base, "memory")
    assert_close(state.tails[:, 0], alone.state.conv.tail, "tail of the convolution")


@every_matrix_memory
def test_three_memories_in_pieces_give_what_the_whole_gives(name, example):
    memory = partial(LAYERS[name].cls, **LAYERS[name].examples[example])
    mixture, x = layer(MixtureOfMemories, memory=memory, memories=3), text(2, 20, 16)
    whole = mixture(x)
    pieces = run_in_pieces(mixture, x, [7, 1, 1, 1, 10])
    assert_close(pieces.y, whole.y, "output")
    assert_states_close(pieces.state, whole.state)


@every_matrix_memory
def test_memories_stay_fp32_in_bf16(name, example):
    net = example_layer(name, example, torch.bfloat16)
    output = net(example_input(name, dtype=torch.bfloat16))
    assert output.y.dtype == torch.bfloat16
    assert {t.dtype for t in state_tensors(output.state.memory)} == {torch.float32}


# Linear attention


@pytest.mark.parametrize("feature_map", ["elu", "taylor"])
def test_normalized_linear_attention_is_a_weighted_mean_of_the_values(feature_map):
    net, x = layer(LinearAttention, heads=2, key_dim=6, feature_map=feature_map), text()
    q, k, v = (split_heads(t, 2) for t in net.in_proj(x).split([12, 12, 16], -1))
    if feature_map == "elu":
        weights = torch.einsum("bthk,bshk->bhts", F.elu(q) + 1, F.elu(k) + 1)
    else:
        s = torch.einsum("bthk,bshk->bhts", q, k) / 6**0.5
        weights = 1 + s + s**2 / 2
    weights = weights.tril()
    y = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    output = net(x)
    assert_close(output.y, net.out_proj(y.flatten(-2)), "output", 1e-5)  # the floor of the sum
    phi = taylor_map(k) if feature_map == "taylor" else elu_map(k)
    memory, total = output.state.memory
    assert_close(memory, torch.einsum("bthf,bthv->bhfv", phi, v), "S")
    assert_close(total, phi.sum(1), "z")


def test_linear_attention_without_a_map_normalizes_its_answer():
    net, x = layer(LinearAttention, heads=2, feature_map="identity"), text()
    q, k, v = (split_heads(t, 2) for t in net.in_proj(x).chunk(3, -1))
    y, memory = scalar_decay_naive(q, k, v, None)
    output = net(x)
    assert_close(output.y, net.out_proj(net.norm(y).flatten(-2)), "output")
    assert_close(output.state.memory, memory, "memory")


@pytest.mark.parametrize("feature_map", ["elu", "identity", "taylor"])
def test_linear_attention_without_a_convolution_in_pieces(feature_map):
    net, x = layer(LinearAttention, heads=2, feature_map=feature_map), text(2, 9, 16)
    whole, pieces = net(x), run_in_pieces(net, x, [1, 5, 1, 2])
    assert_close(pieces.y, whole.y, "output")
    assert_states_close(pieces.state, whole.state)


@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_taylor_features_expand_the_exponential(width):
    q, k = text(2, 5, width)
    s = (q * k).sum(-1) / width**0.5
    assert_close((taylor_map(q) * taylor_map(k)).sum(-1), 1 + s + s**2 / 2, "inner product")
    assert taylor_map(q).shape[-1] == taylor_size(width) == 1 + width + width * (width + 1) // 2


def test_elu_features_do_not_round_to_zero():
    assert (elu_map(torch.linspace(-50, 50, 99)) > 0).all()
    x = torch.linspace(-5, 5, 99)
    assert_close(elu_map(x), F.elu(x) + 1, "map", 1e-6)


# Retention


def test_retention_is_the_papers_block():
    net, x = layer(Retention, heads=2), text()
    q, k, v = (split_heads(t, 2) for t in net.in_proj(x).split([16, 16, 32], -1))
    q, k = rotate(q, k, positions=torch.arange(30)[None], base=10_000.0)
    decay = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6]).double().log().expand(2, 30, 2)
    y, memory = scalar_decay_naive(q, k, v, decay)
    output = net(x)
    y = net.norm(y).flatten(-2) * F.silu(net.gate_proj(x))
    assert_close(output.y, net.out_proj(y), "output")
    assert_close(output.state.memory, memory, "memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_lives_of_retention(dtype):
    decay = Retention(64, heads=8).gates(torch.empty(1, 1, 0, dtype=dtype))["log_decay"][0, 0]
    half_lives = [22, 44, 88, 177, 355, 709, 1419, 2839]
    assert [round(h) for h in (-log(2) / decay).tolist()] == half_lives


def test_retention_needs_an_even_key_size():
    with pytest.raises(ValueError, match="even key size, got 3"):
        Retention(16, head_dim=3)


# Gated linear attention


def test_gated_linear_attention_is_the_papers_block():
    net, x = layer(GatedLinearAttention, heads=2), text()
    *qkv, low = net.in_proj(x).split([8, 8, 16, 16], -1)
    decay = torch.sigmoid(net.decay_proj(low)).log() / 16
    y, memory = diagonal_decay_naive(*(split_heads(t, 2) for t in (*qkv, decay)))
    output = net(x)
    y = net.norm(y).flatten(-2) * F.silu(net.gate_proj(x))
    assert_close(output.y, net.out_proj(y), "output")
    assert_close(output.state.memory, memory, "memory")


def test_gated_linear_attention_starts_with_half_lives_near_16_tokens():
    net = layer(GatedLinearAttention, heads=2)
    raw = net.in_proj(text(4, 256, 16)).split([32, 16], -1)[1]
    half_lives = -log(2) / net.gates(raw)["log_decay"]
    low, middle, high = half_lives.quantile(torch.tensor([0.01, 0.5, 0.99]).double())
    assert 8 < low < 14 < middle < 18 < high < 32


# DeltaNet


def test_delta_net_is_the_papers_block():
    net, x = layer(DeltaNet, heads=2, expand_v=2.0), text()
    qkv, beta = net.in_proj(x).split([64, 2], -1)
    q, k, v = (split_heads(t, 2) for t in F.silu(net.conv(qkv).y).split([16, 16, 32], -1))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    y, memory = delta_naive(q, k, v, beta.sigmoid())
    output = net(x)
    assert_close(output.y, net.out_proj(net.norm(y).flatten(-2)), "output")
    assert_close(output.state.memory, memory, "memory")


def test_negative_eigenvalues_double_the_write_strength():
    x = text(1, 1, 16)
    plain, doubled = (
        layer(DeltaNet, heads=1, negative_eigenvalues=n)(x).state.memory for n in (False, True)
    )
    assert_close(doubled, 2 * plain, "first write")


# Mamba-2


def test_mamba2_is_the_papers_block():
    net, x = layer(Mamba2, head_dim=8, state_dim=6), text()
    qkv, raw = net.in_proj(x).split([44, 4], -1)
    c, b, v = F.silu(net.conv(qkv).y).split([6, 6, 32], -1)
    v, step = split_heads(v, 4), F.softplus(raw + net.decay.dt_bias)
    b, c = (t[:, :, None].expand(-1, -1, 4, -1) for t in (b, c))
    decay = -net.decay.A_log.exp() * step
    y, memory = scalar_decay_naive(c, b, step[..., None] * v, decay, scale=1.0)
    y = (y + net.D[:, None] * v).flatten(-2) * F.silu(net.gate_proj(x))
    output = net(x)
    assert_close(output.y, net.out_proj(net.norm(y)), "output")
    assert_close(output.state.memory, memory, "memory")


def test_mamba2_normalizes_over_all_heads_after_the_gate():
    net = layer(Mamba2, expand=1, head_dim=4, state_dim=6)
    net.norm.eps = 0.0  # so that the mean square is one
    torch.nn.init.eye_(net.out_proj.weight)
    output = net(text()).y
    assert_close(output.square().mean(-1), torch.ones(2, 30), "mean square", 1e-4)
    assert split_heads(output, 4).square().mean(-1).std() > 0.1


def test_mamba2_starts_as_the_released_code_does():
    net = Mamba2(64, head_dim=16, state_dim=8)
    rates = net.decay.A_log.exp()
    assert [int((rate - 1) // (15 / 8)) for rate in rates] == list(range(8))
    steps = F.softplus(net.decay.dt_bias)
    assert (steps >= 0.99 * STEP_RANGE[0]).all()
    assert (steps <= 1.01 * STEP_RANGE[1]).all()
    assert torch.equal(net.D, torch.ones(8))


def test_heads_of_mamba2_must_divide_its_width():
    with pytest.raises(ValueError, match=r"head_dim \(64\) must divide expand \* d_model \(32\)"):
        Mamba2(16)
