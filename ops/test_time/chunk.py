"""Test-time memories in the closed form of a chunk, with analytic inner gradients.

The derivation and the costs are in the README beside this file. Here a call is cut into runs of
chunks, at absolute places, with one row of tiles per memory; `engine.py` computes a run.

Shapes: B batch, T time, H heads, K key width, V value width, C chunk, N chunks, M = B * H memories.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mneme.ops.contract import accepts_nothing, carries, uncompiled, without_autocast
from mneme.ops.test_time.engine import Carried, Engine, Tiles
from mneme.ops.test_time.memories import Head
from mneme.ops.test_time.mixing import TiledGates
from mneme.ops.test_time.rule import FastWeights, Gates, Rule, Slow

# Elements in the widest tensor of a run: enough chunks a call to hide its overhead, few enough to
# stay in cache. A run of one chunk is spared copies of weights and factors.
_RUN_ELEMENTS = 2**17

Watch = Callable[[str, Tensor], None]


@uncompiled
@accepts_nothing("q", "k", "v", "gates")
@carries("q", "k", "v", "gates")
@without_autocast
def memorize_chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    gates: Gates,
    state: FastWeights,
    *,
    rule: Rule,
    slow: Slow | None = None,
    recompute: bool = False,
    watch: Watch | None = None,
) -> tuple[Float[Tensor, "B T H V"], FastWeights]:
    """Compute `memorize_naive` chunk by chunk, where almost all arithmetic is matrix products.

    Chunks stand at absolute positions, wherever a call starts or stops. The inner gradients are
    analytic, so the function works the same under no_grad and can be checkpointed; the outer
    gradient is that of automatic differentiation. Operands of matrix products are in the dtype of
    `v`; weights, gates, norms and sums are fp32 (fp64 for fp64 inputs).

    Args:
        q: as in `memorize_naive`, like all up to `slow`.
        k: keys.
        v: values.
        gates: of each token.
        state: before the first token.
        rule: the fixed choices.
        slow: slow weights that the rule uses.
        recompute: compute each run of chunks again in the backward pass instead of keeping what is
            inside; what is kept then is the weights at the starts of runs.
        watch: called with ("surprise", `[B, T, H]`), the norm of each token's inner gradient.

    Returns:
        The reads in the dtype of `v`, and the state after the last token.
    """
    call = _Call(q, k, v, gates, state, rule, Slow() if slow is None else slow)
    engine, carried = call.engine(watch is not None), call.carried()
    out, surprises = [], []
    for tiles in call.runs():
        if recompute and torch.is_grad_enabled():
            y, surprise, carried = checkpoint(engine.run, tiles, carried, use_reentrant=False)
        else:
            y, surprise, carried = engine.run(tiles, carried)
        out.append(from_tiles(y, len(q)))
        if surprise is not None:
            surprises.append(from_tiles(surprise[..., None], len(q))[..., 0])
    if watch is not None:
        watch("surprise", torch.cat(surprises, 1))
    return torch.cat(out, 1).to(v.dtype), call.state_after(carried)


@dataclass(frozen=True)
class _Call:
    """The arguments of one call, and their cut into runs."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    state: FastWeights
    rule: Rule
    slow: Slow

    @property
    def offset(self) -> int:
        """Tokens since the chunk's start, before the first of these."""
        return self.state.offset.shape[1]

    def engine(self, watched: bool) -> Engine:
        """The computation, with slow weights for each memory."""
        slow, batch, maps = self.slow, len(self.q), len(self.state.weights)
        head = None
        if slow.gain is not None and slow.bias is not None:
            head = Head(*(memories_of(x[:, None], batch) for x in (slow.gain, slow.bias)))
        norms: tuple[Tensor | None, ...] = (None,) * maps
        if slow.norms is not None:
            norms = tuple(memories_of(x, batch) for x in slow.norms)
        half = self.v.dtype.itemsize < 4
        dtype = self.v.dtype if half else self.state.weights[0].dtype
        return Engine(self.rule, head, norms, dtype, watched)

    def carried(self) -> Carried:
        """The state before, a row per memory."""
        s = self.state
        groups = (s.weights, s.reference or s.weights, s.momentum, s.pending, s.sums)
        return Carried(*(tuple(x.flatten(0, 1) for x in group) for group in groups))

    def state_after(self, carried: Carried) -> FastWeights:
        """The state after, a row per sequence."""
        batch = len(self.q)
        rows = [tuple(x.unflatten(0, (batch, -1)) for x in group) for group in carried]
        weights, start, momentum, pending, sums = rows
        tail = self.rule.window - 1
        recent = tuple(x[:, max(0, x.shape[1] - tail) :] for x in self._recent_and_now() if tail)
        place = (self.offset + self.k.shape[1]) % self.rule.chunk
        reference = start if self.state.reference else ()
        offset = weights[0].new_empty(batch, place, 0)
        return FastWeights(weights, reference, momentum, pending, sums, recent, offset)

    def runs(self) -> Iterator[Tiles]:
        """The tokens in runs of chunks, in order."""
        rule, position = self.rule, self.slow.position
        widest = max(w.shape[-1] for w in self.state.weights)
        most = _RUN_ELEMENTS // (self.k.shape[0] * self.k.shape[2] * widest)
        cuts = pieces(self.k.shape[1], self.offset, rule.chunk, most)
        sizes, place = [n * tokens for n, tokens in cuts], self.offset
        gates = [None if g is None else g.split(sizes, 1) for g in self._gates()]
        keys = [self._parts(x, sizes) for x in self._recent_and_now()]
        for i, (q, (n, tokens)) in enumerate(zip(self.q.split(sizes, 1), cuts, strict=True)):
            k, v = (to_overlapping_tiles(x[i], n, rule.window - 1) for x in keys)
            yield Tiles(
                to_tiles(q, n),
                k,
                v,
                self._tiled([None if g is None else g[i] for g in gates], n),
                None if position is None else position[place:][:tokens],
                begun=place > 0,
                ends=place + tokens == rule.chunk,
            )
            place = (place + n * tokens) % rule.chunk

    def _tiled(self, gates: list[Tensor | None], n: int) -> TiledGates:
        inner_lr, *others = (None if g is None else to_tiles(g, n) for g in gates)
        assert inner_lr is not None
        return TiledGates(inner_lr, *others)

    def _parts(self, x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        """Keys or values of each run, after those that its window sees before it."""
        tail = self.rule.window - 1
        if not tail:
            return x.split(sizes, 1)  # unlike slices, one copy in the backward pass
        missing = tail + self.k.shape[1] - x.shape[1]  # before the first token: zeros
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, missing, 0))
        stops = list(itertools.accumulate(sizes))
        return [x[:, stop - size : stop + tail] for size, stop in zip(sizes, stops, strict=True)]

    def _recent_and_now(self) -> tuple[Tensor, Tensor]:
        """Keys and values, those that the window still sees first."""
        if not self.state.recent:
            return self.k, self.v
        k, v = self.state.recent
        return torch.cat([k, self.k.to(k.dtype)], 1), torch.cat([v, self.v.to(v.dtype)], 1)

    def _gates(self) -> list[Tensor | None]:
        """The gates as `[B, T, H, .]`, in the order of `TiledGates`."""
        dtype = self.state.weights[0].dtype
        inner_lr, log_keep, log_momentum, window, delta = self.gates
        momentum = None if log_momentum is None else log_momentum[..., None]
        gates = (inner_lr, log_keep, momentum, window, delta)
        return [None if gate is None else gate.to(dtype) for gate in gates]


