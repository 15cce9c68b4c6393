"""Memory architectures: small networks whose weights are the state.

A memory says how its linear layers compose into a function, and what input and what delta each of
them has for a token, so that the gradient of weight l for token j is the outer product of row j of
`inputs[l]` with row j of `deltas[l]`. Nothing here knows about chunks, gates or momentum.

Shapes: M memories, R rows (tokens), weights of one map `[M, in, out]`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mneme.ops.options import require_choice, scaled_width

Linear = Callable[[int, Tensor], Tensor]
"""`linear(l, x)`: rows x through weight l, however it is made up."""
Product = Callable[[Tensor, Tensor], Tensor]
Error = Callable[[Tensor], Tensor]
"""From predictions `[M, R, V]` to the objective's derivative there."""

_LN_EPS = 1e-6


ActivationName = Literal["gelu", "silu"]


class _Gelu(torch.autograd.Function):
    """phi(z) = z Phi(z) and phi'(z), Phi the normal distribution function."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.ops.aten.gelu_backward(torch.ones_like(z), z)
        ctx.save_for_backward(z, slope)
        return F.gelu(z), slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue: Tensor, dslope: Tensor) -> Tensor:
        z, slope = ctx.saved_tensors
        square = z * z  # phi''(z) = (2 - z^2) exp(-z^2 / 2) / sqrt(2 pi)
        bell = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        bend = square.neg_().add_(2).mul_(bell)
        return bend.mul_(dslope).addcmul_(dvalue, slope)


class _Silu(torch.autograd.Function):
    """phi(z) = z s and phi'(z), s = sigmoid(z)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.ops.aten.silu_backward(torch.ones_like(z), z)
        ctx.save_for_backward(z, slope)
        return F.silu(z), slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue: Tensor, dslope: Tensor) -> Tensor:
        z, slope = ctx.saved_tensors
        s = z.sigmoid()  # phi''(z) = s (1 - s) (2 + z (1 - 2 s))
        bend = torch.addcmul(z + 2, z, s, value=-2).mul_(s).mul_(1 - s)
        return bend.mul_(dslope).addcmul_(dvalue, slope)


class Activation(NamedTuple):
    """An activation, alone and with its slope.

    Attributes:
        value: `phi(z)`.
        with_slope: `(phi(z), phi'(z))`, both differentiable once.
    """

    value: Callable[[Tensor], Tensor]
    with_slope: Callable[[Tensor], tuple[Tensor, Tensor]]


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, _Gelu.apply),
    "silu": Activation(F.silu, _Silu.apply),
}


class Gradients(NamedTuple):
    """Factors of the weights' gradients: rows `[M, R, in]` and `[M, R, out]` of each map."""

    inputs: tuple[Tensor, ...]
    deltas: tuple[Tensor, ...]


class Head(NamedTuple):
    """The affine part of the output's layer norm, `[M, 1, V]` each; slow weights."""

    gain: Tensor
    bias: Tensor


def _with_one(x: Tensor) -> Tensor:
    """Rows with a constant feature, whose weights are biases."""
    return F.pad(x, (0, 1), value=1.0)


def _hidden(expand: float, value: int) -> int:
    width = scaled_width(value, expand)
    if width < 1:
        raise ValueError(f"expand={expand} leaves no hidden unit for values of width {value}")
    return width


def _backward_through(delta: Tensor, weight: Tensor, bias: bool, product: Product) -> Tensor:
    return product(delta, (weight[..., :-1, :] if bias else weight).mT)


