"""mambapy's Mamba block (1.2.0)."""

from typing import Any

from torch import Tensor

from tests.peers.mappings.requirements import require


def mamba_options(config: Any) -> dict[str, Any]:
    """Arguments of `mneme.layers.Mamba` from a `mambapy.mamba.MambaConfig`.

    Raises:
        ValueError: norms of the steps, B and C (Jamba), which ours has not.
    """
    require(config, "Mamba", inner_layernorms=(False,))
    return {
        "expand": config.expand_factor,
        "state_dim": config.d_state,
        "conv_size": config.d_conv,
        "step_rank": config.dt_rank,
        "bias": config.bias,
        "conv_bias": config.conv_bias,
    }


def mamba_weights(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """State dict of `mneme.layers.Mamba` from that of a `mambapy.mamba.MambaBlock`."""
    weights = {
        "in_proj.weight": state["in_proj.weight"],
        "conv.weight": state["conv1d.weight"][:, 0],
        "select_proj.weight": state["x_proj.weight"],
        "step_proj.weight": state["dt_proj.weight"],
        "dt_bias": state["dt_proj.bias"],
        "A_log": state["A_log"],
        "D": state["D"],
        "out_proj.weight": state["out_proj.weight"],
    }
    if config.bias:
        weights |= {name: state[name] for name in ("in_proj.bias", "out_proj.bias")}
    if config.conv_bias:
        weights["conv.bias"] = state["conv1d.bias"]
    return weights
