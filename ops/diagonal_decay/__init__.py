"""A matrix memory with one decay per key channel: gated linear attention."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import carries
from mneme.ops.diagonal_decay.chunk import check_chunk_size, diagonal_decay_chunk
from mneme.ops.diagonal_decay.naive import diagonal_decay_naive
from mneme.ops.registry import Op

__all__ = ["OP", "diagonal_decay", "diagonal_decay_chunk", "diagonal_decay_naive"]

_RECURRENT_UP_TO = 4  # tokens; a step costs a few small products, a chunk over a hundred calls


@carries("q", "k", "v", "g")
def diagonal_decay(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 32,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute the memory with decays per channel in the form cheapest for the length given.

    Up to four tokens (decoding) go through `diagonal_decay_naive`, more through
    `diagonal_decay_chunk`; both compute the same function, to rounding. Arguments and results are
    those of the chunked form; a prompt shorter than a chunk is worked in the smallest power of two
    that holds it.
    """
    check_chunk_size(chunk_size)
    tokens = k.shape[1]
    if tokens <= _RECURRENT_UP_TO:
        return diagonal_decay_naive(q, k, v, g, state, scale=scale)
    while chunk_size >= 2 * tokens:
        chunk_size //= 2
    return diagonal_decay_chunk(q, k, v, g, state, scale=scale, chunk_size=chunk_size)


def _inputs(
    generator: torch.Generator,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    regime: str = "typical",
    heads: int = 4,
    key: int = 64,
    value: int = 64,
) -> dict[str, Any]:
    """Unit keys and queries, normal values, a random start state, and the decays of a regime.

    In "typical", decays are those of a gated linear attention layer before training. In
    "mixed_decay", channels that keep and channels that forget at once stand side by side, and
    change roles from token to token.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    random = torch.rand(batch, length, heads, key, generator=generator, dtype=torch.float64)
    decays = {
        "typical": torch.nn.functional.logsigmoid(normal(*random.shape)) / 16,
        "no_decay": torch.zeros_like(random),
        "strong_decay": torch.full_like(random, -20.0),
        "mixed_decay": -20.0 * random**8,
    }
    tensors = {
        "q": unit(batch, length, heads, key),
        "k": unit(batch, length, heads, key),
        "v": normal(batch, length, heads, value),
        "g": decays[regime],
    }
    state = normal(batch, heads, key, value).to(torch.promote_types(dtype, torch.float32))
    return {name: x.to(dtype) for name, x in tensors.items()} | {"state": state}


def _flops(inputs: dict[str, Any], chunk: int = 32) -> float:
    """Operations of the forward pass: H [2 C (K + V) + 4 K V] a token."""
    batch, tokens, heads, key = inputs["k"].shape
    value = inputs["v"].shape[-1]
    return float(batch * tokens * heads * (2 * chunk * (key + value) + 4 * key * value))


OP = Op(
    name="diagonal_decay",
    naive=diagonal_decay_naive,
    forms={"chunk": diagonal_decay_chunk, "auto": diagonal_decay},
    inputs=_inputs,
    regimes=("typical", "no_decay", "strong_decay", "mixed_decay"),
    odd_sizes={"heads": 3, "key": 12, "value": 20},
    flops=_flops,
    timed=("q", "k", "v", "g"),
)