@dataclass(frozen=True)
class _Network:
    """What networks share: the end `y = z`, or `x + gain * LN(z) + bias` with both options on."""

    residual: bool = True
    norm: bool = True
    tangent = False
    key_maps = 1  # how many maps, from the first on, read keys

    def _end(self, z: Tensor, x: Tensor, head: Head | None) -> Tensor:
        if self.norm:
            z = F.layer_norm(z.to(_at_least_fp32(z)), z.shape[-1:], eps=_LN_EPS)
            if head is not None:
                z = torch.addcmul(head.bias, z, head.gain)
        return x + z if self.residual else z

    def _output_delta(self, z: Tensor, x: Tensor, head: Head | None, error: Error) -> Tensor:
        """Derivative of the objective at z, before the norm."""
        if not self.norm:
            return error(self._end(z, x, head))
        z = z.to(_at_least_fp32(z))
        size = z.shape[-1:]
        normal, mean, rstd = torch.native_layer_norm(z, size, None, None, _LN_EPS)
        y = normal if head is None else torch.addcmul(head.bias, normal, head.gain)
        e = error(x + y if self.residual else y)
        g = e if head is None else e * head.gain
        mask = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(g, z, size, mean, rstd, None, None, mask)[
            0
        ]

    def _check_width(self, key: int, value: int) -> None:
        if self.residual and key != value:
            raise ValueError(
                f"a residual memory needs keys as wide as values, got {key} and {value}: "
                "use residual=false or equal widths"
            )


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class MLP(_Network):
    """`f(x) = x + LN(phi(... phi(x W_1) ...) W_L)`.

    Depth 1 without residual and norm is a matrix memory, `x W`; with both it is that of TTT-Linear.

    Args:
        residual: add the input; default True.
        norm: layer norm with a learned gain and bias per head on the output; default True.
        depth: L, 1 to 4; default 2.
        expand: hidden width over value width; default 4.
        activation: "gelu" (default, the exact one) or "silu".
        bias: give every map a bias, which is a fast weight too; default False.
    """

    depth: int = 2
    expand: float = 4.0
    activation: ActivationName = "gelu"
    bias: bool = False

    def __post_init__(self) -> None:
        """Checks the depth and the activation."""
        if not 1 <= self.depth <= 4:
            raise ValueError(f"depth must be 1 to 4, got {self.depth}")
        require_choice(ACTIVATIONS, activation=self.activation)

    @property
    def matrix(self) -> bool:
        """Whether `f(x) = x W`."""
        return self.depth == 1 and not (self.residual or self.norm or self.bias)

    def shapes(self, key: int, value: int) -> list[tuple[int, int]]:
        """(in, out) of each map, the row of a bias included."""
        self._check_width(key, value)
        hidden = _hidden(self.expand, value)
        widths = [key, *[hidden] * (self.depth - 1), value]
        return [(a + self.bias, b) for a, b in pairwise(widths)]

    def apply(self, linear: Linear, x: Tensor, head: Head | None) -> Tensor:
        """The function, given its linear layers."""
        act = ACTIVATIONS[self.activation].value
        z = linear(0, self._fed(x))
        for layer in range(1, self.depth):
            z = linear(layer, self._fed(act(z)))
        return self._end(z, x, head)

    def gradients(
        self,
        weights: Sequence[Tensor],
        k: Tensor,
        v: Tensor,
        head: Head | None,
        error: Error,
        mm: Product,
    ) -> Gradients:
        """Inputs and deltas of each map for keys `[M, R, K]`, at given weights."""
        act = ACTIVATIONS[self.activation]
        inputs, slopes = [self._fed(k)], []
        for weight in weights[:-1]:
            value, slope = act.with_slope(mm(inputs[-1], weight))
            inputs.append(self._fed(value))
            slopes.append(slope)
        deltas = [self._output_delta(mm(inputs[-1], weights[-1]), k, head, error)]
        for weight in weights[:0:-1]:
            back = _backward_through(deltas[0], weight, self.bias, mm)
            deltas.insert(0, back * slopes.pop())
        return Gradients(tuple(inputs), tuple(deltas))

    def _fed(self, x: Tensor) -> Tensor:
        return _with_one(x) if self.bias else x


