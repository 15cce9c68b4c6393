"""What is peculiar to Tucker scores: how good the approximate selection is, and its sign."""

import pytest
import torch

from mneme.ops.product_key import product_key_topk
from mneme.ops.tucker import Leading, leading_vectors, tail_penalty, tucker_topk


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def recall(rows, columns, cores, k, leading=None):
    """Share of the k best pairs of all that are found."""
    _, found = tucker_topk(rows, columns, cores, k, leading=leading)
    best = (rows @ cores.sum(0) @ columns.mT).flatten(-2).topk(k).indices
    return (found[..., :, None] == best[..., None, :]).any(-1).double().mean().item()


def near_rank_one_core():
    u, v = normal(2, seed=3).abs(), normal(2, seed=4).abs()
    return (torch.outer(u, v) + 0.02 * normal(2, 2, seed=5))[None]


def test_rank_one_with_positive_scores_finds_all():
    rows, columns = normal(20, 40, 1).abs(), normal(20, 40, 1, seed=1).abs()
    assert recall(rows, columns, torch.ones(1, 1, 1).double(), 16) == 1


def test_gaussian_scores_lose_the_products_of_negative_ones():
    rows, columns = normal(50, 64, 2), normal(50, 64, 2, seed=1)
    assert recall(rows, columns, near_rank_one_core(), 32) == pytest.approx(0.5, abs=0.08)


def test_positive_scores_are_found_with_the_sign_that_is_chosen():
    rows, columns = 2 + 0.5 * normal(50, 64, 2), 2 + 0.5 * normal(50, 64, 2, seed=1)
    cores = near_rank_one_core()
    left, right = leading_vectors(cores.sum(0))
    assert recall(rows, columns, cores, 32, Leading(left, right)) > 0.98
    assert recall(rows, columns, cores, 32, Leading(-left, -right)) == 0


def test_all_pairs_are_compared_when_every_key_survives():
    rows, columns = normal(20, 8, 3), normal(20, 8, 3, seed=1)
    assert recall(rows, columns, normal(2, 3, 3, seed=2), 8) == 1
    assert recall(rows, columns, normal(2, 3, 3, seed=2), 40) == 1


def test_one_core_can_add_the_halves_of_product_keys():
    s1, s2 = normal(20, 8), normal(20, 8, seed=1)
    one = torch.ones_like(s1)
    rows, columns = torch.stack((s1, one), -1), torch.stack((one, s2), -1)
    scores, index = tucker_topk(rows, columns, torch.eye(2).double()[None], 8)
    expected, expected_index = product_key_topk(torch.stack((s1, s2), 1), 8)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(scores[:, 0], expected, rtol=0, atol=1e-14)


def test_scores_are_those_of_each_core_and_sorted_by_their_sum():
    rows, columns, cores = normal(7, 9, 2), normal(7, 9, 2, seed=1), normal(3, 2, 2, seed=2)
    scores, index = tucker_topk(rows, columns, cores, 6)
    grids = torch.einsum("tir,crs,tjs->tcij", rows, cores, columns).flatten(-2)
    expected = grids.gather(-1, index[:, None].expand(7, 3, 6))
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    assert (scores.sum(1).diff() <= 1e-12).all()


def test_only_what_was_selected_has_a_gradient():
    rows, columns = (normal(4, 12, 2, seed=i).requires_grad_() for i in (0, 1))
    scores, index = tucker_topk(rows, columns, normal(2, 2, 2, seed=2).abs(), 3)
    scores.sum().backward()
    for grad, chosen in ((rows.grad, index // 12), (columns.grad, index % 12)):
        touched = torch.zeros(4, 12, dtype=torch.bool).scatter_(1, chosen, True)
        assert torch.equal((grad != 0).any(-1), touched)


@pytest.mark.parametrize("seed", range(8))
def test_the_sign_follows_the_previous_pair(seed):
    core = normal(3, 3, seed=seed)
    pair = leading_vectors(core)
    assert sum(x.sum() for x in pair) >= 0
    other = Leading(-pair.left, -pair.right)
    for previous in (pair, other):
        noise = 0.1 * normal(2, 3, seed=9)
        near = Leading(previous.left + noise[0], previous.right + noise[1])
        for got, wanted in zip(leading_vectors(core, near), previous, strict=True):
            torch.testing.assert_close(got, wanted)
    for got, wanted in zip(
        leading_vectors(core, Leading(torch.zeros(3), torch.zeros(3))), pair, strict=True
    ):
        assert torch.equal(got, wanted)


def test_a_positive_core_has_positive_leading_vectors():
    assert all((x > 0).all() for x in leading_vectors(normal(4, 4).abs()))


def test_leading_vectors_of_half_a_precision_are_fp32():
    assert all(x.dtype == torch.float32 for x in leading_vectors(torch.eye(2).bfloat16()))


def test_tail_penalty_is_that_of_the_smaller_singular_values():
    turn, _ = torch.linalg.qr(normal(4, 4))
    core = (
        turn @ torch.diag(torch.tensor([3.0, 0.55, 0.25, 0.1]).double()) @ turn.T
    ).requires_grad_()
    penalty = tail_penalty(core, 0.15)
    assert penalty.item() == pytest.approx((0.4**2 + 0.1**2) / 3)
    penalty.backward()
    assert torch.linalg.svdvals(core.grad).tolist() == pytest.approx([0.8 / 3, 0.2 / 3, 0, 0])
    assert tail_penalty(torch.ones(1, 1), 0.15) == 0


def test_no_tokens_and_no_numbers_are_fine():
    keys, cores = torch.zeros(2, 0, 3, 9, 2), torch.ones(2, 2, 2)
    scores, index = tucker_topk(keys, keys, cores, 4)
    assert scores.shape == (2, 0, 3, 2, 4)
    assert index.shape == (2, 0, 3, 4)
    scores, index = tucker_topk(torch.zeros(9, 2), torch.zeros(9, 2), cores, 4)
    assert scores.shape == (2, 4)
    meta = torch.zeros(5, 9, 2, device="meta")
    scores, index = tucker_topk(meta, meta, cores.to("meta"), 4)
    assert scores.shape == (5, 2, 4)
    assert index.is_meta


def test_more_pairs_than_survive_are_an_error():
    keys = torch.zeros(3, 9, 2)
    with pytest.raises(ValueError, match="k is 10; 3 rows and columns have 1 to 9 pairs"):
        tucker_topk(keys, keys, torch.ones(1, 2, 2), 10, side_k=3)
