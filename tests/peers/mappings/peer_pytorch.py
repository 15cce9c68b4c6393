"""`PEER_pytorch.PEER` as `mneme.layers.PEER`."""

import math
from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor, nn

_ACTIVATIONS = {nn.GELU: "gelu", nn.ReLU: "relu", nn.Identity: "identity"}


def peer_options(
    *,
    dim: int,
    heads: int = 8,
    num_experts: int = 1_000_000,
    num_experts_per_head: int = 16,
    activation: type[nn.Module] = nn.GELU,
    dim_key: int | None = None,
    product_key_topk: int | None = None,
    separate_embed_per_head: bool = False,
    pre_rmsnorm: bool = False,
    non_competing_scores: bool = True,
) -> dict[str, Any]:
    """Arguments of `mneme.layers.PEER(dim, ...)` from those of `PEER_pytorch.PEER(dim, ...)`.

    By default it uses one expert a head, weighted by the relu of its score, whatever
    `num_experts_per_head` is. With `pre_rmsnorm`, our layer is to be given
    `normalize(x) * dim**0.5` without gain, which `peer_weights` folds into what reads it.

    Raises:
        ValueError: another activation, several heads with experts of their own, or a search through
            too few sub-keys to be sure of the best sums.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be GELU, ReLU or Identity, got {activation.__name__}")
    if separate_embed_per_head and heads > 1:
        raise ValueError("separate_embed_per_head must be false: our heads share the experts")
    top_k = 1 if non_competing_scores else num_experts_per_head
    searched = num_experts_per_head if product_key_topk is None else product_key_topk
    if searched < top_k:
        raise ValueError(f"product_key_topk must be {top_k} or more, got {searched}")
    return {
        "heads": heads,
        "top_k": top_k,
        "sub_keys": math.isqrt(num_experts),
        "key_dim": 2 * (dim // 2 if dim_key is None else dim_key),
        "query_norm": "none",
        "shared_keys": False,
        "scores": "relu" if non_competing_scores else "softmax",
        "activation": _ACTIVATIONS[activation],
    }


def peer_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `mneme.layers.PEER` from that of a `PEER_pytorch.PEER`."""
    heads = len(state["keys"])
    queries = rearrange(state["to_queries.0.weight"], "(p h d) i -> (h p d) i", p=2, h=heads)
    down = state["weight_down_embed.weight"]
    if "norm.gamma" in state:
        gain = 1 + state["norm.gamma"]
        queries, down = queries * gain, down * gain
    return {
        "keys.query_proj.weight": queries,
        "keys.query_proj.bias": queries.new_zeros(len(queries)),
        "keys.keys": rearrange(state["keys"], "h n p d -> h p n d"),
        "down.weight": down,
        "up.weight": state["weight_up_embed.weight"],
    }
