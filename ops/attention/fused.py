"""Causal softmax attention on PyTorch's fused kernels, in blocks of queries where masks are needed.

Shapes: B batch, T queries, S keys, H query heads, Hkv key heads, D key width, Dv value width.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mneme.ops.contract import accepts_nothing, carries

# Queries a block. A block of b reads b + window keys of which a query sees `window`, so larger
# blocks than the window waste work, and very small ones are all overhead.
_LEAST_BLOCK, _LARGEST_BLOCK = 64, 512


def _mask(queries: int, keys: int, prefix: int, window: int, device: torch.device) -> Tensor:
    """Which of prefix + keys each of the last queries sees, [queries, prefix + keys]."""
    age = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(
        keys, device=device
    )
    seen = (age >= 0) & (age < window)
    return torch.nn.functional.pad(seen, (prefix, 0), value=True)


def _check(q: Tensor, k: Tensor, window: int | None, prefix: int) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"key heads ({k.shape[2]}) must divide query heads ({q.shape[2]})")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; a query must see at least itself, window >= 1")
    if prefix < 0 or prefix + q.shape[1] > k.shape[1]:
        raise ValueError(
            f"{k.shape[1]} keys cannot hold a prefix of {prefix} and {q.shape[1]} queries' own keys"
        )


@accepts_nothing("q", "k", "v")
@carries("q", "k", "v")
def attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S Hkv D"],
    v: Float[Tensor, "B S Hkv Dv"],
    *,
    window: int | None = None,
    prefix: int = 0,
    scale: float | None = None,
) -> Float[Tensor, "B T H Dv"]:
    """Average the values a query may see, weighted by softmax(scale * q k^T).

    The keys are `prefix` persistent ones, which every query sees, then the sequence, whose last T
    positions are those of the queries. A query sees itself and what came before it, back to
    `window` positions in all. Query head h reads key head h // (H / Hkv).

    With a window the cost is O(T * window), and no mask larger than a block of queries by what it
    sees is ever made.

    Args:
        q: Queries of the last T positions.
        k: Keys of the prefix, the past and the last T positions, in this order.
        v: Values, as the keys.
        window: Positions a query sees, itself included; all earlier ones when None.
        prefix: Number of persistent keys.
        scale: Factor on the scores; D ** -0.5 when None.

    Returns:
        The averages, in the dtype of `v`.

    Raises:
        ValueError: If heads do not divide, `window` < 1, or there are too few keys.
    """
    _check(q, k, window, prefix)
    tokens, length = q.shape[1], k.shape[1] - prefix
    past, window = length - tokens, length if window is None else min(window, length)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if past == prefix == 0 and window == length:
        y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return y.transpose(1, 2)
    block = min(max(window, _LEAST_BLOCK), _LARGEST_BLOCK)
    out = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        oldest, newest = max(0, past + start - window + 1), past + stop
        seen_k, seen_v = (
            torch.cat((x[:, :, :prefix], x[:, :, prefix + oldest : prefix + newest]), 2)
            for x in (k, v)
        )
        mask = None  # a single query sees all that was cut out for it
        if stop - start > 1:
            mask = _mask(stop - start, newest - oldest, prefix, window, q.device)
        queries = q[:, :, start:stop]
        out.append(
            scaled_dot_product_attention(
                queries, seen_k, seen_v, attn_mask=mask, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(out, 2).transpose(1, 2)
