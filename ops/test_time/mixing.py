"""From the gates of a chunk to the factors that mix its tokens.

With gradients u_j taken at one reference point, everything a token does to the weights of later
tokens is linear, and one lower triangular matrix per memory holds it: `G[t, j]` is the weight of
token j's gradient in the weights that token t reads. No weight tensor is ever scanned.

Where gradients are taken at the weights before each token instead (a matrix memory), those weights
are linear in the errors of the tokens before it,

    W_{t-1} = b_{t-1} W + f_{t-1} S - sum_{j<t} G[t-1, j] k_j^T e_j,

so the errors `e_t = k_t W_{t-1} - v_t` of a chunk solve `(I + L) E = b K W + f K S - V` with b, f
and G one row back and `L = G * (K K^T)` below its diagonal. Without momentum and with the gates
renamed this is the chunked form of the gated delta rule; the length of a chunk does not change the
function.

Shapes: N chunks, M = B * H memories, C tokens of a chunk, R = c - 1 + C rows of keys (the last
c - 1 tokens before the chunk first, where the objective has a window of c).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mneme.ops.gated_delta.chunk import inverse_of_one_minus
from mneme.ops.test_time.memories import Product
from mneme.ops.test_time.rule import Rule


class TiledGates(NamedTuple):
    """The gates of N chunks, `[N, M, C, .]`."""

    inner_lr: Tensor
    log_keep: Tensor | None
    log_momentum: Tensor | None
    window: Tensor | None
    delta: Tensor | None


class Factors(NamedTuple):
    """How the weights, or the momentum, count.

    Attributes:
        read: for the token that reads, `[N, M, C, 1]`.
        end: for the weights at the chunk's end, `[N, M, 1, 1]`.
    """

    read: Tensor
    end: Tensor


class Mixing(NamedTuple):
    """How gradients, weights and momentum reach the reads and the end of a chunk.

    Attributes:
        reads: G `[N, M, C, R]`; None if tokens read the weights of the chunk's start.
        steps: what each gradient counts for in the sum of steps, the weights or whatever is
            accumulated, at the end, `[N, M, R, 1]` (or one column per linear layer).
        weights: what the weights before count for; None for one, everywhere.
        momentum: the same for the momentum before, or for the sum of steps before if the update is
            averaged; None without.
        impulses: what each gradient counts for in the momentum, `[N, M, R, 1]`.
        decay: what the momentum before counts for in the momentum, `[N, M, 1, 1]`.
        log_fold: log decays per channel since the chunk's start, `[N, M, C, V]`, where they differ.
    """

    reads: Tensor | None
    steps: Tensor
    weights: Factors | None = None
    momentum: Factors | None = None
    impulses: Tensor | None = None
    decay: Tensor | None = None
    log_fold: Tensor | None = None


def mixing(rule: Rule, gates: TiledGates, position: Tensor | None) -> Mixing:
    """The mixing of N chunks, or of a part of one chunk.

    Args:
        rule: the fixed choices.
        gates: in tiles.
        position: factors of the averaged update at these tokens, `[C]`.
    """
    if rule.update == "chunk":
        return Mixing(None, _summed(rule, gates))
    if rule.update == "average":
        assert position is not None
        weight = position[:, None].expand_as(gates.inner_lr)
        reads = None if rule.read_before else (weight * gates.inner_lr.mT).tril()
        return Mixing(reads, gates.inner_lr, momentum=Factors(weight, weight[..., -1:, :]))
    if gates.log_keep is not None and gates.log_keep.shape[-1] > 1:
        return _per_channel(gates)
    return _per_token(rule, gates)


def _per_token(rule: Rule, gates: TiledGates) -> Mixing:
    """Every token steps: W_t = b_t W + f_t S - sum_j G[t, j] u_j, with momentum or without."""
    banded, weights, momentum, impulses, decay = _banded(rule, gates), None, None, None, None
    if gates.log_momentum is not None:
        log = gates.log_momentum.cumsum(-2)
        banded = _between(log) @ banded if rule.window > 1 else _between(log) * banded
        impulses, passed = banded[..., -1:, :].mT, log.exp()
        decay = passed[..., -1:, :]
    elif rule.window == 1:
        banded = torch.diag_embed(banded.squeeze(-2))
    log_keep = gates.log_keep
    between = (
        torch.ones_like(banded[..., : gates.inner_lr.shape[-2]]).tril()
        if log_keep is None
        else _between(log_keep.cumsum(-2))
    )
    reads = between @ banded
    if log_keep is not None:
        kept = log_keep.cumsum(-2).exp()
        weights = Factors(kept, kept[..., -1:, :])
    if impulses is not None:
        joined = between @ passed
        momentum = Factors(joined, joined[..., -1:, :])
    return Mixing(reads, reads[..., -1:, :].mT, weights, momentum, impulses, decay)


def _per_channel(gates: TiledGates) -> Mixing:
    """Decays per channel fold into what meets that channel; between tokens nothing else decays."""
    assert gates.log_keep is not None
    tokens = gates.inner_lr.shape[-2]
    reads = gates.inner_lr.mT.expand(*gates.inner_lr.shape[:2], tokens, tokens).tril()
    return Mixing(reads, gates.inner_lr, log_fold=gates.log_keep.cumsum(-2))


def _summed(rule: Rule, gates: TiledGates) -> Tensor:
    """What each gradient counts for in the chunk's one step."""
    return gates.inner_lr if rule.window == 1 else _banded(rule, gates).sum(-2).unsqueeze(-1)


def _between(log: Tensor) -> Tensor:
    """`exp(log_i - log_j)` for i >= j, else 0, from cumulative sums `[N, M, C, 1]`.

    Differences come first and are masked before the exponential: a ratio of exponentials would be
    0 / 0 where a gate is nearly closed, and a masked infinity has no gradient.
    """
    return (log - log.mT).tril().exp().tril()


def _banded(rule: Rule, gates: TiledGates) -> Tensor:
    """Steps of each token on each row of keys: `[N, M, 1, C]`, or `[N, M, C, R]` with a window.

    With a window, row i holds theta_i gamma_{i, lag} at column c - 1 + i - lag.
    """
    if rule.window == 1:
        return gates.inner_lr.mT
    assert gates.window is not None
    rows = (gates.inner_lr * gates.window).flip(-1)  # oldest first
    n, m, tokens, width = rows.shape
    columns = tokens + width - 1
    skewed = torch.nn.functional.pad(rows, (0, columns + 1 - width)).flatten(-2)
    return skewed[..., : tokens * columns].view(n, m, tokens, columns)


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


def _counted_back(k: Tensor, source: Factors | None, first: float) -> Tensor:
    return k if source is None else k * _back(source.read, first)
