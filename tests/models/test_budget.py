"""What a budget counts beyond matrix products of parameters: rows that are read, and fixed keys."""

from functools import partial

import pytest
import torch

from mneme.layers import (
    MLP,
    PEER,
    DiscreteKeyValueBottleneck,
    GatedDeltaNet,
    MixtureOfExperts,
    MixtureOfMemories,
    ProductKeyMemory,
    SoftmaxAttention,
    UltraMemV2,
)
from mneme.models import LanguageModel, budget

D = 16


def costs(recipe, seq_len=40, dtype=torch.float32):
    torch.manual_seed(0)
    model = LanguageModel(D, vocab_size=7, n_layers=1, pattern=[[recipe]])
    return budget(model.to(dtype), seq_len)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("recipe", "width"),
    [
        (partial(ProductKeyMemory, heads=2, value_dim=6), 6),
        (partial(PEER, heads=2), 2 * D),  # a row that the token is multiplied with, and one summed
    ],
    ids=["sum_rows", "both"],
)
def test_each_row_of_a_table_costs_a_multiply_add_a_number(recipe, width, dtype):
    few, many = (costs(partial(recipe, top_k=k, sub_keys=8), dtype=dtype) for k in (4, 32))
    assert many.flops_per_token - few.flops_per_token == (32 - 4) * 2 * 2 * width


def test_flops_are_those_counted_by_hand():
    # 2 a multiply-add: two maps of 2 D x D, the head of D x V
    assert costs(partial(MLP, expand=2)).flops_per_token == 2 * (2 * 2 * D * D + D * 7)
    # q, k, v and output of D x D, scores and sums over T = 40 tokens, the head
    attention = costs(partial(SoftmaxAttention, heads=2), seq_len=40)
    assert attention.flops_per_token == 2 * (4 * D * D + 2 * 40 * D + D * 7)
    # 4 experts of which a token reads 2, with 3 maps of D x D each, and the router; the sum of 2
    mixture = costs(partial(MixtureOfExperts, experts=4, top_k=2, expand=1))
    assert mixture.flops_per_token == 2 * (2 * 3 * D * D + 4 * D + 2 * D + D * 7)


def test_slices_of_a_value_cost_what_the_value_does():
    recipe = partial(UltraMemV2, sub_keys=8, pre_dim=4)
    narrow, wide = (costs(partial(recipe, value_dim=d, top_k=9)) for d in (6, 12))
    assert wide.flops_per_token - narrow.flops_per_token == 2 * 6 * (9 + D)  # rows, output map


def test_sums_of_the_copies_of_a_token_are_counted():
    one, two = (
        costs(partial(MixtureOfExperts, experts=4, top_k=k, expand=1)).flops_per_token
        for k in (1, 2)
    )
    assert two - one == 2 * 3 * D * D + 2 * D
    memory = partial(MixtureOfMemories, memory=partial(GatedDeltaNet, heads=1), router="random")
    table = [costs(partial(memory, top_k=k)).flops_per_token for k in (1, 2, 3)]
    assert table[0] < table[1] < table[2]


def test_fixed_keys_are_read_with_every_token_and_are_no_parameters():
    recipe = partial(DiscreteKeyValueBottleneck, codebooks=4, key_dim=3)
    few, many = (costs(partial(recipe, keys=n)) for n in (5, 50))
    assert many.decode_bytes_per_token - few.decode_bytes_per_token == 4 * 45 * 4 * 3
    assert many.active_parameters == few.active_parameters
    assert many.parameters - few.parameters == 45 * 4 * D  # values
    read = many.active_parameters + 4 * 50 * 3 + 4 * 3 * D  # keys, projections
    assert many.decode_bytes_per_token == 4 * read
    assert costs(partial(recipe, keys=50), dtype=torch.bfloat16).decode_bytes_per_token == 2 * read
