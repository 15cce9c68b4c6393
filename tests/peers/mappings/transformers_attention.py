"""The attention of Llama and Mistral in transformers (5.23.0), and in checkpoints of their kind."""

from typing import Any

import torch
from torch import Tensor

from mneme.layers import RopeScaling


def attention_options(config: Any) -> dict[str, Any]:
    """Arguments of `mneme.layers.SoftmaxAttention` from a `LlamaConfig` or `MistralConfig`.

    Raises:
        ValueError: positions of another kind than default, linear and llama3.
    """
    return {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "window": getattr(config, "sliding_window", None),  # Mistral
        "rope_base": config.rope_parameters["rope_theta"],
        "rope_scaling": _scaling(config.rope_parameters),
        "bias": getattr(config, "attention_bias", False),  # Llama
    }


def attention_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `mneme.layers.SoftmaxAttention` from that of a `Llama-` or `MistralAttention`.

    Rotary pairs are halves of a head on both sides. Checkpoints in Meta's own format interleave
    them; transformers' conversion has already put them in halves.
    """
    weights = {}
    for kind in {name.rpartition(".")[2] for name in state}:
        weights |= {
            f"q_proj.{kind}": state[f"q_proj.{kind}"],
            f"kv_proj.{kind}": torch.cat([state[f"k_proj.{kind}"], state[f"v_proj.{kind}"]]),
            f"out_proj.{kind}": state[f"o_proj.{kind}"],
        }
    return weights


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "linear":
        return RopeScaling(factor=rope["factor"])
    if rope["rope_type"] == "llama3":
        return RopeScaling(
            factor=rope["factor"],
            trained_length=rope["original_max_position_embeddings"],
            low_turns=rope["low_freq_factor"],
            high_turns=rope["high_freq_factor"],
        )
    raise ValueError(
        f"rotary positions of type {rope['rope_type']!r} have no counterpart in RopeScaling; "
        "default, linear and llama3 have"
    )
