"""A matrix memory with one decay per head: linear attention, RetNet's retention, Mamba-2."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import carries
from mneme.ops.registry import Op
from mneme.ops.scalar_decay.chunk import check_chunk_size, scalar_decay_chunk
from mneme.ops.scalar_decay.naive import scalar_decay_naive

__all__ = ["OP", "scalar_decay", "scalar_decay_chunk", "scalar_decay_naive"]

_RECURRENT_UP_TO = 2  # tokens; one step costs a few small products, a chunk some thirty calls


@carries("q", "k", "v", "g")
def scalar_decay(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"] | None,
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute the memory with scalar decay in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `scalar_decay_naive`, more through
    `scalar_decay_chunk`; both compute the same function, to rounding. Arguments and results are
    those of the chunked form; a chunk is never longer than the sequence.
    """
    check_chunk_size(chunk_size)
    tokens = k.shape[1]
    if tokens <= _RECURRENT_UP_TO:
        return scalar_decay_naive(q, k, v, g, state, scale=scale)
    chunk_size = min(chunk_size, tokens)
    return scalar_decay_chunk(q, k, v, g, state, scale=scale, chunk_size=chunk_size)


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

    In "grouped", pairs of heads share their queries and keys.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    groups = heads // 2 if regime == "grouped" else heads
    random = torch.rand(batch, length, heads, generator=generator, dtype=torch.float64)
    mild = -0.2 * random
    decays = {
        "no_decay": None,
        "strong_decay": torch.full_like(random, -20.0),
        "mixed_decay": (-4.0 * random) ** 3,
    }
    tensors = {
        "q": unit(batch, length, groups, key),
        "k": unit(batch, length, groups, key),
        "v": normal(batch, length, heads, value),
        "g": decays.get(regime, mild),
    }
    state = normal(batch, heads, key, value).to(torch.promote_types(dtype, torch.float32))
    cast = {name: x if x is None else x.to(dtype) for name, x in tensors.items()}
    return {**cast, "state": state}


def _flops(inputs: dict[str, Any], chunk: int = 64) -> float:
    """Operations of the forward pass: 2 C (G K + H V) + 4 H K V a token."""
    batch, tokens, groups, key = inputs["k"].shape
    heads, value = inputs["v"].shape[2:]
    token = 2 * chunk * (groups * key + heads * value) + 4 * heads * key * value
    return batch * tokens * token


OP = Op(
    name="scalar_decay",
    naive=scalar_decay_naive,
    forms={"chunk": scalar_decay_chunk, "auto": scalar_decay},
    inputs=_inputs,
    regimes=("typical", "no_decay", "strong_decay", "mixed_decay", "grouped"),
    odd_sizes={"heads": 6, "key": 12, "value": 20},
    flops=_flops,
    timed=("q", "k", "v", "g"),
)
