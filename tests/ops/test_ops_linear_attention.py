"""What is peculiar to normalized linear attention: averages, the prefix, and empty weights."""

from itertools import pairwise

import pytest
import torch

from mneme.ops import OPS
from mneme.ops.linear_attention import (
    linear_attention,
    linear_attention_chunk,
    linear_attention_naive,
)
from tests.ops.calls import cut, gradients, make, results
from tests.ops.closeness import assert_close

OP = OPS["linear_attention"]
FORMS = [linear_attention_naive, linear_attention_chunk]


@pytest.mark.parametrize("function", FORMS)
def test_is_the_masked_product_of_all_queries_and_keys(function):
    inputs = make(OP, 70, regime="prefix")
    keys, values = (
        torch.cat(pair, 1)
        for pair in zip(inputs["prefix"], (inputs["k"], inputs["v"]), strict=True)
    )
    scores = torch.einsum("bthf,bshf->bhts", inputs["q"], keys)
    scores = scores.tril(diagonal=keys.shape[1] - 70)
    expected = torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), values)
    y, _ = function(**inputs | {"state": None}, eps=0.0)
    assert_close({"y": y}, {"y": expected}, 1e-12)


@pytest.mark.parametrize("function", FORMS)
def test_a_prefix_is_tokens_that_came_before(function):
    inputs = make(OP, 40, regime="prefix")
    keys, values = inputs.pop("prefix")
    _, state = linear_attention_naive(keys, keys, values, inputs["state"])
    with_prefix = results(function, inputs | {"prefix": (keys, values)})
    assert_close(with_prefix, results(function, inputs | {"state": state}), 1e-12)


@pytest.mark.parametrize("pieces", [(0, 1, 40), (0, 2, 3, 40), (0, 17, 40)])
def test_a_prefix_with_the_first_piece_serves_the_whole_sequence(pieces):
    inputs = make(OP, 40, regime="prefix")
    expected, (last, total) = linear_attention_naive(**inputs)
    out = []
    for start, stop in pairwise(pieces):
        y, state = linear_attention(**cut(inputs, OP, start, stop))
        out.append(y)
        inputs |= {"state": state, "prefix": None}
    assert_close(
        {"y": torch.cat(out, 1), "s": state[0], "z": state[1]},
        {"y": expected, "s": last, "z": total},
        1e-12,
    )


@pytest.mark.parametrize("length", [1, 70])
def test_an_empty_prefix_is_none(length):
    inputs = make(OP, length, regime="prefix")
    inputs["prefix"] = tuple(x[:, :0] for x in inputs["prefix"])
    assert_close(
        results(linear_attention, inputs),
        results(linear_attention, inputs | {"prefix": None}),
        1e-15,
    )


@pytest.mark.parametrize("function", FORMS)
def test_no_state_is_a_state_of_zeros(function):
    inputs = make(OP, 20, regime="prefix")
    zeros = tuple(torch.zeros_like(x) for x in inputs["state"])
    expected = results(function, inputs | {"state": zeros})
    for name, value in results(function, inputs | {"state": None}).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equal_values_average_to_themselves(function, dtype):
    inputs = make(OP, 200, dtype=dtype) | {"state": None}
    inputs["v"] = inputs["v"][:, :1].expand_as(inputs["v"])
    y, _ = function(**inputs)
    assert_close({"y": y}, {"y": inputs["v"]}, 1e-5 if dtype == torch.float64 else 2**-9)


@pytest.mark.parametrize("function", [*FORMS, linear_attention])
@pytest.mark.parametrize("empty", ["q", "k"])
@pytest.mark.parametrize("length", [1, 70])
def test_no_features_give_zeros_and_finite_gradients(function, empty, length):
    inputs = make(OP, length, dtype=torch.float32) | {"state": None}
    inputs[empty] = torch.zeros_like(inputs[empty])
    assert results(function, inputs)["y"].count_nonzero() == 0
    assert all(x.isfinite().all() for x in gradients(function, inputs).values())


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 200])
def test_chunk_size_changes_nothing(chunk_size):
    inputs = make(OP, 130, regime="prefix")
    expected = results(OP.naive, inputs)
    chunked = inputs | {"chunk_size": chunk_size}
    assert_close(results(linear_attention_chunk, chunked), expected, 1e-10)


@pytest.mark.parametrize("length", [1, 70])
def test_chunk_size_must_be_positive(length):
    with pytest.raises(ValueError, match="chunk_size is 0; it must be at least 1"):
        linear_attention(**make(OP, length), chunk_size=0)


def test_entry_point_decodes_with_the_recurrence():
    inputs = make(OP, 1)
    for name, expected in results(linear_attention_naive, inputs).items():
        assert torch.equal(results(linear_attention, inputs)[name], expected)
