"""What a block of a memory bank is made of, and what a layer does with it.

B sequences, T tokens, D width, F hidden width of the base model, R units of a fetched path, W
elements of a unit. A unit is a hidden unit of a feed-forward, a rank of LoRA or a slot of keys and
values; blocks of several levels are one block with the units of all.
"""

from collections.abc import Callable
from math import gcd
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["ffn", "lora", "kv"]
Activation = Callable[[Tensor], Tensor]

LORA_SCALE = 2.0  # alpha of arXiv 2510.02375
_HEAD_DIM = 32  # of slots of keys and values, or the largest divisor of both it and D


def unit_width(kind: Kind, d_model: int, hidden: int) -> int:
    """W: elements of one unit in one layer.

    Args:
        kind: of the block.
        d_model: D.
        hidden: F, which only "lora" adapts.
    """
    return {"ffn": 3 * d_model, "lora": 3 * (d_model + hidden), "kv": 2 * d_model}[kind]


def init_units(units: Float[Tensor, "n w"], kind: Kind, d_model: int) -> None:
    """The start of blocks: what reads is random and the readout zero, so that they add nothing.

    Random parts have the deviation 1 / sqrt(3 fan_in) that a linear layer starts with: truncated
    normal, or uniform for LoRA (Kaiming's), as in arXiv 2510.02375.

    Args:
        units: overwritten.
        kind: of the blocks.
        d_model: D.
    """
    units.zero_()
    if kind == "lora":
        hidden = units.shape[1] // 3 - d_model
        first, _, second, _ = units.split(_lora_parts(d_model, hidden), dim=1)
        for part, inputs in ((first, d_model), (second, hidden)):
            nn.init.uniform_(part, -(inputs**-0.5), inputs**-0.5)
        return
    std = (3 * d_model) ** -0.5
    read = units[:, : 2 * d_model] if kind == "ffn" else units[:, :d_model]
    nn.init.trunc_normal_(read, std=std, a=-2 * std, b=2 * std)


def feed_forward_block(
    x: Float[Tensor, "b t d"], block: Float[Tensor, "b r w"], activation: Activation = F.silu
) -> Float[Tensor, "b t d"]:
    """`M3 (silu(M1 x) * (M2 x))`: what R more hidden units add to a gated feed-forward.

    As the gated unit is elementwise in the hidden index, this is the feed-forward widened by the
    block. A unit is its row of M1, its row of M2 and its column of M3.
    """
    gate, value, out = block.chunk(3, dim=-1)
    return (activation(x @ gate.mT) * (x @ value.mT)) @ out


def key_value_block(
    x: Float[Tensor, "b t d"], block: Float[Tensor, "b r w"]
) -> Float[Tensor, "b t d"]:
    """Attention of each token over R learned slots, per head, without a mask or positions."""
    heads = x.shape[-1] // gcd(x.shape[-1], _HEAD_DIM)
    key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in block.chunk(2, -1))
    query = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


def adapted_feed_forward(
    x: Float[Tensor, "b t d"],
    block: Float[Tensor, "b r w"],
    in_weight: Float[Tensor, "f2 d"],
    out_weight: Float[Tensor, "d f"],
) -> Float[Tensor, "b t d"]:
    """A gated feed-forward whose three matrices are each `W + 2 B A` with A and B of R ranks."""
    d, hidden = x.shape[-1], out_weight.shape[1]
    into, out_of_in, into_out, out = block.split(_lora_parts(d, hidden), dim=-1)
    a_gate, a_value = into.chunk(2, dim=-1)
    b_gate, b_value = out_of_in.chunk(2, dim=-1)
    change = torch.cat([(x @ a_gate.mT) @ b_gate, (x @ a_value.mT) @ b_value], dim=-1)
    gate, value = (F.linear(x, in_weight) + LORA_SCALE * change).chunk(2, dim=-1)
    h = F.silu(gate) * value
    return F.linear(h, out_weight) + LORA_SCALE * ((h @ into_out.mT) @ out)


def _lora_parts(d_model: int, hidden: int) -> list[int]:
    """Widths of A of the inner weights (two of them), their B, A of the outer weight, its B."""
    return [2 * d_model, 2 * hidden, hidden, d_model]
