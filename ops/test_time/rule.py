"""What a test-time memory is: the fixed choices, the gates of each token, and the state.

An objective is what a memory is asked to reduce: it gives the error `e = dl/dy` of a prediction
y = f(k) against a value v; everything behind it, the gradient of the weights, belongs to the memory
(`memories.py`). Losses are sums over the features of a value, without a mean, so an inner learning
rate means the same in any width.

A boundary is a map applied where chunks meet, since inside a chunk everything is linear in the
updates. One that projects replaces the weights themselves (`settle`); one that mirrors leaves the
accumulator as it is and gives the weights that stand for it (`view`).

Shapes: B batch, T time, H heads, K key width, V value width, C chunk, M memories; weights of one
layer at a boundary are `[M, in, out]`.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.options import require_choice
from mneme.ops.test_time.memories import MLP, MemoryNetwork, Slots

_TINY = 1e-6  # inside square roots, so that their gradient survives at zero
_SHARPNESS = 10.0  # slope of the smooth sign at zero


@dataclass(frozen=True)
class SquaredError:
    """`1/2 |f(k) - v|^2`.

    Titans' main text has no 1/2: the same update takes half the step there.
    """

    needs_delta = False

    def error(self, prediction: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """`f(k) - v`."""
        return prediction - value


@dataclass(frozen=True)
class DotProduct:
    """`-f(k) . v`. It has no minimum: it needs forgetting or a normalized memory."""

    needs_delta = False

    def error(self, prediction: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """`-v`, whatever the prediction."""
        return -value.expand_as(prediction)


@dataclass(frozen=True)
class LpError:
    """`sum |f(k) - v|^p`, smoothed: the objective of Moneta (arXiv 2504.13173).

    The derivative `p sign(r) |r|^(p-1)` is taken with `sign(r) = tanh(10 r)` and
    `|r| = sqrt(r^2 + 1e-6)`, so that it can be differentiated again at zero.

    Args:
        p: the exponent, at least 1; default 3, the paper's.
    """

    p: float = 3.0
    needs_delta = False

    def __post_init__(self) -> None:
        """Raises ValueError for an exponent out of range."""
        if self.p < 1:
            raise ValueError(f"p must be 1 or more, got {self.p}")

    def error(self, prediction: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """The smoothed derivative `[..., V]`, at predictions of that shape."""
        r = prediction - value
        size = (r * r + _TINY) ** ((self.p - 1) / 2)
        return self.p * _smooth_sign(r) * size


@dataclass(frozen=True)
class Huber:
    """Squared error up to a norm delta, then linear: the objective of Yaad (arXiv 2504.13173).

    The paper's update takes the gradient of the squared error where `|r| <= delta` (r the residual
    of a token) and delta times that of the l1 error elsewhere, `delta sign(r)`,
    here with `sign(r) = tanh(10 r)`: with a jump at zero, rounding decides updates. The other form
    scales the residual to norm delta instead, which is the gradient of the norm's Huber loss and a
    clip of each token's error.

    Args:
        form: "sign", the paper's (default), or "clip".
    """

    form: Literal["sign", "clip"] = "sign"
    needs_delta = True

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown form."""
        require_choice(("sign", "clip"), form=self.form)

    def error(self, prediction: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """The residual, limited; `delta` is `[..., 1]`, one positive scalar a token."""
        assert delta is not None
        r = prediction - value
        square = (r * r).sum(-1, keepdim=True)
        if self.form == "clip":
            return r * (delta * (square + _TINY**2).rsqrt()).clamp(max=1.0)
        return torch.where(square <= delta * delta, r, delta * _smooth_sign(r))


def _smooth_sign(r: Tensor) -> Tensor:
    return torch.tanh(_SHARPNESS * r)


Objective = SquaredError | DotProduct | LpError | Huber


Orthogonal = bool | Literal["scheduled"]


@dataclass(frozen=True)
class Boundary:
    """No map: the base of the others."""

    linear_inside = True  # whether a token may read the weights of its own place in the chunk
    spread: ClassVar[float | None] = (
        None  # standard deviation of initial accumulators, if not by fan-in
    )

    def settle(self, weights: Tensor, norms: Tensor | None) -> Tensor:
        """The weights with which the next chunk starts."""
        return weights

    def view(self, weights: Tensor) -> Tensor:
        """The weights that an accumulator stands for, at a chunk's start."""
        return weights

    def scale(self, weights: Tensor) -> Tensor | None:
        """What turns accumulators inside a chunk into weights, from that at its start."""
        return None

    def start(self, weights: Tensor) -> Tensor:
        """The accumulator with which to start from initial weights."""
        return weights


@dataclass(frozen=True)
class RowNorm(Boundary):
    """Gives every output unit the norm of its initial weights: LaCT (arXiv 2505.23884)."""

    def settle(self, weights: Tensor, norms: Tensor | None) -> Tensor:
        """Rescales the weights into each unit to `norms` `[M, 1, out]`."""
        assert norms is not None
        square = (weights * weights).sum(-2, keepdim=True)
        return weights * (norms * (square + _TINY**2).rsqrt())


@dataclass(frozen=True)
class UnitSlots(Boundary):
    """Gives every row norm one: the slots of Lattice (arXiv 2504.05646)."""

    def settle(self, weights: Tensor, norms: Tensor | None) -> Tensor:
        """Divides each row by its norm."""
        return torch.nn.functional.normalize(weights, dim=-1)

    def start(self, weights: Tensor) -> Tensor:
        """Slots begin on the sphere."""
        return self.settle(weights, None)


@dataclass(frozen=True)
class LqNorm(Boundary):
    """`W = A / |A|_q^(q-2)`, one norm per matrix: Moneta (arXiv 2504.13173).

    The norm is a mean, `|A|_q = mean(|a|^q)^(1/q)`, where the paper's is a sum. That is the same
    rule in another unit of A and of the steps, one in which A and W are of one size and a step
    means what it means without the map. Inside a chunk the norm is that of the accumulator at its
    start, so that reads stay linear.

    Args:
        q: above 2 and not 3, at which the norm of W would always be one; default 4.
    """

    q: float = 4.0

    def __post_init__(self) -> None:
        """Raises ValueError for an exponent out of range."""
        if self.q <= 2 or self.q == 3:
            raise ValueError(f"q must be above 2 and not 3, got {self.q}")

    def scale(self, weights: Tensor) -> Tensor:
        """`|A|_q^(2-q)`, `[M, 1, 1]`."""
        power = (weights.abs() ** self.q).mean((-2, -1), keepdim=True)
        return (power + _TINY) ** ((2 - self.q) / self.q)

    def view(self, weights: Tensor) -> Tensor:
        """`A |A|_q^(2-q)`."""
        return weights * self.scale(weights)

    def start(self, weights: Tensor) -> Tensor:
        """`W |W|_q^((q-2)/(3-q))`."""
        power = (weights.abs() ** self.q).mean((-2, -1), keepdim=True)
        return weights * (power + _TINY) ** ((self.q - 2) / (3 - self.q) / self.q)


@dataclass(frozen=True)
class Softmax(Boundary):
    """`W = c softmax(A)` over the inputs of each unit: Memora (arXiv 2504.13173).

    A is the logarithm of the weights up to a constant per unit, which the softmax ignores; so
    decaying and adding to A is the paper's update of W, for any number of tokens. Initial weights
    are taken for A. The weights of a token inside a chunk are not linear in A, so reads are of the
    chunk's start.

    Args:
        scale_of_unit: c, the sum of a unit's weights; default 1.
    """

    scale_of_unit: float = 1.0
    linear_inside = False
    spread = 2.0  # units of nearly equal weights would give outputs without variance

    def view(self, weights: Tensor) -> Tensor:
        """Positive weights that sum to c for each unit."""
        return self.scale_of_unit * weights.softmax(-2)


MUON = ((3.4445, -4.7750, 2.0315),) * 5
SCHEDULED = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(update: Tensor, orthogonal: Orthogonal = True) -> Tensor:
    """Pushes the singular values of `[..., in, out]` towards one: the step of Muon.

    Five steps of the quintic iteration `x <- a x + (b x x^T + c (x x^T)^2) x`, on the matrix scaled
    to Frobenius norm one. Zero stays zero.

    Args:
        update: the matrices.
        orthogonal: True: Muon's coefficients, the same in each step, which bring singular values
            from 0.01 on to 0.68 to 1.13; "scheduled": coefficients for each step, as in LaCT's code
            for language (arXiv 2505.23884), which bring them to 0.98 to 1.03.
    """
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    square = (x * x).sum((-2, -1), keepdim=True)
    x = x * (square + _TINY**4).rsqrt()
    for a, b, c in SCHEDULED if orthogonal == "scheduled" else MUON:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Gates(NamedTuple):
    """What a token decides about the update it makes; `None` where the rule has no such gate.

    Attributes:
        inner_lr: theta, `[B, T, H, 1]`, or one per weight of the memory, `[B, T, H, L]`, if
            the rule steps once a chunk.
        log_keep: log(1 - alpha), `[B, T, H, 1]` or per channel `[B, T, H, V]`.
        log_momentum: log(eta), `[B, T, H]`.
        window: weights gamma of the last c tokens' losses, newest first, `[B, T, H, c]`.
        delta: the Huber objective's delta, `[B, T, H, 1]`.
    """

    inner_lr: Float[Tensor, "B T H L"]
    log_keep: Float[Tensor, "B T H N"] | None = None
    log_momentum: Float[Tensor, "B T H"] | None = None
    window: Float[Tensor, "B T H c"] | None = None
    delta: Float[Tensor, "B T H 1"] | None = None


class Slow(NamedTuple):
    """Slow weights that the recurrence uses: learned outside, the same for all tokens.

    Attributes:
        gain, bias: of the layer norm on the memory's output, `[H, V]`.
        norms: what `RowNorm` restores, one `[H, 1, out]` per linear layer.
        position: factors `w_1 .. w_C` of the averaged update, `[C]`.
    """

    gain: Float[Tensor, "H V"] | None = None
    bias: Float[Tensor, "H V"] | None = None
    norms: tuple[Tensor, ...] | None = None
    position: Float[Tensor, " C"] | None = None


class FastWeights(NamedTuple):
    """The state: fp32 (fp64 for fp64 inputs), one tensor per linear layer of the memory.

    Attributes:
        weights: `[B, H, in, out]`, where the tokens so far have brought them.
        reference: the weights at the chunk's start, where gradients are taken; empty if the rule
            needs no copy of them.
        momentum: `[B, H, in, out]`; empty without momentum.
        pending: sum of this chunk's steps, for rules that apply it at the chunk's end.
        sums: `[B, H, 3]`, sums over this chunk of log keep, momentum and inner learning rate, for
            the same.
        recent: keys and values `[B, c - 1, H, .]` of the last tokens, fewer at the start; empty
            without a window.
        offset: `[B, p, 0]`, p tokens since the chunk's start. A shape rather than an element: it
            decides control flow, and reading an element would wait for the device.
    """

    weights: tuple[Tensor, ...]
    reference: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    recent: tuple[Tensor, ...]
    offset: Tensor


Update = Literal["token", "average", "chunk"]
GradientReference = Literal["chunk", "token"]
Decay = Literal["none", "head", "channel"]


@dataclass(frozen=True)
class Rule:
    """The fixed choices of a test-time memory; `naive.py` has the recurrence they make.

    Args:
        memory: architecture of the fast weights.
        objective: inner loss.
        boundary: map of the weights where chunks meet.
        chunk: C, tokens whose gradients are taken at the same weights. It belongs to the function.
        update: "token": every token steps, with its own gates; "average": as "token" without
            momentum and decay, token i of a chunk seeing `w_i` times the sum of the steps up to it;
            "chunk": one step per chunk.
        decay: what `Gates.log_keep` is given for: "head", one per memory; "channel", one per value
            channel, acting on the inputs of the first map and the outputs of the last; "none".
        gradient_reference: "chunk", gradients at the chunk's start; "token", at the weights before
            the token (matrix memories with squared error only), where C is a tiling choice.
        momentum: whether updates accumulate in a momentum.
        orthogonal: Newton-Schulz on each update (update="chunk" only); see `newton_schulz` for what
            True and "scheduled" are.
        outer_lr: multiply each update by the chunk's mean inner learning rate, after Newton-Schulz.
        window: c, tokens whose loss each step reduces.
        read_before: read the weights of the chunk's start rather than those after the token's
            own write.
    """

    memory: MemoryNetwork = field(default_factory=MLP)
    objective: Objective = field(default_factory=SquaredError)
    boundary: Boundary = field(default_factory=Boundary)
    chunk: int = 16
    update: Update = "token"
    decay: Decay = "head"
    gradient_reference: GradientReference = "chunk"
    momentum: bool = True
    orthogonal: Orthogonal = False
    outer_lr: bool = False
    window: int = 1
    read_before: bool = False

    def __post_init__(self) -> None:
        """Checks that the choices go together.

        Raises:
            ValueError: names the first that does not, and what it needs.
        """
        require_choice(get_args(Update), update=self.update)
        require_choice(get_args(Decay), decay=self.decay)
        require_choice(get_args(GradientReference), gradient_reference=self.gradient_reference)
        require_choice((True, False, "scheduled"), orthogonal=self.orthogonal)
        for wrong, message in self._conflicts():
            if wrong:
                raise ValueError(message)

    def _conflicts(self) -> list[tuple[bool, str]]:
        exact, chunkwise = self.gradient_reference == "token", self.update == "chunk"
        plain = self.memory.matrix and isinstance(self.objective, SquaredError)
        simple = self.update == "token" and self.window == 1 and not self.read_before
        linear = chunkwise or self.read_before or self.boundary.linear_inside
        unit = isinstance(self.boundary, UnitSlots) == isinstance(self.memory, Slots)
        mean, many = self.update == "average", self.window > 1
        squared = isinstance(self.objective, SquaredError)
        encoding = isinstance(self.memory, Slots) and self.memory.form != "decode"
        foldable = isinstance(self.memory, MLP) and self.memory.depth < 3 and not self.memory.bias
        foldable &= self.update == "token" and not (exact or self.momentum or many)
        return [
            (self.chunk < 1, f"chunk must be 1 or more, got {self.chunk}"),
            (self.window < 1, f"window must be 1 or more, got {self.window}"),
            (
                exact and not plain,
                "gradient_reference='token' needs a matrix memory and the squared error",
            ),
            (
                exact and not (simple and type(self.boundary) is Boundary),
                "gradient_reference='token' needs update='token', window 1, reads after the "
                "write and no map at the boundary",
            ),
            (chunkwise and not self.read_before, "update='chunk' needs reads before the write"),
            (bool(self.orthogonal) and not chunkwise, "orthogonal updates need update='chunk'"),
            (self.outer_lr and not chunkwise, "an outer step needs update='chunk'"),
            (not linear, f"{type(self.boundary).__name__} needs reads before the write"),
            (not unit, "slot memories and UnitSlots need each other"),
            (mean and self.momentum, "update='average' has no momentum"),
            (mean and many, "update='average' has no window"),
            (
                mean and self.decay != "none",
                "update='average' needs decay='none': it forgets nothing",
            ),
            (
                mean and isinstance(self.boundary, LqNorm),
                "update='average' and LqNorm do not go together: the sum of steps has no norm",
            ),
            (
                self.decay == "channel" and not foldable,
                "decay='channel' needs an MLP of depth 1 or 2 without biases, update='token', "
                "gradient_reference='chunk', no momentum and no window",
            ),
            (
                many and self.objective.needs_delta,
                f"{type(self.objective).__name__} has one delta a token and needs window=1",
            ),
            (
                encoding and not squared,
                "slots that encode or compare have an objective of their own: leave SquaredError",
            ),
            (
                many and isinstance(self.memory, MLP) and self.memory.bias,
                "a window needs a memory without biases, as tokens before the first are zeros",
            ),
        ]

    @property
    def keeps_reference(self) -> bool:
        """Whether the weights of the chunk's start are kept beside those of the last token."""
        return self.update == "token" and self.gradient_reference == "chunk"

    @property
    def keeps_pending(self) -> bool:
        """Whether the chunk's steps are summed up beside the weights."""
        return self.update != "token"

    def start(self, weights: tuple[Tensor, ...]) -> FastWeights:
        """The state before the first token, from initial weights `[B, H, in, out]` per map."""
        first = tuple(self.boundary.start(w) for w in weights)
        zeros = tuple(torch.zeros_like(w) for w in first)
        batch, heads = first[0].shape[:2]
        chunkwise = self.update == "chunk"
        widths = first[0].shape[-2], first[-1].shape[-1]
        return FastWeights(
            weights=first,
            reference=first if self.keeps_reference else (),
            momentum=zeros if self.momentum else (),
            pending=zeros if self.keeps_pending else (),
            sums=(first[0].new_zeros(batch, heads, 3),) if chunkwise else (),
            recent=tuple(first[0].new_empty(batch, 0, heads, d) for d in widths if self.window > 1),
            offset=first[0].new_empty(batch, 0, 0),
        )
