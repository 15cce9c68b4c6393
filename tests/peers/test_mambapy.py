"""Mamba against the block of mambapy."""

from functools import partial

import pytest
import torch
from mambapy.mamba import MambaBlock, MambaConfig

from mneme.layers import Mamba
from tests.peers.compare import assert_same, peer
from tests.peers.mappings.mambapy import mamba_options, mamba_weights

WIDTH = 12


def compare(length=13, precision=None, **options):
    config = MambaConfig(d_model=WIDTH, n_layers=1, **{"d_state": 5, **options})
    theirs = peer(lambda: MambaBlock(config))
    ours = Mamba(WIDTH, **mamba_options(config))
    x = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    assert_same(ours, theirs, partial(mamba_weights, config=config), x, **precision or {})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pscan": False},
        {"bias": True},
        {"conv_bias": False},
        {"bias": True, "conv_bias": False, "d_conv": 2},
        {"expand_factor": 3, "dt_rank": 4, "d_state": 1, "d_conv": 5},
        {"length": 1},
        {"length": 64},
    ],
    ids=str,
)
def test_mamba(options):
    compare(**options)


def test_norms_without_a_counterpart_are_refused():
    config = MambaConfig(d_model=WIDTH, n_layers=1, inner_layernorms=True)
    with pytest.raises(ValueError, match="inner_layernorms is True; Mamba has False alone"):
        mamba_options(config)


def test_mamba_as_it_is():
    compare(precision={"in_double": False, "tolerance": 1e-5})  # rates and skips are in fp32
