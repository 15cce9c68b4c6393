"""Errors of a matrix memory at the weights before each token, by one triangular solve a chunk.

The weights before token t are linear in the errors of the tokens before it,

    W_{t-1} = b_{t-1} W + f_{t-1} S - sum_{j<t} G[t-1, j] k_j^T e_j,

so the errors `e_t = k_t W_{t-1} - v_t` of a chunk solve `(I + L) E = b K W + f K S - V` with b, f
and G one row back and `L = G * (K K^T)` below its diagonal. Without momentum and with the gates
renamed this is the chunked form of the gated delta rule; the length of a chunk does not change the
function.

Shapes: N chunks, M memories, C tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mneme.ops.test_time.memories import Product
from mneme.ops.test_time.mixing import Mixing, Source
from mneme.ops.triangular import inverse_of_one_minus


class _InverseOfOnePlus(torch.autograd.Function):
    """`(I + L)^-1` for the part of `[., C, C]` matrices below the diagonal."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        tokens = lower.shape[-1]
        side = max(4, 1 << (tokens - 1).bit_length())  # padding adds rows of the identity
        padded = F.pad(lower.neg(), (0, side - tokens, 0, side - tokens))
        inverse = inverse_of_one_minus(padded)[..., :tokens, :tokens].contiguous()
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ d @ inverse.mT).neg_().tril_(-1)


def _back(x: Tensor, first: float) -> Tensor:
    """Rows `[., C, .]` moved one down, with a constant in the first."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


def corrections(mix: Mixing, k: Tensor) -> Tensor:
    """`(I + L)^-1` of N chunks, `[N, M, C, C]`, from their keys `[N, M, C, K]`."""
    assert mix.reads is not None
    lower = (_back(mix.reads, 0.0) * (k @ k.mT).to(mix.reads.dtype)).flatten(0, 1)
    inverse: Tensor = _InverseOfOnePlus.apply(lower)
    return inverse.view_as(mix.reads)


def errors_in_turn(
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    momentum: tuple[Tensor, ...],
    mix: Mixing,
    solve: Tensor,
    mm: Product,
) -> Tensor:
    """Errors of one chunk's tokens `[M, C, V]`, each at the weights that the one before left."""
    target = mm(_counted_back(k, mix.weights, 1.0), weights) - v
    for s in momentum:
        target = target + mm(_counted_back(k, mix.momentum, 0.0), s)
    return mm(solve, target)


def _counted_back(k: Tensor, source: Source | None, first: float) -> Tensor:
    return k if source is None else k * _back(source.read, first)
