"""What is peculiar to product keys: every size, ties, and a selection without gradient."""

import pytest
import torch

from mneme.ops.product_key import (
    candidate_ranks,
    largest,
    product_key_topk,
    product_key_topk_naive,
)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("n", "k"), [(n, k) for n in (4, 16, 64) for k in (1, 3, n, 2 * n)])
def test_sums_are_those_of_brute_force(n, k, heads):
    scores = normal(5, heads, 2, n)
    (values, rows), (best, _) = product_key_topk(scores, k), product_key_topk_naive(scores, k)
    assert torch.equal(values, best)
    s1, s2 = scores.unbind(-2)
    assert torch.equal(s1.gather(-1, rows // n) + s2.gather(-1, rows % n), values)


def test_all_pairs_may_be_kept():
    values, rows = product_key_topk(normal(3, 2, 5), 25)
    assert torch.equal(rows.sort(-1).values, torch.arange(25).expand(3, 25))
    assert (values.diff() <= 0).all()


def test_scores_need_no_token_axis():
    _, rows = product_key_topk(torch.tensor([[0.0, 3.0], [2.0, 0.0]]), 2)
    assert rows.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("k", "pairs"), [(8, 20), (16, 50), (32, 119), (64, 280), (80, 368), (128, 645), (256, 1466)]
)
def test_candidates_are_few(k, pairs):
    first, second = candidate_ranks(k, 1024)
    assert len(first) == len(second) == pairs


def test_ties_give_different_rows_of_the_best_value():
    values, rows = product_key_topk(torch.zeros(1, 2, 6), 10)
    assert (values == 0).all()
    assert rows.unique().numel() == 10


def test_sums_are_compared_in_fp32():
    scores = torch.tensor([[256.0, 255.0], [1.0, 0.0]]).bfloat16()  # 257 is no bf16 number
    values, rows = product_key_topk(scores, 4)
    assert values.dtype == torch.bfloat16
    assert rows[0] == 0
    assert rows[3] == 3


def test_only_what_was_selected_has_a_gradient():
    scores = normal(4, 2, 16).requires_grad_()
    values, rows = product_key_topk(scores, 6)
    values.sum().backward()
    hits = torch.zeros(4, 2, 16)
    hits[:, 0].scatter_add_(1, rows // 16, torch.ones(4, 6))
    hits[:, 1].scatter_add_(1, rows % 16, torch.ones(4, 6))
    assert torch.equal(scores.grad, hits)


@pytest.mark.parametrize(("n", "k"), [(64, 4), (64, 2), (100, 3), (64, 5), (7, 7)])
def test_largest_is_topk(n, k):
    scores = normal(50, n).round(decimals=1)  # with ties
    values, index = largest(scores, k)
    assert torch.equal(values, scores.topk(k).values)
    assert torch.equal(scores.gather(-1, index), values)
    assert all(row.unique().numel() == k for row in index)


def test_no_tokens_and_no_numbers_are_fine():
    values, rows = product_key_topk(torch.zeros(2, 0, 3, 2, 64), 4)
    assert values.shape == rows.shape == (2, 0, 3, 4)
    values, rows = product_key_topk(torch.zeros(5, 2, 64, device="meta"), 4)
    assert values.is_meta
    assert rows.shape == (5, 4)


@pytest.mark.parametrize("k", [0, 17])
def test_too_many_or_no_sums_are_an_error(k):
    with pytest.raises(ValueError, match=f"k is {k}; two halves of 4 sub-keys have 1 to 16"):
        product_key_topk(torch.zeros(3, 2, 4), k)
