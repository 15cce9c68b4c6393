"""Test-time memories, one token at a time: the specification of every other form.

The inner gradient is taken by automatic differentiation of the memory as a function, so nothing of
the analytic gradients, the mixing matrices or the chunks' closed form is used here.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mneme.ops.contract import accepts_nothing, without_autocast
from mneme.ops.test_time.memories import Head, Slots
from mneme.ops.test_time.rule import FastWeights, Gates, Rule, Slow, newton_schulz

Weights = tuple[Tensor, ...]


@accepts_nothing("q", "k", "v", "gates")
@without_autocast
def memorize_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    state: FastWeights,
    *,
    rule: Rule,
    slow: Slow | None = None,
) -> tuple[Tensor, FastWeights]:
    """Read a memory that learns, token by token, to map keys to values.

    With `u(A; i)` the gradient of the objective of token i with respect to the fast weights, at A,
    the reference: the weights at the chunk's start, or (`rule.gradient_reference == "token"`)
        before the token.

    `rule.update == "token"` (Titans, arXiv 2501.00663; window of c: Atlas, arXiv 2505.23735):

        S_t = eta_t S_{t-1} - theta_t sum_{i = t-c+1}^{t} gamma_{t,i} u(A; i)
        W_t = (1 - alpha_t) W_{t-1} + S_t,       y_t = f(W_t; q_t)

    without momentum, S_t is the last term alone. "average" (TTT, arXiv 2407.04620), at the chunk's
    token i, with factors w_i close to 1 / i:

        W_t = A + w_i S_t,    S_t = S_{t-1} - theta_t u(A; t),    S = 0 where a chunk starts

    "chunk" (LaCT, arXiv 2505.23884), means over the chunk, products of its 1 - alpha:

        S = mean(eta) S - sum_t theta_t u(A; t),    W = prod(1 - alpha_t) W + rho NS(S)

    where NS is Newton-Schulz or nothing, and rho is mean(theta) or 1. Reads before the write are
    `f(A; q_t)`. A boundary map is applied wherever a chunk ends; if it is a mirror, W above is the
    accumulator and the memory is evaluated at its view.

    Args:
        q: queries, `[B, T, H, K]`. Nothing is normalized here.
        k: keys, the same.
        v: values, `[B, T, H, V]`.
        gates: of each token.
        state: before the first token; `rule.start(weights)` makes one from initial weights.
        rule: the fixed choices.
        slow: slow weights that the rule uses.

    Returns:
        The reads `[B, T, H, V]` in the dtype of `v`, and the state after the last token. Arithmetic
        is in the dtype of the state.
    """
    slow = Slow() if slow is None else slow
    loop = _Loop(rule, slow, state)
    dtype = loop.weights[0].dtype
    reads = []
    for t in range(k.shape[1]):
        q_t, k_t, v_t = (x[:, t : t + 1].transpose(1, 2).to(dtype) for x in (q, k, v))
        now: Gates = tree_map_only(Tensor, partial(_token, t, dtype), gates)
        reads.append(loop.step(q_t, k_t, v_t, now))
    y = torch.cat(reads, 2).transpose(1, 2).to(v.dtype)
    return y, loop.state()


def _token(t: int, dtype: torch.dtype, gate: Tensor) -> Tensor:
    return gate[:, t].to(dtype)


class _Loop:
    """The recurrence, with its state as attributes; tokens are `[B, H, 1, .]`."""

    def __init__(self, rule: Rule, slow: Slow, state: FastWeights) -> None:
        self.rule, self.slow = rule, slow
        self.head = None
        if slow.gain is not None and slow.bias is not None:
            self.head = Head(slow.gain[:, None], slow.bias[:, None])
        self.weights, self.momentum, self.pending = state.weights, state.momentum, state.pending
        self.start = state.reference or state.weights  # the weights at the chunk's start
        self.sums, self.place = state.sums, state.offset.shape[1]
        tokens = (x.transpose(1, 2).unbind(2) for x in state.recent)
        self.recent = [(k[:, :, None], v[:, :, None]) for k, v in zip(*tokens, strict=True)]
        self.like = state

    def step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Tensor:
        """Writes one token and reads."""
        self.recent = [*self.recent, (k, v)][-self.rule.window :]
        update = {"token": self._token, "average": self._average, "chunk": self._sum}
        read = update[self.rule.update](self._gradient(gates), gates)
        y = self._apply(self._view() if self.rule.read_before else read, q)
        self.place += 1
        if self.place == self.rule.chunk:
            self._end_chunk()
        return y

    def state(self) -> FastWeights:
        """The state as the other forms carry it."""
        keep = self.rule.window - 1
        recent = self.recent[-keep:] if keep else []
        tokens = [torch.cat(x, 2).transpose(1, 2) for x in zip(*recent, strict=True)]
        return FastWeights(
            weights=self.weights,
            reference=self.start if self.like.reference else (),
            momentum=self.momentum,
            pending=self.pending,
            sums=self.sums,
            recent=tuple(tokens),
            offset=self.weights[0].new_empty(len(self.weights[0]), self.place, 0),
        )

    def _view(self) -> Weights:
        return tuple(self.rule.boundary.view(w) for w in self.start)

    def _apply(self, weights: Weights, x: Tensor) -> Tensor:
        return self.rule.memory.apply(lambda layer, x: x @ weights[layer], x, self.head)

    def _gradient(self, gates: Gates) -> Weights:
        """theta_t sum_i gamma_{t,i} u(A; i)."""
        reference = self.weights if self.rule.gradient_reference == "token" else self._view()
        total: Weights = tuple(torch.zeros_like(w) for w in reference)
        for lag, (k, v) in enumerate(reversed(self.recent)):
            share = None if gates.window is None else gates.window[..., lag, None, None]
            inner = self._inner_gradient(reference, k, v, gates)
            total = tuple(
                a + (u if share is None else share * u) for a, u in zip(total, inner, strict=True)
            )
        steps = gates.inner_lr[..., None, None].expand(*gates.inner_lr.shape[:2], len(total), 1, 1)
        return tuple(steps[:, :, i] * u for i, u in enumerate(total))

    def _inner_gradient(self, reference: Weights, k: Tensor, v: Tensor, gates: Gates) -> Weights:
        delta = None if gates.delta is None else gates.delta[..., None]
        outer = torch.is_grad_enabled() and any(x.requires_grad for x in (*reference, k, v))
        with torch.enable_grad():
            leaves = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in reference)
            predicted, error = self._prediction(leaves, k, v, delta)
            inner = torch.autograd.grad(predicted, leaves, error, create_graph=outer)
        if not self.rule.memory.tangent:
            return inner
        return tuple(
            u - (u * p).sum(-1, keepdim=True) * p for u, p in zip(inner, reference, strict=True)
        )

    def _prediction(
        self, weights: Weights, k: Tensor, v: Tensor, delta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the objective compares, and its derivative there."""
        memory = self.rule.memory
        if isinstance(memory, Slots):
            (p,) = weights
            code = v @ p.mT
            if memory.form != "decode":
                return code, (code - k if memory.form == "encode" else -k)
            predicted = k @ p
        else:
            predicted = self._apply(weights, k)
        return predicted, self.rule.objective.error(predicted, v, delta)

    def _keep(self, gates: Gates, layer: int) -> Tensor | float:
        """1 - alpha_t: per channel on the first map's inputs and on the last map's outputs."""
        if gates.log_keep is None:
            return 1.0
        keep = gates.log_keep.exp()
        if keep.shape[-1] == 1:
            return keep[..., None]
        last = layer == len(self.weights) - 1
        return keep[..., None, :] if last else keep[..., :, None]

    def _token(self, update: Weights, gates: Gates) -> Weights:
        impulse = tuple(-u for u in update)
        if self.momentum:
            assert gates.log_momentum is not None
            eta = gates.log_momentum.exp()[..., None, None]
            impulse = self.momentum = tuple(
                eta * s + i for s, i in zip(self.momentum, impulse, strict=True)
            )
        self.weights = tuple(
            self._keep(gates, layer) * w + i
            for layer, (w, i) in enumerate(zip(self.weights, impulse, strict=True))
        )
        scales = [self.rule.boundary.scale(w) for w in self.start]
        return tuple(w if c is None else c * w for w, c in zip(self.weights, scales, strict=True))

    def _average(self, update: Weights, gates: Gates) -> Weights:
        self.pending = tuple(p - u for p, u in zip(self.pending, update, strict=True))
        assert self.slow.position is not None
        factor = self.slow.position[self.place]
        return tuple(w + factor * p for w, p in zip(self.weights, self.pending, strict=True))

    def _sum(self, update: Weights, gates: Gates) -> Weights:
        self.pending = tuple(p - u for p, u in zip(self.pending, update, strict=True))
        nothing = torch.zeros_like(gates.inner_lr[..., 0])
        keep = nothing if gates.log_keep is None else gates.log_keep[..., 0]
        eta = nothing if gates.log_momentum is None else gates.log_momentum.exp()
        self.sums = (self.sums[0] + torch.stack([keep, eta, gates.inner_lr.mean(-1)], -1),)
        return self.weights

    def _end_chunk(self) -> None:
        rule = self.rule
        if rule.update == "average":
            assert self.slow.position is not None
            last = self.slow.position[-1]
            self.weights = tuple(
                w + last * p for w, p in zip(self.weights, self.pending, strict=True)
            )
        if rule.update == "chunk":
            keep, eta, step = self.sums[0][..., None, None].unbind(2)
            if self.momentum:
                self.momentum = tuple(
                    eta / rule.chunk * s + p
                    for s, p in zip(self.momentum, self.pending, strict=True)
                )
            steps = self.momentum or self.pending
            if rule.orthogonal:
                steps = tuple(newton_schulz(s, rule.orthogonal) for s in steps)
            rho = step / rule.chunk if rule.outer_lr else 1.0
            self.weights = tuple(
                keep.exp() * w + rho * s for w, s in zip(self.weights, steps, strict=True)
            )
            self.sums = (torch.zeros_like(self.sums[0]),)
        norms = self.slow.norms or (None,) * len(self.weights)
        self.weights = tuple(
            rule.boundary.settle(w, n) for w, n in zip(self.weights, norms, strict=True)
        )
        self.pending = tuple(torch.zeros_like(p) for p in self.pending)
        self.start, self.place = self.weights, 0
