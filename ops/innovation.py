"""Which tokens of a stream to keep word for word: those that a simple memory predicted worst.

Shapes: B batch, T time, G heads, K key width, V value width, N blocks of W tokens, E tokens kept.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mneme.ops.contract import without_autocast
from mneme.ops.delta import delta

_STRENGTH = 0.5  # of a write; neither 0, which learns nothing, nor 1, see `innovation`


@without_autocast
def innovation(
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    memory: Float[Tensor, "B G K V"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B G K V"]]:
    """How far the value of each token is from what the tokens before predict for its key.

    The predictor is the delta rule with unit keys and writes of strength b = 1/2, the normalized
    least-mean-squares filter,

        e_t = v_t - S_{t-1}^T k_t,    S_t = S_{t-1} + b k_t e_t^T,

    and a token's score is the norm of e_t over all heads. After the write the key gives
    `S_t^T k_t = v_t - (1 - b) e_t`, so an ordinary read with the key as the query tells e_t.

    Scores choose tokens and have no gradient, and neither has the memory.

    Args:
        k: keys, of any norm.
        v: values.
        memory: S before the first token, fp32 (fp64 for fp64 keys).

    Returns:
        The scores and the memory after the last token, in the dtype of `memory`.
    """
    k, v = (x.detach().to(memory.dtype) for x in (k, v))
    k = F.normalize(k, dim=-1)
    read, memory = delta(k, k, v, torch.full_like(k[..., 0], _STRENGTH), memory, scale=1.0)
    return (v - read).square().sum((-1, -2)).sqrt() / (1 - _STRENGTH), memory


def best_so_far(
    first: Float[Tensor, "B E"], blocks: Float[Tensor, "B N W"]
) -> tuple[Int[Tensor, "B N+1 E"], Float[Tensor, "B N+1 E"]]:
    """The E best of a first set and of the blocks up to each: a running top E, in log2(N) sorts.

    The order is by score and, where scores are equal, by age, the older first. That is a total
    order, so what is kept does not depend on how the merges are grouped: sets are merged in pairs
    at distances 1, 2, 4, ..., and going on later from one of the sets gives the same.

    Args:
        first: scores of the set to begin with, in order; -inf for an empty place.
        blocks: scores of what comes block by block.

    Returns:
        Places in `[first, blocks]`, E + N W in all, and scores: of the first set, then after each
        block. The place of a score of -inf means nothing.
    """
    kept, (count, width) = first.shape[1], blocks.shape[1:]
    places = torch.arange(kept + count * width, device=first.device)
    places = places.expand(len(first), -1)
    own, order = _sorted(F.pad(blocks, (0, max(0, kept - width)), value=-torch.inf), kept)
    inside = places[:, kept:].unflatten(1, (count, width)).gather(-1, order.clamp(max=width - 1))
    score = torch.cat([first[:, None], own], 1)
    place = torch.cat([places[:, None, :kept], inside], 1)
    reach = 1
    while reach <= count:
        best, order = _sorted(torch.cat([score[:, :-reach], score[:, reach:]], -1), kept)
        merged = torch.cat([place[:, :-reach], place[:, reach:]], -1).gather(-1, order)
        score = torch.cat([score[:, :reach], best], 1)
        place = torch.cat([place[:, :reach], merged], 1)
        reach *= 2
    return place, score


def _sorted(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best of the last axis and where they are; of equal ones, the first."""
    score, order = score.sort(dim=-1, descending=True, stable=True)
    return score[..., :count], order[..., :count]
