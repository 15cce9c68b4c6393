"""The gated delta rule: a matrix memory that decays and corrects what it stores under each key."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import carries
from mneme.ops.gated_delta.chunk import check_chunk_size, gated_delta_chunk
from mneme.ops.gated_delta.naive import gated_delta_naive
from mneme.ops.registry import Op

__all__ = [
    "OP",
    "RECURRENT_UP_TO",
    "check_chunk_size",
    "gated_delta",
    "gated_delta_chunk",
    "gated_delta_naive",
]

RECURRENT_UP_TO = 2  # tokens; one step costs a few small products, a chunk some sixty calls


@carries("q", "k", "v", "g", "beta")
def gated_delta(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"] | None,
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute the gated delta rule in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `gated_delta_naive`, more through `gated_delta_chunk`;
    both compute the same function, to rounding. Arguments and results are those of the chunked
    form; a prompt shorter than a chunk is worked in the smallest power of two that holds it.
    """
    check_chunk_size(chunk_size)
    tokens = k.shape[1]
    if tokens <= RECURRENT_UP_TO:
        return gated_delta_naive(q, k, v, g, beta, state, scale=scale)
    while chunk_size >= 2 * tokens and chunk_size > 4:
        chunk_size //= 2
    return gated_delta_chunk(q, k, v, g, beta, state, scale=scale, chunk_size=chunk_size)


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
    """Unit keys and queries, normal values, a random start state, and the gates of a regime."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        unit = torch.rand(batch, length, heads, generator=generator, dtype=torch.float64)
        return low + (high - low) * unit

    gates = {
        "typical": (uniform(-0.2, 0.0), uniform(0.0, 1.0)),
        "no_decay": (uniform(0.0, 0.0), uniform(0.0, 1.0)),
        "strong_decay": (uniform(-20.0, -20.0), uniform(0.0, 1.0)),
        "mixed_decay": (uniform(-4.0, 0.0) ** 3, uniform(0.0, 1.0)),
        "beta_zero": (uniform(-0.2, 0.0), uniform(0.0, 0.0)),
        "beta_one": (uniform(-0.2, 0.0), uniform(1.0, 1.0)),
        "beta_two": (uniform(-0.2, 0.0), uniform(2.0, 2.0)),
    }
    g, beta = gates[regime]
    tensors = {
        "q": torch.nn.functional.normalize(normal(batch, length, heads, key), dim=-1),
        "k": torch.nn.functional.normalize(normal(batch, length, heads, key), dim=-1),
        "v": normal(batch, length, heads, value),
        "g": g,
        "beta": beta,
    }
    state_dtype = torch.promote_types(dtype, torch.float32)
    state = normal(batch, heads, key, value).to(state_dtype)
    return {name: x.to(dtype) for name, x in tensors.items()} | {"state": state}


def _flops(inputs: dict[str, Any], chunk: int = 64) -> float:
    """Operations of the forward pass: H [2 C K + C^2 / 3 + 4 C (K + V) + 6 K V] a token."""
    batch, tokens, heads, key = inputs["k"].shape
    value = inputs["v"].shape[-1]
    token = 2 * chunk * key + chunk**2 / 3 + 4 * chunk * (key + value) + 6 * key * value
    return batch * tokens * heads * token


OP = Op(
    name="gated_delta",
    naive=gated_delta_naive,
    forms={"chunk": gated_delta_chunk, "auto": gated_delta},
    inputs=_inputs,
    regimes=(
        "typical",
        "no_decay",
        "strong_decay",
        "mixed_decay",
        "beta_zero",
        "beta_one",
        "beta_two",
    ),
    odd_sizes={"heads": 3, "key": 12, "value": 20},
    flops=_flops,
    timed=("q", "k", "v", "g", "beta"),
)
