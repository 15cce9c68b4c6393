"""Rotary position embedding (arXiv 2104.09864)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mneme.layers.protocol import require_at_least


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies slowed down, so that a model reads texts longer than it was trained on.

    Args:
        factor: by which frequencies are divided, 1 or more.
        trained_length: tokens of the texts that the unscaled model was trained on. None (default):
            all frequencies are divided, as if positions were (arXiv 2306.15595). With a number, as
            in Llama 3.1, frequencies that turn more than `high_turns` times in such a text are
            kept, those that turn less than `low_turns` times are divided, and between them is a
            mixture, linear in the number of turns.
        low_turns: default 1.
        high_turns: default 4.

    Raises:
        ValueError: a factor below 1, a length below 1, or turns out of order.
    """

    factor: float
    trained_length: int | None = None
    low_turns: float = 1.0
    high_turns: float = 4.0

    def __post_init__(self) -> None:
        """Raises ValueError for options out of range."""
        length = 1 if self.trained_length is None else self.trained_length
        require_at_least(1, factor=self.factor, trained_length=length)
        if not 0 <= self.low_turns < self.high_turns:
            turns = f"low_turns ({self.low_turns}) and high_turns ({self.high_turns})"
            raise ValueError(f"{turns} must be 0 or more, and the first the smaller")

    def __call__(self, frequencies: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The slower frequencies, in radians a token as those that are given."""
        if self.trained_length is None:
            return frequencies / self.factor
        turns = frequencies * self.trained_length / (2 * math.pi)
        kept = (turns - self.low_turns) / (self.high_turns - self.low_turns)
        kept = kept.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotate(
    *xs: Float[Tensor, "b t _ d"],
    positions: Int[Tensor, "#b t"],
    base: float,
    scaling: RopeScaling | None = None,
) -> list[Float[Tensor, "b t _ d"]]:
    """Turns each pair `(x_i, x_{i + d/2})` by the angle `position * base**(-2 i / d)`.

    The inner product of two rotated vectors depends on the difference of their positions alone.
    Angles are formed in fp32 (fp64 for fp64 inputs), whatever the precision of the inputs.

    Args:
        *xs: queries and keys, of any number of heads; `d` must be even.
        positions: absolute positions, one row for all sequences or a row each.
        base: wavelength base; larger turns more slowly.
        scaling: of the frequencies `base**(-2 i / d)`; default None, as they are.
    """
    half = xs[0].shape[-1] // 2
    dtype = torch.promote_types(xs[0].dtype, torch.float32)
    exponents = torch.arange(half, device=xs[0].device, dtype=dtype) / half
    frequencies = base**-exponents
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = positions[..., None, None].to(dtype) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return [_turn(x, cos, sin) for x in xs]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
