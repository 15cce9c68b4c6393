"""Options that released weights need, beside what the peers show: errors, combinations."""

from functools import partial

import pytest
import torch

from mneme.layers import (
    GatedDeltaNet,
    Mamba2,
    MixtureOfMemories,
    RopeScaling,
    SoftmaxAttention,
)
from mneme.layers.hybrid.cross_decoder import CrossAttention
from tests.helpers import assert_close, run_in_pieces

WIDTH = 16


def x(length=13):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(Mamba2, head_dim=8, groups=3), r"groups \(3\) must divide the heads \(4\)"),
        (partial(Mamba2, head_dim=8, groups=0), "groups must be 1 or more"),
        (
            partial(Mamba2, head_dim=8, step_limit=(0.2, 0.1)),
            r"step_limit must be \(least, largest\)",
        ),
        (
            partial(Mamba2, head_dim=8, step_limit=(-1.0, 0.1)),
            r"step_limit must be \(least, largest\)",
        ),
        (partial(GatedDeltaNet, key_heads=3), r"key_heads \(3\) must divide heads \(4\)"),
        (partial(GatedDeltaNet, key_heads=0), "key_heads must be 1 or more"),
        (
            partial(SoftmaxAttention, rope_base=None, rope_scaling=RopeScaling(factor=2.0)),
            "rope_scaling needs a rope_base",
        ),
        (lambda _: RopeScaling(factor=0.5), "factor must be 1 or more"),
        (lambda _: RopeScaling(2.0, trained_length=0), "trained_length must be 1 or more"),
        (lambda _: RopeScaling(2.0, 8, low_turns=4.0), r"low_turns \(4.0\) and high_turns \(4.0\)"),
    ],
)
def test_what_makes_no_sense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(WIDTH)


BIASED = partial(Mamba2, head_dim=8, state_dim=3, groups=2, bias=True, conv_bias=True, chunk_size=4)


def mixture(**options):
    torch.manual_seed(0)
    return MixtureOfMemories(WIDTH, memory=BIASED, **options).double()


@pytest.mark.parametrize("shared", [True, False])
def test_one_memory_with_biases_is_that_memory_also_in_a_mixture(shared):
    layer = mixture(memories=1, top_k=1, shared=shared)
    if shared:  # the routed memory and the shared one read the same: twice what one reads
        with torch.no_grad():
            queries = layer.base.widths[0]
            layer.write_proj.copy_(layer.base.in_proj.weight[None, queries:])
    base, output = layer.base, layer(x())
    y, state = base.read_written(x(), base.init_state(2))
    assert_close(output.y, base.readout((1 + shared) * y, x()), "output")
    recalled = (1 + shared) * base.read(base.queries(x(1), ()), state.memory)
    assert_close(layer.recall(x(1), output.state), base.readout(recalled, x(1)), "recalled")


@pytest.mark.parametrize(
    "options", [{"convolve": "before"}, {"single_projection": True}, {"shared": False}], ids=str
)
def test_biases_keep_the_split_rule_in_a_mixture(options):
    layer = mixture(memories=3, top_k=2, **options)
    pieces = run_in_pieces(layer, x(), [5, 1, 7])
    assert_close(pieces.y, layer(x()).y, "output", 1e-10)
    assert (layer.conv is None) or layer.conv.bias is not None


def test_attention_to_the_keys_of_another_layer_has_its_positions_and_biases():
    torch.manual_seed(0)
    scaling = RopeScaling(factor=8.0, trained_length=32)
    options = {"rope_base": 100.0, "rope_scaling": scaling, "bias": True}
    source = SoftmaxAttention(WIDTH, heads=2, kv_heads=1, **options).double()
    reader = CrossAttention(WIDTH, source=source).double()
    state = source.state_dict()
    reader.load_state_dict({name: state[name] for name in reader.state_dict()})
    expected = source(x(40))
    assert_close(reader(x(40), expected.state), expected.y, "output")
