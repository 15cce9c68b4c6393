"""Scores of surprise, and the running choice of the largest."""

import pytest
import torch
from torch.nn import functional as F

from mneme.ops.innovation import best_so_far, innovation
from tests.helpers import assert_close


def tokens(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def innovation_by_hand(k, v, memory):
    scores = []
    for key, value in zip(F.normalize(k, dim=-1).unbind(1), v.unbind(1), strict=True):
        error = value - torch.einsum("bgkv,bgk->bgv", memory, key)
        memory = memory + 0.5 * torch.einsum("bgk,bgv->bgkv", key, error)
        scores.append(error.flatten(1).norm(dim=-1))
    return torch.stack(scores, 1), memory


@pytest.mark.parametrize("length", [1, 2, 70])
def test_a_score_is_the_error_of_the_prediction_before_the_write(length):
    k, v, memory = tokens(1, 2, length, 3, 4), tokens(2, 2, length, 3, 5), tokens(3, 2, 3, 4, 5)
    scores, after = innovation_by_hand(k, v, memory)
    actual, state = innovation(k, v, memory)
    assert_close(actual, scores, "scores")
    assert_close(state, after, "memory")


def test_what_is_repeated_is_no_surprise_until_it_changes():
    k, v = tokens(1, 1, 1, 1, 4).expand(1, 12, 1, 4), tokens(2, 1, 1, 1, 4).repeat(1, 12, 1, 1)
    v[:, 8] = -v[:, 8]
    score, _ = innovation(k, v, torch.zeros(1, 1, 4, 4).double())
    once = v[0, 0].norm()
    assert_close(score[0, :8], once * 0.5 ** torch.arange(8).double(), "halved by each write")
    assert score[0, 8] > 1.9 * once


def test_scores_pass_no_gradient():
    k, v = tokens(1, 1, 5, 1, 4).requires_grad_(), tokens(2, 1, 5, 1, 4).requires_grad_()
    score, memory = innovation(k, v, torch.zeros(1, 1, 4, 4).double())
    assert not score.requires_grad
    assert not memory.requires_grad


def best_by_hand(first, blocks, row):
    """Places of the best after each block, the older before the younger where scores are equal."""
    flat, limit, width = blocks[row].flatten(), first.shape[1], blocks.shape[2]
    scores = torch.cat([first[row], flat]).tolist()
    chosen = []
    for seen in range(blocks.shape[1] + 1):
        order = sorted(range(limit + seen * width), key=lambda i: (-scores[i], i))
        chosen.append([i for i in order if scores[i] > -float("inf")][:limit])
    return chosen


@pytest.mark.parametrize(
    ("limit", "count", "width"), [(1, 6, 3), (3, 0, 3), (5, 6, 3), (3, 1, 5), (200, 3, 150)]
)
def test_the_best_so_far_are_those_of_a_sort_also_where_scores_are_equal(limit, count, width):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(4, (2, count, width), generator=generator).double()
    first = torch.tensor([2.5, 1.0] + [-torch.inf] * limit).double()[:limit].repeat(2, 1)
    place, score = best_so_far(first, blocks)
    assert place.shape == score.shape == (2, count + 1, limit)
    for row in range(2):
        actual = [
            [p for p, s in zip(places, scores, strict=True) if s > -torch.inf]
            for places, scores in zip(place[row].tolist(), score[row].tolist(), strict=True)
        ]
        assert actual == best_by_hand(first, blocks, row)


def test_going_on_from_a_set_gives_the_same():
    blocks = torch.randint(4, (2, 7, 3), generator=torch.Generator().manual_seed(0)).double()
    _, whole = best_so_far(torch.full((2, 4), -torch.inf).double(), blocks)
    _, first = best_so_far(torch.full((2, 4), -torch.inf).double(), blocks[:, :3])
    _, rest = best_so_far(first[:, -1], blocks[:, 3:])
    assert torch.equal(torch.cat([first, rest[:, 1:]], 1), whole)
