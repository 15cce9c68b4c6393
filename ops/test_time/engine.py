"""The computation of test-time memories on a run of chunks, in closed form.

The derivation is in the README beside this file. A run goes in two passes. The first takes the
chunks in order, for the keys' forward and backward pass through the memory and the update of its
weights. The second reads for the queries of all chunks at once, from the weights at the chunks'
starts and from what the first left: each token's input and delta at every linear layer.

Shapes: K key width, V value width, C tokens of a chunk, N chunks of a run, M memories, R rows of
keys of a chunk (the window's tokens before it included).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mneme.ops.test_time.linear import causal_read, product, update
from mneme.ops.test_time.memories import Gradients, Head
from mneme.ops.test_time.mixing import (
    Factors,
    Mixing,
    TiledGates,
    corrections,
    errors_in_turn,
    mixing,
)
from mneme.ops.test_time.rule import Rule, newton_schulz

Nested = TypeVar("Nested")
PerWeight = tuple[Tensor, ...]
"""One tensor per weight of the memory."""


class Carried(NamedTuple):
    """The state within a call, `[M, in, out]` per map; fields as in `FastWeights`."""

    weights: PerWeight
    start: PerWeight  # the weights, or their accumulator, where the chunk started
    momentum: PerWeight
    pending: PerWeight
    sums: PerWeight


class _Chunk(NamedTuple):
    """What reads need of a chunk, or of all chunks of a run along the first axis."""

    inputs: PerWeight  # [M, R, in], each token's input to each map
    deltas: PerWeight  # [M, R, out], each token's delta there
    weights: PerWeight  # [M, in, out], what is read from
    added: PerWeight  # the same, counted by `Mixing.momentum`
    scales: PerWeight  # [M, 1, 1], where weights are scaled accumulators
    surprise: PerWeight  # [M, C], if watched
    starts: PerWeight  # [M, in, out], the slots, if gradients are to be tangent to them


def _each(function: Callable[..., Tensor], *columns: PerWeight) -> PerWeight:
    """Applies a function to the tensors of each linear layer."""
    return tuple(function(*row) for row in zip(*columns, strict=True))


class Tiles(NamedTuple):
    """The tokens of N chunks, or of a part of one chunk.

    Attributes:
        q: `[N, M, C, K]`.
        k, v: `[N, M, R, .]`.
        gates: `[N, M, C, .]`.
        position: factors of the averaged update at these tokens, `[C]`.
        begun: whether the chunk had tokens before these.
        ends: whether each chunk ends with its last token here.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: TiledGates
    position: Tensor | None
    begun: bool
    ends: bool


class _Here(NamedTuple):
    """What one chunk works with; of all chunks, before they are taken apart."""

    k: Tensor
    v: Tensor
    gates: TiledGates
    mix: Mixing
    solve: Tensor | None


