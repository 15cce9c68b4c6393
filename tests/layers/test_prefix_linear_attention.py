"""What is particular to prefix linear attention: where the encoder's sums are read."""

import pytest
import torch

from mneme.layers import PrefixLinearAttention
from mneme.layers.matrix.linear_attention import elu_map, taylor_map
from mneme.ops.linear_attention import linear_attention_naive
from tests.helpers import assert_close, run_in_pieces

PREFIX = 7


def layer(**options):
    torch.manual_seed(0)
    options = {"heads": 2, "key_dim": 6, "prefix": PREFIX} | options
    return PrefixLinearAttention(16, **options).double()


def text(tokens=20):
    return torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(1)).double()


def operands(net, x):
    """Features of q, k and ke, and the two values, by hand."""
    phi = taylor_map if net.taylor else elu_map
    q, k, v = (t.unflatten(-1, (2, -1)) for t in net.in_proj(x).split([12, 12, 16], -1))
    ke, ve = (t.unflatten(-1, (2, -1)) for t in net.encoder_proj(x[:, :PREFIX]).split([12, 16], -1))
    return (phi(q), phi(k), v), (phi(ke), ve)


@pytest.mark.parametrize("feature_map", ["taylor", "elu"])
def test_from_the_end_of_the_prefix_on_it_is_the_papers_form(feature_map):
    net, x = layer(feature_map=feature_map), text()
    decoder, prefix = operands(net, x)
    y, _ = linear_attention_naive(*decoder, prefix=prefix)
    expected, actual = net.out_proj(y.flatten(-2)), net(x).y
    last = PREFIX - 1
    assert_close(actual[:, last:], expected[:, last:], "from the last token of the prefix on")
    early = (actual[:, :last] - expected[:, :last]).abs().amax(-1)
    assert early.min() > 1e-3, "a token before the end of the prefix has seen it"


@pytest.mark.parametrize("feature_map", ["taylor", "elu"])
def test_before_the_end_of_the_prefix_it_is_linear_attention(feature_map):
    net, x = layer(feature_map=feature_map), text()
    y, _ = linear_attention_naive(*operands(net, x)[0])
    last = PREFIX - 1
    assert_close(net(x).y[:, :last], net.out_proj(y.flatten(-2))[:, :last], "inside the prefix")
    assert_close(net(x[:, :last]).y, net.out_proj(y.flatten(-2))[:, :last], "a shorter sequence")


def test_the_state_holds_the_sums_of_both():
    net, x = layer(), text()
    (_, k, v), (ke, ve) = operands(net, x)
    state = net(x).state
    for name, held, keys, values in (
        ("memory", state.memory, k, v),
        ("encoded", state.encoded, ke, ve),
    ):
        assert_close(held[..., :-1], torch.einsum("bthf,bthv->bhfv", keys, values), f"S, {name}")
        assert_close(held[..., -1], keys.sum(1), f"z, {name}")
    assert state.position.tolist() == [20, 20]


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_cut_anywhere_near_the_end_of_the_prefix_changes_nothing(cut):
    net, x = layer(), text()
    assert_close(run_in_pieces(net, x, [cut, 20 - cut]).y, net(x).y, f"cut at {cut}")


def test_sequences_of_a_batch_may_stand_at_different_places():
    net, x = layer(), text(10)
    states = [net(x[:1, :n]).state for n in (3, 9)]
    together = type(states[0])(*(torch.cat(pair) for pair in zip(*states, strict=True)))
    y = net(x[1:].expand(2, -1, -1), together).y
    for i, state in enumerate(states):
        assert_close(y[i], net(x[1:], state).y[0], f"sequence {i}")


def test_the_encoder_reads_no_token_after_the_prefix():
    net, x = layer(), text()
    changed = x.clone()
    changed[:, PREFIX:] += 1.0
    assert torch.equal(net(x).state.encoded, net(changed).state.encoded)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prefix": 0}, "prefix must be 1"), ({"heads": 3}, r"heads \(3\) must divide d_model")],
)
def test_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)
