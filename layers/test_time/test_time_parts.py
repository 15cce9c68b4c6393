"""The parts of a test-time memory that belong to a layer: features, forget gate, learner.

Each is a plain description, so that a config can name it; the layer makes the parameters.
"""

from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.protocol import require_at_least, require_choice
from mneme.ops.contract import kept
from mneme.ops.test_time import MLP, Boundary, MemoryNetwork, Orthogonal

DEEP_STEP = 0.002  # with maps between hidden layers: 0.01 and more is chaotic at initialization
NORMALIZED_STEP = 0.5  # of 1/16, 0.25, 0.5 and 1 the largest at which MQAR is learnt fastest
MAX_CHUNK_DECAY = 30.0  # nats a channel may lose in a chunk: the inverse's square must fit fp32


@dataclass(frozen=True)
class Features:
    """How queries, keys and values are made of a token: projection, convolution, SiLU, norm.

    Args:
        conv_size: taps of the short causal convolution over q, k and v; default 4. With 1 it is a
            learned scale of each channel.
        affine: a learned scale and offset of each channel of q and k before SiLU, one and zero at
            the start (LaCT, arXiv 2505.23884); default False.
        silu: SiLU on q, k and v after the convolution; default True.
        normalize: give q and k norm one; default True. Steps are bounded for such keys.
        rope: rotary positions of q and k: None (default), "sequence", or "chunk", the position
            within the chunk (TTT, arXiv 2407.04620).
        rope_base: base of the rotary wavelengths; default 10000.
        degree: highest degree of the monomials that replace q and k, with learned coefficients that
            start at 1 / i! (Atlas, arXiv 2505.23735); default 1, q and k themselves.
    """

    conv_size: int = 4
    affine: bool = False
    silu: bool = True
    normalize: bool = True
    rope: Literal["sequence", "chunk"] | None = None
    rope_base: float = 10_000.0
    degree: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for sizes below one and an unknown `rope`."""
        require_at_least(1, conv_size=self.conv_size, degree=self.degree)
        require_choice((None, "sequence", "chunk"), rope=self.rope)

    def width(self, key: int) -> int:
        """Features of a key of that width."""
        return key if self.degree == 1 else len(_monomials(key, self.degree))


@dataclass(frozen=True)
class ForgetGate:
    """How a memory forgets.

    Args:
        gate: "head" (default): alpha_t = sigmoid(w . x_t + b) per head, `W <- (1 - alpha_t) W`;
            "channel": one per value channel, from a map of rank 32, acting on the inputs of the
            first linear layer and the outputs of the last; at most 30 / chunk_size nats a token, as
            their inverses must be finite; "none".
        bias: b; default -7, which forgets 0.1 % a token to begin with.
        boundary: map of the weights where chunks meet; default none.
    """

    gate: Literal["none", "head", "channel"] = "head"
    bias: float = -7.0
    boundary: Boundary = field(default_factory=Boundary)


@dataclass(frozen=True)
class Learner:
    """How a memory learns: theta_t = max_inner_lr sigmoid(w . x_t + b), and what becomes of it.

    Args:
        max_inner_lr: of a token; default None: 0.5 for a memory that ends in a layer norm,
            which bounds what any step can do (0.002 from depth 3 on); 1 where errors are taken
            token by token; else 1 / chunk_size, with which no chunk of unit keys overshoots in a
            linear memory without momentum (momentum eta multiplies steps by up to 1 / (1 - eta)).
        inner_lr_bias: b; default 0.
        inner_lr_per_weight: one for each weight of the memory (update="chunk" only); default
            False.
        momentum: eta_t = sigmoid(w . x_t + b) per head; default True.
        momentum_bias: its b; default 0.
        update: "token" (default), "average" or "chunk"; see `mneme.ops.test_time.Rule`.
        gradient_reference: "chunk" (default) or "token": where gradients are taken.
        window: c, tokens whose loss each step reduces, weighted by learned gates; default 1.
        orthogonal: Newton-Schulz on each update (update="chunk" only): True, with Muon's
            coefficients; "scheduled", with LaCT's, which differ from step to step; default False.
        outer_lr: multiply the update by the chunk's mean inner learning rate, after that; default
            False.
    """

    max_inner_lr: float | None = None
    inner_lr_bias: float = 0.0
    inner_lr_per_weight: bool = False
    momentum: bool = True
    momentum_bias: float = 0.0
    update: Literal["token", "average", "chunk"] = "token"
    gradient_reference: Literal["chunk", "token"] = "chunk"
    window: int = 1
    orthogonal: Orthogonal = False
    outer_lr: bool = False

    def __post_init__(self) -> None:
        """Checks the choices that concern the learner alone."""
        if self.max_inner_lr is not None and self.max_inner_lr < 0:
            raise ValueError(f"max_inner_lr must be 0 or more, got {self.max_inner_lr}")
        if self.inner_lr_per_weight and (self.update != "chunk" or self.window > 1):
            raise ValueError("inner_lr_per_weight needs update='chunk' and window=1")

    def largest_inner_lr(self, chunk_size: int, memory: MemoryNetwork) -> float:
        """`max_inner_lr`, or its default for a memory."""
        if self.max_inner_lr is not None:
            return self.max_inner_lr
        if self.gradient_reference == "token":
            return 1.0
        if not memory.norm:
            return 1.0 / chunk_size
        deep = isinstance(memory, MLP) and memory.depth > 2
        return DEEP_STEP if deep else NORMALIZED_STEP


@dataclass(frozen=True)
class Readout:
    """What becomes of what a token reads, before the output projection.

    Args:
        norm: "head" (default): RMSNorm of each head, with weights that all heads share; "model":
            LayerNorm of all heads together, with a weight and a bias per channel (TTT, arXiv
            2407.04620).
        gate: multiply by `silu(W_g x)`; default True.
    """

    norm: Literal["head", "model"] = "head"
    gate: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown norm."""
        require_choice(("head", "model"), norm=self.norm)


