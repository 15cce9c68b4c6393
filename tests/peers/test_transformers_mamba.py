"""Mamba and Mamba2 against the mixers of transformers."""

from functools import partial

import pytest
import torch
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from mneme.layers import Mamba, Mamba2
from tests.peers.compare import assert_same, peer
from tests.peers.mappings.transformers_mamba import (
    mamba2_options,
    mamba2_weights,
    mamba_options,
    mamba_weights,
)

WIDTH = 12
AS_IT_IS = {"in_double": False, "tolerance": 1e-5}  # decays, steps, states, the norm are in fp32


def x(length=13):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def compare_mamba(length=13, precision=None, **options):
    config = MambaConfig(hidden_size=WIDTH, state_size=5, num_hidden_layers=1, **options)
    theirs = peer(lambda: MambaMixer(config, layer_idx=0))
    ours = Mamba(WIDTH, **mamba_options(config))
    mapping = partial(mamba_weights, config=config)
    assert_same(ours, theirs, mapping, x(length), **precision or {})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": True},
        {"use_conv_bias": False},
        {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2},
        {"expand": 3, "time_step_rank": 4, "conv_kernel": 5},
        {"length": 1},
        {"length": 70},
        {"use_mambapy": True},
    ],
    ids=str,
)
def test_mamba(options):
    compare_mamba(**options)


def test_mamba_as_it_is():
    compare_mamba(precision=AS_IT_IS)


def compare_mamba2(length=13, precision=None, **options):
    sizes = {"hidden_size": WIDTH, "state_size": 5, "num_heads": 4, "head_dim": 6, "n_groups": 2}
    config = Mamba2Config(num_hidden_layers=1, **{**sizes, "chunk_size": 8, **options})
    theirs = peer(lambda: Mamba2Mixer(config, layer_idx=0))
    ours = Mamba2(WIDTH, **mamba2_options(config))
    mapping = partial(mamba2_weights, config=config)
    assert_same(ours, theirs, mapping, x(length), **precision or {})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_groups": 1},
        {"n_groups": 4},
        {"use_bias": True},
        {"use_conv_bias": False},
        {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2},
        {"expand": 3, "num_heads": 6, "n_groups": 3, "chunk_size": 5},
        {"time_step_limit": (0.01, 0.05)},  # of steps of 0.005 to 0.14
        {"layer_norm_epsilon": 1e-2},
        {"length": 1},
        {"length": 20},
    ],
    ids=str,
)
def test_mamba2(options):
    compare_mamba2(**options)


def test_mamba2_as_it_is():
    compare_mamba2(precision=AS_IT_IS)


def test_activations_without_a_counterpart_are_refused():
    config = Mamba2Config(hidden_size=32, num_heads=1, hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act is 'gelu'; Mamba2 has 'silu' or 'swish'"):
        mamba2_options(config)