@dataclass(frozen=True)
class Matrix(MLP):
    """`f(x) = x W`: linear memory, the case with an exact chunked form."""

    residual: bool = False
    norm: bool = False
    depth: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for options that make it more than a matrix."""
        super().__post_init__()
        if not self.matrix:
            raise ValueError("a Matrix has depth 1, no residual path, norm or bias: use MLP")


@dataclass(frozen=True)
class SwiGLU(_Network):
    """`f(x) = (silu(x W_gate) * (x W_up)) W_down`, as in LaCT (arXiv 2505.23884).

    Args:
        residual: add the input; default False.
        norm: layer norm with a learned gain and bias per head on the output; default False.
        expand: hidden width over value width; default 1.
    """

    residual: bool = False
    norm: bool = False
    expand: float = 1.0
    matrix = False
    key_maps = 2

    def shapes(self, key: int, value: int) -> list[tuple[int, int]]:
        """(in, out) of gate, up and down."""
        self._check_width(key, value)
        hidden = _hidden(self.expand, value)
        return [(key, hidden), (key, hidden), (hidden, value)]

    def apply(self, linear: Linear, x: Tensor, head: Head | None) -> Tensor:
        """The function, given its linear layers."""
        return self._end(linear(2, F.silu(linear(0, x)) * linear(1, x)), x, head)

    def gradients(
        self,
        weights: Sequence[Tensor],
        k: Tensor,
        v: Tensor,
        head: Head | None,
        error: Error,
        mm: Product,
    ) -> Gradients:
        """Inputs and deltas of each map for keys `[M, R, K]`, at given weights."""
        gate, up = mm(k, weights[0]), mm(k, weights[1])
        opened, slope = ACTIVATIONS["silu"].with_slope(gate)
        hidden = opened * up
        delta = self._output_delta(mm(hidden, weights[2]), k, head, error)
        back = mm(delta, weights[2].mT)
        return Gradients((k, k, hidden), (back * up * slope, back * opened, delta))


@dataclass(frozen=True)
class Slots:
    """m unit vectors P; `f(x) = x P`, x a code of m elements: Lattice (arXiv 2504.05646).

    Slots are read as directions, so a slot's gradient is orthogonal to the slot: it receives only
    what it does not hold. With `Pi_i(x) = x - P_i (P_i . x)`, the gradient of slot i is
    `c_i Pi_i(g)`, where

    * decode: reconstruct the value from the code, `c = k`, `g = k P - v`;
    * encode: predict the code from the value, `c = P v - k`, `g = v`;
    * similarity: the dot product of the two, `c = -k`, `g = v`.

    The equations are derived from the paper's abstract and reviews, not taken from its text.

    Args:
        slots: m; default 16.
        form: "decode" (default), "encode" or "similarity".
    """

    slots: int = 16
    form: Literal["decode", "encode", "similarity"] = "decode"
    tangent = True
    key_maps = 1
    matrix = False
    norm = False

    def __post_init__(self) -> None:
        """Checks the form and the number of slots."""
        require_choice(("decode", "encode", "similarity"), form=self.form)
        if self.slots < 1:
            raise ValueError(f"slots must be 1 or more, got {self.slots}")

    def shapes(self, key: int, value: int) -> list[tuple[int, int]]:
        """The slots as one map from codes to values."""
        return [(self.slots, value)]

    def apply(self, linear: Linear, x: Tensor, head: Head | None) -> Tensor:
        """The combination of slots that a code asks for."""
        return linear(0, x)

    def gradients(
        self,
        weights: Sequence[Tensor],
        k: Tensor,
        v: Tensor,
        head: Head | None,
        error: Error,
        mm: Product,
    ) -> Gradients:
        """Coefficient and direction of each token; the projection is the engine's."""
        (p,) = weights
        if self.form == "decode":
            return Gradients((k,), (error(mm(k, p)),))
        coefficient = mm(v, p.mT) - k if self.form == "encode" else -k
        return Gradients((coefficient,), (v,))


MemoryNetwork = MLP | SwiGLU | Slots


def initial_stds(memory: MemoryNetwork, key: int, value: int, *, unit_keys: bool) -> list[float]:
    """Standard deviations of initial weights with which a step means the same in every memory.

    A layer norm after the last map divides by the scale of its output, so steps count in units of
    the last map's weights: as in a linear memory with unit keys if those have variance one, and if
    hidden units see inputs of variance one. By fan-in, right without the norm, they would count as
    many times more as there are hidden units, and a small change of one token would grow
    exponentially over the next. A map between hidden layers has inputs of norm far above one, and
    no initial weights make up for it: steps of deeper memories must be smaller.

    Args:
        memory: the architecture.
        key: width of keys.
        value: width of values.
        unit_keys: whether keys have norm one, rather than features of variance one.
    """
    stds = [i**-0.5 for i, _ in memory.shapes(key, value)]
    if memory.norm:
        stds[-1] = 1.0
        if unit_keys:
            stds[: memory.key_maps] = [1.0] * memory.key_maps
    return stds
