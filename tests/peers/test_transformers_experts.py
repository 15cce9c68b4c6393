"""`MixtureOfExperts` is the sparse block of Mixtral and of OLMoE, in transformers 5.23.0."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from mneme.layers import MixtureOfExperts
from tests.helpers import assert_close
from tests.peers.compare import InDouble, assert_same, peer
from tests.peers.mappings.transformers_experts import experts_options, experts_weights


def config(make, **sizes):
    made = make(**sizes)
    made._experts_implementation = "eager"  # the loop over experts that each file has
    return made


def mixtral(**sizes):
    return MixtralSparseMoeBlock, config(MixtralConfig, **sizes)


def olmoe(**sizes):
    return OlmoeSparseMoeBlock, config(OlmoeConfig, **sizes)


CASES = {
    "mixtral": mixtral(
        hidden_size=12, intermediate_size=20, num_local_experts=5, num_experts_per_tok=2
    ),
    "mixtral, one choice": mixtral(
        hidden_size=10, intermediate_size=7, num_local_experts=3, num_experts_per_tok=1
    ),
    "olmoe": olmoe(hidden_size=11, intermediate_size=25, num_experts=7, num_experts_per_tok=3),
    "olmoe, renormalized": olmoe(
        hidden_size=8,
        intermediate_size=6,
        num_experts=6,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    ),
    "olmoe, all experts": olmoe(
        hidden_size=6, intermediate_size=9, num_experts=4, num_experts_per_tok=4
    ),
}


def built(block, given):
    """With the numbers that a model would have given it, and not those of unused memory."""
    made = block(given)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(params=CASES)
def pair(request):
    block, given = CASES[request.param]
    theirs = peer(lambda: built(block, given))
    return MixtureOfExperts(given.hidden_size, **experts_options(given)), theirs, given


def tokens(width: int, batch: int = 3, length: int = 13):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def test_block(pair):
    ours, theirs, given = pair
    assert_same(ours, theirs, experts_weights, tokens(given.hidden_size))


@pytest.mark.parametrize("pair", ["mixtral", "olmoe"], indirect=True)
def test_as_it_comes_with_its_softmax_in_fp32(pair):
    ours, theirs, given = pair
    assert_same(ours, theirs, experts_weights, tokens(given.hidden_size), 1e-5, in_double=False)


def test_balance_loss_is_theirs_over_the_choices_of_a_token(pair):
    ours, theirs, given = pair
    x = tokens(given.hidden_size)
    ours.double().load_state_dict(experts_weights(theirs.state_dict()))
    loss = ours(x).aux["loss_balance"] / ours.balance_loss
    with InDouble():
        logits, _, _ = theirs.gate(x)
        expected = load_balancing_loss_func((logits,), len(logits.mT), ours.top_k)
    assert_close(loss, expected / ours.top_k, "balance loss")
    gradient = torch.autograd.grad(loss, ours.router.weight)[0]
    expected = torch.autograd.grad(expected / ours.top_k, theirs.gate.weight)[0]
    assert_close(gradient, expected, "its gradient")


def test_what_ours_cannot_be_is_refused():
    with pytest.raises(ValueError, match="hidden_act must be 'silu', got 'gelu'"):
        experts_options(MixtralConfig(hidden_act="gelu"))
    with pytest.raises(ValueError, match="router_jitter_noise must be 0"):
        experts_options(MixtralConfig(router_jitter_noise=0.1))
