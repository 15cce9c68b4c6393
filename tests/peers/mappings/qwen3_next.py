"""The Gated DeltaNet of Qwen3-Next in transformers (5.23.0)."""

from typing import Any

import torch
from torch import Tensor

from tests.peers.mappings.requirements import require


def gated_delta_net_options(config: Any) -> dict[str, Any]:
    """Arguments of `mneme.layers.GatedDeltaNet` from a `transformers.Qwen3NextConfig`.

    Raises:
        ValueError: an activation other than SiLU.
    """
    require(config, "GatedDeltaNet", hidden_act=("silu", "swish"))
    return {
        "heads": config.linear_num_value_heads,
        "key_heads": config.linear_num_key_heads,
        "head_dim": config.linear_key_head_dim,
        "expand_v": config.linear_value_head_dim / config.linear_key_head_dim,
        "conv_size": config.linear_conv_kernel_dim,
        "norm_eps": config.rms_norm_eps,
    }


def gated_delta_net_weights(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """State dict of `mneme.layers.GatedDeltaNet` from that of a `Qwen3NextGatedDeltaNet`.

    The peer's maps go by key head: q, k, then v and z of the value heads that read it; b and a of
    these. Ours go by kind, over all heads: q, k, v, a, b, and z is a map of its own.
    """
    groups, key_dim = config.linear_num_key_heads, config.linear_key_head_dim
    heads = config.linear_num_value_heads // groups
    values = heads * config.linear_value_head_dim
    q, k, v, z = _by_kind(state["in_proj_qkvz.weight"], groups, [key_dim, key_dim, values, values])
    b, a = _by_kind(state["in_proj_ba.weight"], groups, [heads, heads])
    return {
        "in_proj.weight": torch.cat([q, k, v, a, b]),
        "conv.weight": state["conv1d.weight"][:, 0],
        "decay.A_log": state["A_log"],
        "decay.dt_bias": state["dt_bias"],
        "norm.weight": state["norm.weight"],
        "gate_proj.weight": z,
        "out_proj.weight": state["out_proj.weight"],
    }


def _by_kind(weight: Tensor, groups: int, sizes: list[int]) -> list[Tensor]:
    """Rows that go by group, then by kind, as one matrix for each kind."""
    parts = weight.unflatten(0, (groups, -1)).split(sizes, dim=1)
    return [part.flatten(0, 1) for part in parts]
