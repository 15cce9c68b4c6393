"""The best sums of two sorted halves, from the pairs of ranks that can be among them."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mneme.ops.contract import without_autocast

_GROUPS_PER_KEPT = 4  # fewer groups than this, and finding the best ones costs what they save


def largest(
    scores: Float[Tensor, "*tokens n"], k: int
) -> tuple[Float[Tensor, "*tokens k"], Int[Tensor, "*tokens k"]]:
    """The k largest of each row, the best first, and where they stand; as `scores.topk(k)`.

    No more than k groups hold one of the k largest, and those with the k largest maxima are such.
    On a CPU, where selecting costs ten times what a maximum does, only they are searched if there
    are many more groups than k.
    """
    n = scores.shape[-1]
    sizes = (size for size in (8, 4) if n % size == 0 and n >= _GROUPS_PER_KEPT * k * size)
    size = next(sizes, None)
    if size is None or not scores.is_cpu:
        values, place = scores.topk(k)
        return values, place
    grouped = scores.unflatten(-1, (size, n // size))  # a group is a column: maxima are vectors
    group = grouped.amax(-2).topk(k, sorted=False).indices
    members = grouped.gather(-1, group.unsqueeze(-2).expand(*group.shape[:-1], size, k))
    values, place = members.flatten(-2).topk(k)
    member = place.div(k, rounding_mode="floor")
    return values, member * (n // size) + group.gather(-1, place % k)


@lru_cache(maxsize=64)
def candidate_ranks(k: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks (from 0, in each half) of the pairs that no k others are sure to be as good as.

    A pair of ranks (i, j), from 1, is at most as good as the i * j - 1 other pairs of ranks up to
    i and j, so that it is needed only if i * j <= k.
    """
    pairs = [(i, j) for i in range(min(k, n)) for j in range(min(k // (i + 1), n))]
    first, second = zip(*pairs, strict=True)
    return first, second


def _subkeys(scores: Tensor, k: int) -> Tensor:
    """Places in each half of the k best pairs, best first, `[..., 2, k]`."""
    values, places = largest(scores, min(k, scores.shape[-1]))
    ranks = torch.tensor(candidate_ranks(k, scores.shape[-1]), device=scores.device)  # [2, pairs]
    sums = values[..., 0, :].index_select(-1, ranks[0])
    sums += values[..., 1, :].index_select(-1, ranks[1])
    best = sums.topk(k).indices
    return places.gather(-1, torch.stack([half[best] for half in ranks.unbind(0)], -2))


@without_autocast
def product_key_topk(
    scores: Float[Tensor, "*tokens 2 n"], k: int
) -> tuple[Float[Tensor, "*tokens k"], Int[Tensor, "*tokens k"]]:
    """Find the k largest of the n * n sums s1[i] + s2[j], the best first.

    Product keys of "Large Memory Layers with Product Keys" (arXiv 1907.05242): the best sums are
    made of the k best of each half. The selection has no gradient; a sum has that of its two
    scores, so nothing else of `scores` gets any.

    Args:
        scores: s1 and s2 of each token.
        k: Sums to keep, at most n * n; it may exceed n.

    Returns:
        The sums, in the dtype of `scores` (added and compared in fp32 or more), and their rows
        i * n + j. Which of two equal sums is kept, or comes first, is not defined.

    Raises:
        ValueError: If k is not between 1 and n * n.
    """
    n = scores.shape[-1]
    if not 1 <= k <= n * n:
        raise ValueError(f"k is {k}; two halves of {n} sub-keys have 1 to {n * n} sums to keep")
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    subkeys = _subkeys(exact.detach(), k)
    values = exact.gather(-1, subkeys).sum(-2)
    first, second = subkeys.unbind(-2)
    return values.to(scores.dtype), first * n + second
