"""`product_key_memory.PKM` as `mneme.layers.ProductKeyMemory`."""

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def pkm_options(
    *,
    dim: int,
    heads: int = 4,
    num_keys: int = 128,
    topk: int = 32,
    dim_head: int = 128,
    use_layernorm: bool = True,
    pre_layernorm: bool = False,
    concat_values_and_combine: bool = False,
    norm_output: bool = False,
    non_competitive_gates: bool = False,
) -> dict[str, Any]:
    """Arguments of `mneme.layers.ProductKeyMemory(dim, ...)` from those of `PKM(dim, ...)`.

    With `pre_layernorm`, our layer is to be given `layer_norm(x)` without gain and bias, which
    `pkm_weights` folds into the queries.

    Raises:
        ValueError: batch norm or concatenated rows, with which PKM 0.3.0 fails and leaves out the
            scores, or a norm of the output, which is another layer to us.
    """
    if not use_layernorm or concat_values_and_combine or norm_output:
        raise ValueError(
            "use_layernorm must be true, concat_values_and_combine and norm_output false"
        )
    return {
        "heads": heads,
        "top_k": topk,
        "sub_keys": num_keys,
        "key_dim": 2 * dim_head,
        "query_norm": "layer",
        "scores": "relu" if non_competitive_gates else "softmax",
        "gate": "none",
    }


def pkm_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `mneme.layers.ProductKeyMemory` from that of a `PKM`."""
    heads = len(state["keys"])
    queries = rearrange(state["to_queries.weight"], "(p h d) i -> (h p d) i", p=2, h=heads)
    bias = queries.new_zeros(len(queries))
    if "pre_layernorm.weight" in state:
        bias = F.linear(state["pre_layernorm.bias"], queries)
        queries = queries * state["pre_layernorm.weight"]
    return {
        "keys.query_proj.weight": queries,
        "keys.query_proj.bias": bias,
        "keys.norm.norm.weight": state["norm.weight"],
        "keys.norm.norm.bias": state["norm.bias"],
        "keys.keys": rearrange(state["keys"], "h n p d -> h p n d"),
        "values.weight": state["values.weight"],
    }
