"""Keeping what is not a number from the past of its own sequence.

Fast forms multiply masks and weights of zero with tokens that are still to come, and zero times
NaN is NaN. Within `contained()`, every op that carries a sequence sees zeros in the place of a
token that is not finite, and what it returns for that sequence is NaN from this token on, the state
included, also where a window would let it go again. Looking at all inputs takes time, so that this
is for finding where a run went wrong, not for training.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")

_within: list[bool] = []


@contextmanager
def contained() -> Iterator[None]:
    """Within it, what is not finite in a token reaches no earlier token of its sequence."""
    _within.append(True)
    try:
        yield
    finally:
        _within.pop()


def carries(*timed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates an op over sequences, so that `contained()` holds for it.

    Args:
        *timed: arguments, or pytrees of them, with a row of axis 1 for each token; where one has
            more rows than the first, the last ones are the tokens'. Minus infinity counts as
            finite in `g`, the logarithm of a decay.
    """

    def decorate(op: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(op)

        @functools.wraps(op)
        def containing(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _within:
                return op(*args, **kwargs)
            call = signature.bind(*args, **kwargs)
            first = call.arguments[timed[0]]
            bad = first.new_zeros(first.shape[:2], dtype=torch.bool)
            for name in timed:
                clean = functools.partial(_cleaned, name=name, bad=bad)
                value = call.arguments.get(name)
                call.arguments[name] = pytree.tree_map_only(Tensor, clean, value)
            since = bad.cummax(1).values if bad.shape[1] else bad
            return _marked(op(*call.args, **call.kwargs), since)

        return containing

    return decorate


def _cleaned(x: Tensor, *, name: str, bad: Tensor) -> Tensor:
    """`x` with zeros in rows that are not finite, which are entered in `bad` [B, T]."""
    wrong = ~(x.isfinite() | (x == -torch.inf)) if name == "g" else ~x.isfinite()
    rows = wrong.flatten(2).any(-1) if x.ndim > 2 else wrong
    tokens = bad.shape[1]
    past = rows.shape[1] - tokens
    if tokens:
        bad |= rows[:, past:]
        bad[:, :1] |= rows[:, :past].any(1, keepdim=True)
    return x.masked_fill(rows.view(*rows.shape, *[1] * (x.ndim - 2)), 0)


def _marked(result: Any, since: Tensor) -> Any:
    """An op's outputs [B, T, ...], and its state if it has one, NaN for all that follows."""
    if isinstance(result, Tensor):
        return _nan_where(since, result)
    y, state = result
    ended = since.any(1)
    return _nan_where(since, y), pytree.tree_map_only(
        Tensor, lambda x: _nan_where(ended, x) if x.is_floating_point() else x, state
    )


def _nan_where(where: Tensor, x: Tensor) -> Tensor:
    return x.masked_fill(where.view(*where.shape, *[1] * (x.ndim - where.ndim)), torch.nan)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """PyTorch's `scaled_dot_product_attention` with grouped heads, to which `contained()` applies.

    Args:
        q: `[..., H, T, K]`.
        k: `[..., G, S, K]`, with G a divisor of H.
        v: as `k`.
        visible: which keys each query sees, broadcast to `[..., H, T, S]`; None for all.
    """
    if not _within or visible is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    k, v = (x.masked_fill(bad[..., None], 0) for x in (k, v))
    y = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    bad = bad.repeat_interleave(q.shape[-3] // k.shape[-3], -2)
    return y.masked_fill((bad[..., None, :] & visible).any(-1, keepdim=True), torch.nan)
