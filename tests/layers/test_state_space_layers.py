"""What is particular to Mamba, S4D and LongConv."""

from math import log, pi

import pytest
import torch
from torch.nn import functional as F

from mneme.layers import S4D, LongConv, Mamba, SavingLayer
from mneme.layers.parts.step_gate import STEP_RANGE
from mneme.layers.recurrent.long_conv import KERNEL_STD
from mneme.layers.recurrent.s4d import first_rates
from mneme.models.optim import parameter_groups
from mneme.ops.diagonal_state_space import diagonal_state_space_naive
from mneme.ops.long_convolution import long_convolution_naive
from mneme.ops.selective_scan import selective_scan_naive
from tests.helpers import assert_close, assert_states_close


def layer(cls, **options):
    torch.manual_seed(0)
    return cls(16, **options).double()


def text(*shape):
    return torch.randn(*(shape or (2, 30, 16)), generator=torch.Generator().manual_seed(1)).double()


def gated_output(net, y):
    value, gate = (m(F.gelu(y)) for m in (net.output.out_proj, net.output.gate_proj))
    return F.glu(torch.cat((value, gate), dim=-1))


def treatment(net):
    """Weight decay (True or False) and largest learning rate by parameter name."""
    of = {
        id(p): ("weight_decay" not in group, group["max_lr"])
        for group in parameter_groups(net)
        for p in group["params"]
    }
    return {name: of[id(p)] for name, p in net.named_parameters()}


def assert_log_uniform(steps):
    low, high = STEP_RANGE
    assert (steps >= 0.99 * low).all()
    assert (steps <= 1.01 * high).all()
    assert abs(steps.log().mean() - (log(low) + log(high)) / 2) < 0.2


# Mamba


def test_mamba_is_the_papers_block():
    net, x = layer(Mamba, state_dim=5, step_rank=3), text()
    inner, z = net.in_proj(x).split([32, 32], -1)
    inner = F.silu(net.conv(inner).y)
    low, b, c = net.select_proj(inner).split([3, 5, 5], -1)
    step = F.softplus(low @ net.step_proj.weight.T + net.dt_bias)
    y, memory = selective_scan_naive(inner, step, -net.A_log.exp(), b, c)
    y = y + net.D * inner
    output, saved = net.forward_saving(x)
    assert_close(output.y, net.out_proj(y * F.silu(z)), "output")
    assert_close(output.state.memory, memory, "memory")
    assert_close(saved, y, "what is handed on")
    assert_states_close(net(x).state, output.state, 0.0)


def test_mamba_starts_as_the_paper_says():
    torch.manual_seed(0)
    net = Mamba(512, state_dim=4)
    assert_close(net.A_log.exp(), torch.arange(1.0, 5).expand(1024, 4), "rates", 1e-6)
    assert_log_uniform(F.softplus(net.dt_bias))
    assert torch.equal(net.D, torch.ones(1024))
    weight = net.step_proj.weight
    assert weight.shape == (1024, 32)
    assert 0.99 < weight.abs().max() * 32**0.5 <= 1
    assert abs(weight.std() * 32**0.5 - 3**-0.5) < 0.01


def test_rank_of_mambas_step_is_rounded_up():
    assert Mamba(17).step_proj.in_features == 2
    assert Mamba(16).step_proj.in_features == 1


def test_decays_of_mamba_are_not_decayed():
    treated = treatment(Mamba(16))
    assert treated["A_log"] == treated["D"] == treated["dt_bias"] == (False, None)
    assert treated["in_proj.weight"] == treated["step_proj.weight"] == (True, None)


def test_mamba_can_hand_on_what_it_read():
    net = Mamba(16, expand=3)
    assert isinstance(net, SavingLayer)
    assert net.saved_dim == net.forward_saving(text().float())[1].shape[-1] == 48


# S4D


@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
def test_s4d_is_the_papers_block(init):
    net, x = layer(S4D, state_dim=6, init=init), text()
    rate = torch.stack((-net.A_log.exp(), net.A_imag), -1)
    ones = torch.tensor([1.0, 0.0]).double().expand_as(rate)
    y, modes = diagonal_state_space_naive(x, rate, ones, net.C, net.log_step.exp())
    output = net(x)
    assert_close(output.y, gated_output(net, y + net.D * x), "output")
    assert_close(output.state.modes, modes, "modes")


def test_first_rates_of_s4d():
    real, imag = first_rates("lin", 8)
    assert_close(imag, pi * torch.arange(4), "lin", 1e-6)
    assert (real == -0.5).all()
    real, imag = first_rates("inv", 8)
    assert_close(imag, 8 / pi * torch.tensor([7.0, 5 / 3, 3 / 5, 1 / 7]), "inv", 1e-6)
    assert (real == -0.5).all()
    real, imag = first_rates("real", 8)
    assert real.tolist() == [-1, -2, -3, -4]
    assert not imag.any()


