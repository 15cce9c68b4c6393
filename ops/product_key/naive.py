"""The best sums of two halves by looking at all of them: the specification.

Shapes: n sub-keys of a half, k sums kept.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def product_key_topk_naive(
    scores: Float[Tensor, "*tokens 2 n"], k: int
) -> tuple[Float[Tensor, "*tokens k"], Int[Tensor, "*tokens k"]]:
    """Find the k largest of the n * n sums s1[i] + s2[j], the best first.

    Args:
        scores: s1 and s2 of each token.
        k: Sums to keep, at most n * n.

    Returns:
        The sums, in the dtype of `scores` (added and compared in fp32 or more), and their rows
        i * n + j. Which of two equal sums is kept, or comes first, is not defined.
    """
    s1, s2 = scores.to(torch.promote_types(scores.dtype, torch.float32)).unbind(-2)
    sums = s1[..., :, None] + s2[..., None, :]
    values, rows = sums.flatten(-2).topk(k)
    return values.to(scores.dtype), rows