@dataclass(frozen=True)
class Engine:
    """What does not change within a call."""

    rule: Rule
    head: Head | None
    norms: tuple[Tensor | None, ...]
    dtype: torch.dtype  # of the operands of matrix products
    watched: bool

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        """Batched matrix product with operands in `dtype`."""
        return product(a, b, self.dtype)

    def run(self, tiles: Tiles, carried: Carried) -> tuple[Tensor, Tensor | None, Carried]:
        """Reads `[N, M, C, V]`, surprise `[N, M, C]` if watched, and the state after."""
        mix, chunks = mixing(self.rule, tiles.gates, tiles.position), []
        solve = corrections(mix, tiles.k) if self.rule.gradient_reference == "token" else None
        for here in _unbound(_Here(tiles.k, tiles.v, tiles.gates, mix, solve)):
            chunk = self._learnt(here, carried, tiles.begun)
            chunks.append(chunk)
            carried = self._advanced(carried, chunk, here)
            if tiles.ends:
                carried = self._ended(carried, here.mix)
        whole = _Chunk(*(_each(_joined, *field) for field in zip(*chunks, strict=True)))
        surprise = whole.surprise[0].view(tiles.q.shape[:3]) if self.watched else None
        return self._reads(tiles.q, whole, mix), surprise, carried

    def _learnt(self, here: _Here, carried: Carried, begun: bool) -> _Chunk:
        """Gradients of one chunk's tokens, and what its tokens read from."""
        rule, (k, v, _, mix, solve) = self.rule, here
        reference = _each(rule.boundary.view, carried.start)
        if solve is None:
            gradients = self._gradients(reference, here)
        else:
            (w,) = carried.weights
            errors = errors_in_turn(k, v, w, carried.momentum, mix, solve, self.mm)
            gradients = Gradients((k,), (errors,))
        scales = tuple(s for w in carried.start if (s := rule.boundary.scale(w)) is not None)
        reads_own = rule.update == "token" and not rule.read_before
        return _Chunk(
            *self._folded(gradients, mix),
            weights=carried.weights if reads_own else reference,
            added=self._added(carried, begun) if not rule.read_before else (),
            scales=scales if reads_own else (),
            surprise=(self._surprise(gradients, reference, here),) if self.watched else (),
            starts=carried.start if rule.memory.tangent else (),
        )

    def _gradients(self, reference: PerWeight, here: _Here) -> Gradients:
        """Gradients of a chunk's tokens at the weights of its start."""
        k, v, delta = here.k, here.v, here.gates.delta

        def error(prediction: Tensor) -> Tensor:
            return self.rule.objective.error(prediction, v, delta)

        return self.rule.memory.gradients(reference, k, v, self.head, error, self.mm)

    def _surprise(self, gradients: Gradients, reference: PerWeight, here: _Here) -> Tensor:
        """Norm of each token's inner gradient over all maps, `[M, C]`."""
        pairs = zip(gradients.inputs, gradients.deltas, strict=True)
        squares = [x.square().sum(-1) * d.square().sum(-1) for x, d in pairs]
        if self.rule.memory.tangent:
            along = gradients.inputs[0] * self.mm(gradients.deltas[0], reference[0].mT)
            squares.append(-along.square().sum(-1))
        return torch.stack(squares).sum(0).clamp(min=0).sqrt()[:, -here.gates.inner_lr.shape[1] :]

    def _added(self, carried: Carried, begun: bool) -> PerWeight:
        """What reads add to the weights: the momentum, or the steps so far if they are averaged."""
        averaged = self.rule.update == "average" and begun
        return carried.pending if averaged else carried.momentum

    def _folded(self, gradients: Gradients, mix: Mixing) -> Gradients:
        """Gradients as seen from the chunk's start, where channels decay at different rates."""
        if mix.log_fold is None:
            return gradients
        since, (*others, last) = mix.log_fold.neg().exp(), gradients.deltas
        first, *rest = gradients.inputs
        first = first * since if rest else first
        return Gradients((first, *rest), (*others, last * since))

    def _advanced(self, carried: Carried, chunk: _Chunk, here: _Here) -> Carried:
        """The state after a chunk's tokens, before anything that happens at its end."""
        mix = here.mix
        if self.rule.update != "token":
            pending = self._updated(carried.pending, chunk, mix.steps)
            return carried._replace(pending=pending, sums=_summed(carried.sums, here.gates))
        momentum, kept, share = carried.momentum, _end(mix.weights), _end(mix.momentum)
        weights = self._updated(carried.weights, chunk, mix.steps, kept, momentum, share)
        if mix.log_fold is not None:
            whole, (*first, last) = mix.log_fold[:, -1:].exp(), weights
            weights = (*(w * whole.mT for w in first), last * whole)
        if mix.impulses is not None:
            momentum = self._updated(momentum, chunk, mix.impulses, mix.decay)
        return carried._replace(weights=weights, momentum=momentum)

    def _updated(
        self,
        before: PerWeight,
        chunk: _Chunk,
        counts: Tensor,
        kept: Tensor | None = None,
        added: PerWeight = (),
        share: Tensor | None = None,
    ) -> PerWeight:
        """Weights, momentum or a sum of steps after a chunk's gradients, map by map.

        Args:
            before: what is updated.
            chunk: the gradients.
            counts: of each token's gradient, `[M, R, 1]`, or one column per map.
            kept: what `before` counts for, `[M, 1, 1]`; None for one.
            added: the momentum that joins the weights.
            share: what it counts for.
        """
        columns, after = counts.expand(*counts.shape[:2], len(before)).split(1, -1), []
        for layer, (w, count) in enumerate(zip(before, columns, strict=True)):
            x, d, s = chunk.inputs[layer], chunk.deltas[layer], added[layer] if added else None
            new = update(x, d, count, w, kept, s, share, dtype=self.dtype)
            if self.rule.memory.tangent:
                p = chunk.starts[layer]
                new = new + (x * count * self.mm(d, p.mT)).sum(-2)[..., None] * p
            after.append(new)
        return tuple(after)

    def _ended(self, carried: Carried, mix: Mixing) -> Carried:
        """The state with which the next chunk starts."""
        rule, c = self.rule, carried
        weights, momentum, sums = c.weights, c.momentum, c.sums
        if rule.update == "average":
            assert mix.momentum is not None
            end = mix.momentum.end
            weights = _each(lambda w, s: torch.addcmul(w, s, end), weights, c.pending)
        if rule.update == "chunk":
            log_keep, eta, rate = (x[..., None, None] for x in sums[0].unbind(-1))
            if momentum:
                mean = eta / rule.chunk
                momentum = _each(lambda s, p: torch.addcmul(p, s, mean), momentum, c.pending)
            steps = momentum or c.pending
            if rule.orthogonal:
                steps = tuple(newton_schulz(s, rule.orthogonal) for s in steps)
            if rule.outer_lr:
                steps = tuple(s * (rate / rule.chunk) for s in steps)
            weights = _each(lambda w, s: torch.addcmul(s, w, log_keep.exp()), weights, steps)
            sums = (torch.zeros_like(sums[0]),)
        weights = tuple(
            rule.boundary.settle(w, n) for w, n in zip(weights, self.norms, strict=True)
        )
        pending = tuple(torch.zeros_like(p) for p in c.pending)
        return Carried(weights, weights, momentum, pending, sums)

    def _reads(self, q: Tensor, chunk: _Chunk, mix: Mixing) -> Tensor:
        """What each query `[N, M, C, K]` reads from the weights of its own place."""

        def start(layer: int, y: Tensor) -> Tensor:
            return self.mm(y.flatten(0, 1), chunk.weights[layer]).view(*y.shape[:-1], -1)

        def linear(layer: int, y: Tensor) -> Tensor:
            z = self._causal(layer, y.flatten(0, 1), chunk, mix)
            return (z * chunk.scales[layer] if chunk.scales else z).view(*y.shape[:-1], -1)

        memory, fold = self.rule.memory, None if mix.log_fold is None else mix.log_fold.exp()
        if self.rule.read_before:
            return memory.apply(start, q, self.head)
        if fold is None:
            return memory.apply(linear, q, self.head)
        last = len(chunk.inputs) - 1

        def folded(layer: int, y: Tensor) -> Tensor:
            z = linear(layer, y * fold if layer == 0 < last else y)
            return z * fold if layer == last else z

        return memory.apply(folded, q, self.head)

    def _causal(self, layer: int, y: Tensor, chunk: _Chunk, mix: Mixing) -> Tensor:
        """What rows `[N * M, C, in]` read from one map, each from the weights of its own place."""
        assert mix.reads is not None
        reads, x, d = mix.reads.flatten(0, 1), chunk.inputs[layer], chunk.deltas[layer]
        s = chunk.added[layer] if chunk.added else None
        of_w, of_s = (
            None if x is None else x.read.flatten(0, 1) for x in (mix.weights, mix.momentum)
        )
        z = causal_read(
            y,
            x,
            d,
            reads,
            chunk.weights[layer],
            of_w,
            s,
            None if s is None else of_s,
            dtype=self.dtype,
        )
        if not self.rule.memory.tangent:
            return z
        p = chunk.starts[layer]
        return z + self.mm(y * self.mm(reads, x * self.mm(d, p.mT)), p)


def _end(source: Factors | None) -> Tensor | None:
    return None if source is None else source.end


def _joined(*x: Tensor) -> Tensor:
    return x[0] if len(x) == 1 else torch.cat(x)


def _unbound(values: Nested) -> Iterator[Nested]:
    """A nested tuple for every chunk, from one of tensors with a row per chunk; None stays.

    Entries taken one by one would each cost a tensor of zeros for all chunks in the backward pass.
    """
    leaves, spec = pytree.tree_flatten(values)
    rows = (itertools.repeat(x) if x is None else x.unbind(0) for x in leaves)
    for row in zip(*rows, strict=False):
        entry: Nested = pytree.tree_unflatten(list(row), spec)
        yield entry


def _summed(sums: PerWeight, gates: TiledGates) -> PerWeight:
    """Sums over the chunk so far of log keep, momentum and inner learning rate."""
    if not sums:
        return ()
    rate = gates.inner_lr.mean(-1).sum(-1)
    nothing = torch.zeros_like(rate)
    keep = nothing if gates.log_keep is None else gates.log_keep.sum((-2, -1))
    eta = nothing if gates.log_momentum is None else gates.log_momentum.exp().sum((-2, -1))
    return (sums[0] + torch.stack([keep, eta, rate], -1),)
