"""GatedDeltaNet against that of Qwen3-Next in transformers."""

from functools import partial

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from mneme.layers import GatedDeltaNet
from tests.peers.compare import assert_same, peer
from tests.peers.mappings.qwen3_next import gated_delta_net_options, gated_delta_net_weights

WIDTH = 12


def compare(length=13, precision=None, key_heads=2, heads=4, sizes=(5, 3), **options):
    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=sizes[0],
        linear_value_head_dim=sizes[1],
        **options,
    )
    theirs = peer(lambda: Qwen3NextGatedDeltaNet(config, layer_idx=0))
    with torch.no_grad():
        theirs.A_log -= 4  # it starts by forgetting everything within a token or two
    ours = GatedDeltaNet(WIDTH, **gated_delta_net_options(config))
    x = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    mapping = partial(gated_delta_net_weights, config=config)
    assert_same(ours, theirs, mapping, x, **precision or {})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_heads": 1, "heads": 3},
        {"key_heads": 3, "heads": 3},
        {"sizes": (4, 8), "linear_conv_kernel_dim": 2},
        {"sizes": (7, 61)},  # 61 / 7 * 7 is below 61
        {"rms_norm_eps": 1e-2},
        {"length": 1},
        {"length": 70},
    ],
    ids=str,
)
def test_gated_delta_net(options):
    compare(**options)


def test_gated_delta_net_as_it_is():
    compare(
        precision={"in_double": False, "tolerance": 1e-5}
    )  # all but the linear layers is in fp32
