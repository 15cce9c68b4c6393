"""The mixers of Mamba and Mamba-2 in transformers (5.23.0), and in checkpoints of their kind."""

from typing import Any

import torch
from torch import Tensor

from tests.peers.mappings.requirements import require

SILU = ("silu", "swish")
_SAME = ("A_log", "D", "out_proj.weight")


def mamba_options(config: Any) -> dict[str, Any]:
    """Arguments of `mneme.layers.Mamba` from a `transformers.MambaConfig`.

    Raises:
        ValueError: an activation other than SiLU.
    """
    require(config, "Mamba", hidden_act=SILU)
    return {
        "expand": config.expand,
        "state_dim": config.state_size,
        "conv_size": config.conv_kernel,
        "step_rank": config.time_step_rank,
        "conv_bias": config.use_conv_bias,
        "bias": config.use_bias,
    }


def mamba_weights(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """State dict of `mneme.layers.Mamba` from that of a `MambaMixer`."""
    weights = {name: state[name] for name in ("in_proj.weight", *_SAME)} | {
        "conv.weight": state["conv1d.weight"][:, 0],
        "select_proj.weight": state["x_proj.weight"],
        "step_proj.weight": state["dt_proj.weight"],
        "dt_bias": state["dt_proj.bias"],
    }
    if config.use_conv_bias:
        weights["conv.bias"] = state["conv1d.bias"]
    if config.use_bias:
        weights |= {name: state[name] for name in ("in_proj.bias", "out_proj.bias")}
    return weights


def mamba2_options(config: Any) -> dict[str, Any]:
    """Arguments of `mneme.layers.Mamba2` from a `transformers.Mamba2Config`.

    Raises:
        ValueError: an activation other than SiLU.
    """
    require(config, "Mamba2", hidden_act=SILU)
    return {
        "expand": config.expand,
        "head_dim": config.head_dim,
        "state_dim": config.state_size,
        "groups": config.n_groups,
        "conv_size": config.conv_kernel,
        "conv_bias": config.use_conv_bias,
        "bias": config.use_bias,
        "step_limit": tuple(config.time_step_limit),
        "norm_eps": config.layer_norm_epsilon,
        "chunk_size": config.chunk_size,
    }


def mamba2_weights(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """State dict of `mneme.layers.Mamba2` from that of a `Mamba2Mixer`.

    The peer's first map gives z, x, B, C and the steps; ours C, B, x and the steps, and z is a map
    of its own.
    """
    width, keys = config.num_heads * config.head_dim, config.n_groups * config.state_size

    def projections(kind: str) -> dict[str, Tensor]:
        z, x, b, c, step = state[f"in_proj.{kind}"].split(
            [width, width, keys, keys, config.num_heads]
        )
        return {f"in_proj.{kind}": torch.cat([c, b, x, step]), f"gate_proj.{kind}": z}

    def convolution(kind: str) -> Tensor:
        x, b, c = state[f"conv1d.{kind}"].split([width, keys, keys])
        return torch.cat([c, b, x])

    weights = {name: state[name] for name in ("D", "norm.weight", "out_proj.weight")}
    weights |= projections("weight") | {
        "conv.weight": convolution("weight")[:, 0],
        "decay.A_log": state["A_log"],
        "decay.dt_bias": state["dt_bias"],
    }
    if config.use_conv_bias:
        weights["conv.bias"] = convolution("bias")
    if config.use_bias:
        weights |= projections("bias") | {"out_proj.bias": state["out_proj.bias"]}
    return weights
