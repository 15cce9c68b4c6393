"""One linear layer of a memory: its causal read within a chunk, and its update at the chunk's end.

Both are a few matrix products around factors that count tokens. Left to automatic differentiation,
each factor costs a product and a sum over the largest tensors; here the gradients of all factors
come from row products, over the narrower side of the map, that other gradients need anyway.

Shapes: M memories (or chunks of memories), C tokens that read, R tokens written, weights
`[M, in, out]`, counts `[M, C, 1]`, `[M, R, 1]` and `[M, 1, 1]`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Batched matrix product with operands in `dtype`; its result is at least fp32."""
    if a.dtype == b.dtype == dtype and dtype.itemsize >= 4:
        return torch.bmm(a, b)
    return torch.bmm(a.to(dtype), b.to(dtype)).to(torch.promote_types(dtype, torch.float32))


def _plus(base: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, sign: int = 1) -> Tensor:
    """`base + sign * a b`, in place."""
    if a.dtype == b.dtype == base.dtype == dtype:
        return base.baddbmm_(a, b, alpha=sign)
    return base.add_(product(a, b, dtype), alpha=sign)


def _rows(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows, `[M, C, 1]`, in the precision of `b`."""
    return torch.linalg.vecdot(a.to(b.dtype), b)[..., None]


def _whole(a: Tensor, b: Tensor) -> Tensor:
    """Product of whole matrices, `[M, 1, 1]`."""
    return (a * b).sum((-2, -1), keepdim=True)


def _counted(x: Tensor, count: Tensor | None) -> Tensor:
    return x if count is None else x * count


class _Read(torch.autograd.Function):
    """See `causal_read`."""

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        y: Tensor,
        x: Tensor,
        d: Tensor,
        mix: Tensor,
        w: Tensor,
        of_w: Tensor | None,
        s: Tensor | None,
        of_s: Tensor | None,
    ) -> Tensor:
        scores = product(y, x.mT, dtype)
        from_w = product(y, w, dtype)
        from_s = None if s is None else product(y, s, dtype)
        z = from_w.clone() if of_w is None else from_w * of_w
        if from_s is not None:
            z = z.add_(from_s) if of_s is None else z.addcmul_(from_s, of_s)
        _plus(z, scores * mix, d, dtype, -1)
        narrow = None if _narrow_in(w) else from_w, None if _narrow_in(w) else from_s
        ctx.save_for_backward(y, x, d, mix, w, of_w, s, of_s, scores, *narrow)
        ctx.dtype = dtype
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        y, x, d, mix, w, of_w, s, of_s, scores, from_w, from_s = ctx.saved_tensors
        dtype: torch.dtype = ctx.dtype
        dmixed = product(dz, d.mT, dtype).neg_()
        dmix, dscores = dmixed * scores, dmixed.mul_(mix)
        dx, dd = product(dscores.mT, y, dtype), product((scores * mix).mT, dz, dtype).neg_()
        dy = product(dscores, x, dtype)
        dof_w, dw = _read_back(y, w, of_w, from_w, dz, dy, dtype)
        ds = dof_s = None
        if s is not None:
            dof_s, ds = _read_back(y, s, of_s, from_s, dz, dy, dtype)
        return None, dy, dx, dd, dmix, dw, dof_w, ds, dof_s


def _read_back(
    y: Tensor,
    w: Tensor,
    count: Tensor | None,
    read: Tensor | None,
    dz: Tensor,
    dy: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the count and the weights from that of `count * (y W)`; adds to that of y.

    `read` is `y W`, kept where the output is the narrower side.
    """
    if count is None:
        _plus(dy, dz, w.mT, dtype)
        return None, product(y.mT, dz, dtype)
    if read is not None:
        counted = dz * count
        _plus(dy, counted, w.mT, dtype)
        return _rows(dz, read), product(y.mT, counted, dtype)
    back = product(dz, w.mT, dtype)
    dcount = _rows(y, back)
    dy.addcmul_(back, count)
    return dcount, product((y * count).mT, dz, dtype)


def causal_read(
    y: Tensor,
    x: Tensor,
    d: Tensor,
    mix: Tensor,
    w: Tensor,
    of_w: Tensor | None,
    s: Tensor | None,
    of_s: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """`of_w (y W) + of_s (y S) - (mix * (y x^T)) d`: what each row reads from its own weights.

    Args:
        y: rows that read, `[M, C, in]`.
        x: inputs of the tokens written, `[M, R, in]`.
        d: their deltas, `[M, R, out]`.
        mix: what each token written counts for, `[M, C, R]`.
        w: weights before the first token, `[M, in, out]`.
        of_w: what they count for, `[M, C, 1]`; None for one.
        s: momentum before the first token, if any.
        of_s: what it counts for; None for one.
        dtype: of the operands of matrix products.

    Returns:
        `[M, C, out]`.
    """
    z: Tensor = _Read.apply(dtype, y, x, d, mix, w, of_w, s, of_s)
    return z


class _Update(torch.autograd.Function):
    """See `update`."""

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        x: Tensor,
        d: Tensor,
        count: Tensor,
        w: Tensor,
        of_w: Tensor | None,
        s: Tensor | None,
        of_s: Tensor | None,
    ) -> Tensor:
        new = w.clone() if of_w is None else w * of_w
        if s is not None and of_s is not None:
            new.addcmul_(s, of_s)
        if _narrow_in(w):
            _plus(new, (x * count).mT, d, dtype, -1)
        else:
            _plus(new, x.mT, d * count, dtype, -1)
        ctx.save_for_backward(x, d, count, w, of_w, s, of_s)
        ctx.dtype = dtype
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnew: Tensor) -> tuple[Tensor | None, ...]:
        x, d, count, w, of_w, s, of_s = ctx.saved_tensors
        dtype: torch.dtype = ctx.dtype
        if _narrow_in(w):
            dx = product(d, dnew.mT, dtype).neg_()
            dcount = _rows(x, dx)
            dx.mul_(count)
            dd = product((x * count).neg_(), dnew, dtype)
        else:
            dd = product(x, dnew, dtype).neg_()
            dcount = _rows(d, dd)
            dd.mul_(count)
            dx = product((d * count).neg_(), dnew.mT, dtype)
        dw = _counted(dnew, of_w)
        dof_w = None if of_w is None else _whole(dnew, w)
        ds = None if s is None else dnew * of_s
        dof_s = None if s is None else _whole(dnew, s)
        return None, dx, dd, dcount, dw, dof_w, ds, dof_s


def _narrow_in(w: Tensor) -> bool:
    return w.shape[-2] <= w.shape[-1]


def update(
    x: Tensor,
    d: Tensor,
    count: Tensor,
    w: Tensor,
    of_w: Tensor | None = None,
    s: Tensor | None = None,
    of_s: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """`of_w W + of_s S - (count x)^T d`: weights, or a momentum, after a chunk's tokens.

    Args:
        x: inputs of the tokens, `[M, R, in]`.
        d: their deltas, `[M, R, out]`.
        count: what each token's gradient counts for, `[M, R, 1]`.
        w: weights before, `[M, in, out]`.
        of_w: what they count for, `[M, 1, 1]`; None for one.
        s: momentum before, if it joins.
        of_s: what it counts for.
        dtype: of the operands of matrix products.

    Returns:
        `[M, in, out]`.
    """
    new: Tensor = _Update.apply(dtype, x, d, count, w, of_w, s, of_s)
    return new