def _monomials(width: int, degree: int) -> list[tuple[int, ...]]:
    """Index tuples of all monomials up to a degree, the constant first."""
    by_degree = (combinations_with_replacement(range(width), i) for i in range(degree + 1))
    return [indices for group in by_degree for indices in group]


class PolynomialFeatures(nn.Module):
    """`phi(q) . phi(k) = sum_{i <= p} a_i (q . k)^i`, with learned a_i >= 0 that start at 1 / i!.

    The features are all monomials up to degree p, each scaled by the root of its multinomial
    coefficient and of a_i (arXiv 2505.23735). Their number grows like width^p / p!.

    Args:
        width: of q and k.
        degree: p.
    """

    def __init__(self, width: int, degree: int) -> None:
        super().__init__()
        monomials = _monomials(width, degree)
        # Tuples, no buffers: made without memory (`torch.device("meta")`), those have no values.
        self.elements = tuple((*m, *[width] * (degree - len(m))) for m in monomials)  # then ones
        self.multinomials = tuple(
            factorial(len(m)) / prod(factorial(m.count(i)) for i in set(m)) for m in monomials
        )
        self.degrees = tuple(len(m) for m in monomials)
        start = torch.tensor([factorial(i) ** -0.5 for i in range(degree + 1)])
        self.coefficients = nn.Parameter(start)  # roots of a_i

    def forward(self, x: Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h f"]:
        """All monomials of each vector of K elements, `[B, T, H, F]`."""
        device = x.device
        (index,) = _table(self.elements, torch.long, device)
        (multinomial,) = _table(self.multinomials, x.dtype, device)
        (order,) = _table(self.degrees, torch.long, device)
        with_one = nn.functional.pad(x, (0, 1), value=1.0)
        scale = multinomial.sqrt() * self.coefficients.to(x.dtype)[order]
        return with_one[..., index].prod(-1) * scale


@kept
def _table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """A tuple as a tensor."""
    return (torch.tensor(values, dtype=dtype, device=device),)