def test_legs_rates_are_eigenvalues_of_the_normal_part_of_hippo():
    n = torch.arange(8).double()
    root = (2 * n + 1).sqrt()
    hippo = -torch.outer(root, root).tril(-1) - torch.diag(n + 1)
    p = (n + 0.5).sqrt()
    eigenvalues = torch.linalg.eigvals(hippo + torch.outer(p, p))
    positive = eigenvalues[eigenvalues.imag > 0]
    real, imag = first_rates("legs", 8)
    assert_close(imag, positive.imag.sort().values, "imaginary parts", 1e-6)
    assert_close(real, positive.real, "real parts", 1e-6)


def test_s4d_starts_with_the_rates_in_every_channel_and_spread_steps():
    torch.manual_seed(0)
    net = S4D(512, state_dim=8)
    assert_close(-net.A_log.exp(), torch.full((512, 4), -0.5), "real parts", 1e-6)
    assert_close(net.A_imag, first_rates("lin", 8)[1].expand(512, 4), "imaginary parts", 0.0)
    assert_log_uniform(net.log_step.exp())
    assert abs(net.C.square().sum(-1).mean() - 1) < 0.1, "C is not a unit complex normal"


def test_reads_of_s4d_start_with_the_size_of_hippos_writes_for_legs():
    """Whose B, halved as the low-rank part is left out, has a part along each eigenvector."""
    n = torch.arange(8).double()
    b = (2 * n + 1).sqrt()
    normal = -torch.outer(b, b).tril(-1) - torch.diag(n + 1) + torch.outer(b, b) / 2
    eigenvalues, vectors = torch.linalg.eig(normal)
    parts = torch.linalg.solve(vectors, b.to(vectors) / 2).abs()
    kept = eigenvalues.imag > 0
    expected = parts[kept][eigenvalues.imag[kept].argsort()]
    torch.manual_seed(0)
    sizes = S4D(20_000, state_dim=8, init="legs").C.square().sum(-1).mean(0).sqrt()
    assert_close(sizes, expected, "C", 0.02)


def test_rates_and_steps_of_s4d_learn_slowly_and_are_not_decayed():
    """And C, which reads, does and is, as in the released code."""
    treated = treatment(S4D(16))
    assert {treated[name] for name in ("A_log", "A_imag", "log_step")} == {(False, 1e-3)}
    assert treated["D"] == (False, None)
    assert treated["C"] == treated["output.out_proj.weight"] == (True, None)


@pytest.mark.parametrize("state_dim", [0, 7])
def test_states_of_s4d_come_in_pairs(state_dim):
    with pytest.raises(ValueError, match=f"even, 2 or more, got {state_dim}"):
        S4D(16, state_dim=state_dim)


# Long convolution


def test_long_conv_is_the_papers_block():
    net, x = layer(LongConv, max_len=40, squash=0.01), text()
    taps = net.kernel.sign() * (net.kernel.abs() - 0.01).relu()
    y, inputs = long_convolution_naive(x, taps)
    output = net(x)
    assert_close(output.y, gated_output(net, y + net.D * x), "output")
    assert torch.equal(output.state.inputs, inputs)


def test_small_taps_are_squashed_to_zero_and_get_no_gradient():
    net, x = layer(LongConv, max_len=3, squash=0.25), text()
    with torch.no_grad():
        net.kernel[:] = torch.tensor([0.2, -0.75, 0.25])
    assert_close(net.taps(), torch.tensor([0.0, -0.5, 0.0]).expand(16, 3), "taps", 0.0)
    net(x).y.square().sum().backward()
    assert not net.kernel.grad[:, [0, 2]].any()
    assert net.kernel.grad[:, 1].all()


def test_long_conv_forgets_what_lies_further_back_than_its_kernel():
    net, x = layer(LongConv, max_len=5), text()
    changed = x.clone()
    changed[:, 10] += 1.0
    moved = (net(changed).y != net(x).y).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]
    assert net(x).state.inputs.shape == (2, 4, 16)
    assert [net.state_size(t) for t in (0, 3, 4, 100)] == [0, 48, 64, 64]


def test_taps_of_long_conv_fade_faster_in_later_channels():
    torch.manual_seed(0)
    kernel = LongConv(64, max_len=1024).kernel
    first, last = kernel[:8].abs(), kernel[-8:].abs()
    mean = KERNEL_STD * (2 / pi) ** 0.5  # of the size of a normal draw
    assert abs(first[:, :64].mean() / mean - 1) < 0.15
    assert 0.25 < first[:, -64:].mean() / mean < 0.45, "channels 0 to 7 end near exp(-1.2)"
    assert last[:, 512:].mean() < 0.01 * mean


def test_the_kernel_learns_slowly_and_is_not_decayed():
    treated = treatment(LongConv(16, max_len=4))
    assert treated["kernel"] == (False, 5e-4)
    assert treated["output.gate_proj.weight"] == (True, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_len": 0}, "max_len must be 1"), ({"max_len": 4, "squash": -0.1}, "squash must be 0")],
)
def test_sizes_of_long_conv(options, message):
    with pytest.raises(ValueError, match=message):
        LongConv(16, **options)
