"""What a test-time memory is: the fixed choices, the gates of each token, and the state.

Shapes: B batch, T time, H heads, K key width, V value width, C chunk.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.test_time.boundary import Boundary, LqNorm, Orthogonal, UnitSlots
from mneme.ops.test_time.choices import require_one_of
from mneme.ops.test_time.memories import MLP, MemoryNetwork, Slots
from mneme.ops.test_time.objectives import Objective, SquaredError


class Gates(NamedTuple):
    """What a token decides about the update it makes; `None` where the rule has no such gate.

    Attributes:
        step: theta, `[B, T, H, 1]`, or one per linear map of the memory, `[B, T, H, L]`, if the
            rule steps once a chunk.
        log_keep: log(1 - alpha), `[B, T, H, 1]` or per channel `[B, T, H, V]`.
        log_momentum: log(eta), `[B, T, H]`.
        window: weights gamma of the last c tokens' losses, newest first, `[B, T, H, c]`.
        delta: the Huber objective's delta, `[B, T, H, 1]`.
    """

    step: Float[Tensor, "B T H L"]
    log_keep: Float[Tensor, "B T H N"] | None = None
    log_momentum: Float[Tensor, "B T H"] | None = None
    window: Float[Tensor, "B T H c"] | None = None
    delta: Float[Tensor, "B T H 1"] | None = None


class Slow(NamedTuple):
    """Slow weights that the recurrence uses: learned outside, the same for all tokens.

    Attributes:
        gain, bias: of the layer norm on the memory's output, `[H, V]`.
        norms: what `RowNorm` restores, one `[H, 1, out]` per linear map.
        position: factors `w_1 .. w_C` of the averaged update, `[C]`.
    """

    gain: Float[Tensor, "H V"] | None = None
    bias: Float[Tensor, "H V"] | None = None
    norms: tuple[Tensor, ...] | None = None
    position: Float[Tensor, " C"] | None = None


class FastWeights(NamedTuple):
    """The state: fp32 (fp64 for fp64 inputs), one tensor per linear map of the memory.

    Attributes:
        weights: `[B, H, in, out]`, where the tokens so far have brought them.
        reference: the weights at the chunk's start, where gradients are taken; empty if the rule
            needs no copy of them.
        momentum: `[B, H, in, out]`; empty without momentum.
        pending: sum of this chunk's steps, for rules that apply it at the chunk's end.
        sums: `[B, H, 3]`, sums over this chunk of log keep, momentum and step, for the same.
        recent: keys and values `[B, c - 1, H, .]` of the last tokens, fewer at the start; empty
            without a window.
        offset: `[B, p, 0]`, p tokens since the chunk's start. A shape rather than a number: it
            decides control flow, and reading a number would wait for the device.
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
        outer_lr: multiply each update by the chunk's mean step, after Newton-Schulz.
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
        require_one_of(get_args(Update), update=self.update)
        require_one_of(get_args(Decay), decay=self.decay)
        require_one_of(get_args(GradientReference), gradient_reference=self.gradient_reference)
        require_one_of((True, False, "scheduled"), orthogonal=self.orthogonal)
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
