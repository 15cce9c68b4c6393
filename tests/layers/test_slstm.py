"""What is particular to the sLSTM and LSTM layer."""

import pytest
import torch
from torch.nn import functional as F

from mneme.layers import SLSTM
from mneme.layers.recurrent.slstm import FORGET_BIAS
from mneme.models.optim import parameter_groups
from mneme.ops.lstm import lstm_naive
from mneme.ops.slstm import slstm_naive
from tests.helpers import assert_close, assert_states_close


def layer(**options):
    torch.manual_seed(0)
    return SLSTM(16, **options).double()


def text():
    return torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(("cell", "naive"), [("slstm", slstm_naive), ("lstm", lstm_naive)])
def test_it_is_the_papers_block(cell, naive):
    net, x = layer(heads=2, head_dim=5, cell=cell), text()
    i, f = net.gate_proj(F.silu(net.conv(x).y)).chunk(2, -1)
    z, o = net.in_proj(x).chunk(2, -1)
    gates = torch.stack([g.unflatten(-1, (2, 5)) for g in (i, f, z, o)], dim=2)
    with torch.no_grad():
        net.norm.weight.normal_()
    h, state = naive(gates, net.recurrent, net.bias)
    centered = h - h.mean(-1, keepdim=True)  # a group is a head
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    output = net(x)
    expected = (normed.flatten(-2) * net.norm.weight) @ net.out_proj.weight.T
    assert_close(output.y, expected, "output")
    assert_states_close(output.state.cell, state)


def test_a_current_token_reaches_cell_input_and_output_gate_without_the_convolution():
    net, x = layer(heads=2), text()
    with torch.no_grad():
        net.conv.weight.zero_()
    changed = x.clone()
    changed[:, -1] += 1.0
    assert not torch.equal(net(changed).y[:, -1], net(x).y[:, -1])


@pytest.mark.parametrize("cell", ["slstm", "lstm"])
def test_heads_do_not_feed_back_into_each_other(cell):
    net, x = layer(heads=4, cell=cell), text()
    with torch.no_grad():
        net.recurrent.mul_(10)
    state = net(x).state
    touched = state._replace(cell=state.cell._replace(h=state.cell.h.clone()))
    touched.cell.h[:, 1] += 1.0
    before, after = net(x, state).state.cell.h, net(x, touched).state.cell.h
    assert (before != after).any(-1).any(0).tolist() == [False, True, False, False]


def test_forget_biases_are_positive_and_spread_over_each_head():
    net = SLSTM(64, heads=2)
    i, f, z, o = net.bias
    assert not torch.stack((i, z, o)).any()
    assert torch.equal(f[0], f[1])
    assert (f.amin(), f.amax()) == FORGET_BIAS
    assert (f.diff() > 0).all()
    half_lives = -torch.log(torch.tensor(2.0)) / F.logsigmoid(f[0, [0, -1]])
    assert half_lives.round().tolist() == [2, 280]


def test_recurrent_weights_start_small():
    torch.manual_seed(0)
    gains = torch.linalg.matrix_norm(SLSTM(64, heads=2).recurrent, ord=2)
    assert gains.min() > 0.1
    assert gains.max() < 0.25


def test_biases_are_not_decayed_and_recurrent_weights_are():
    net = SLSTM(16)
    decayed = {
        id(p)
        for group in parameter_groups(net)
        if "weight_decay" not in group
        for p in group["params"]
    }
    names = {name for name, p in net.named_parameters() if id(p) in decayed}
    maps = {"gate_proj.weight", "in_proj.weight", "out_proj.weight"}
    assert names == maps | {"recurrent", "conv.weight"}


@pytest.mark.parametrize("cell", ["slstm", "lstm"])
def test_a_head_can_follow_parity(cell):
    """Weights by hand: a one replaces each cell by the opposite of its h, a zero keeps it.

    The second unit holds the opposite of the first, as the norm takes out what both have in common.
    """
    net = layer(heads=1, head_dim=2, cell=cell, conv_size=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.conv.weight.fill_(1.0)
        net.gate_proj.weight[:, 0] = torch.tensor([40.0, 40.0, -40.0, -40.0])  # i opens, f closes
        net.recurrent[2, 0], net.bias[3] = -10.0 * torch.eye(2), 10.0  # z against h; o stays open
        net.norm.weight.fill_(1.0)
        net.out_proj.weight[0, 0] = 1.0
    bits = torch.randint(2, (1, 200), generator=torch.Generator().manual_seed(0))
    x = torch.zeros(1, 200, 16).double()
    x[..., 0] = 2.0 * bits - 1
    state = net.init_state(1)
    even = {"h": [0.75, -0.75], "c": [1.0, -1.0], "n": [1.0, 1.0], "m": [0.0, 0.0]}
    start = type(state.cell)(*(torch.tensor([[even[f]]]).double() for f in state.cell._fields))
    y = net(x, state._replace(cell=start)).y[..., 0]
    assert_close(y, 1.0 - 2 * (bits.cumsum(1) % 2), "parity", 1e-4)


def test_heads_must_divide_the_width_and_have_something_to_be_normalized_over():
    with pytest.raises(ValueError, match=r"heads \(3\) must divide d_model \(16\)"):
        SLSTM(16, heads=3)
    with pytest.raises(ValueError, match="head_dim must be 2 or more, got 1"):
        SLSTM(16, heads=16)