def to_tiles(x: Tensor, chunks: int) -> Tensor:
    """`[B, N * C, H, D]` to contiguous tiles `[N, M, C, D]`."""
    return x.unflatten(1, (chunks, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


def to_overlapping_tiles(x: Tensor, chunks: int, tail: int) -> Tensor:
    """`[B, tail + N * C, H, D]` to `[N, M, tail + C, D]`: each chunk after the tail before it."""
    if not tail:
        return to_tiles(x, chunks)
    step = (x.shape[1] - tail) // chunks
    return x.unfold(1, tail + step, step).permute(1, 0, 2, 4, 3).flatten(1, 2).contiguous()


def from_tiles(tiles: Tensor, batch: int) -> Tensor:
    """Tiles `[N, M, C, D]` to `[B, N * C, H, D]`."""
    return tiles.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def memories_of(x: Tensor, batch: int) -> Tensor:
    """One per head, `[H, ...]`, to one per memory, `[M, ...]`."""
    return x.expand(batch, *x.shape).flatten(0, 1)


def pieces(tokens: int, offset: int, chunk: int, most: int) -> list[tuple[int, int]]:
    """How to process T tokens of which the first stands at `offset` in its chunk.

    Args:
        tokens: T.
        offset: tokens of the first chunk that came before.
        chunk: C.
        most: tokens to process together, if that is a chunk or more.

    Returns:
        (number of chunks, tokens in each) of consecutive runs: the rest of a chunk that was begun,
        all whole chunks, and what is left over; runs of nothing are left out.
    """
    rest = min(tokens, -offset % chunk)
    whole, left = divmod(tokens - rest, chunk)
    together = max(1, most // chunk)
    groups = [(min(together, whole - i), chunk) for i in range(0, whole, together)]
    return [(n, c) for n, c in [(1, rest), *groups, (1, left)] if c]
