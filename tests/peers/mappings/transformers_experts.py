"""Sparse blocks of transformers (Mixtral, OLMoE) as `mneme.layers.MixtureOfExperts`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def experts_options(config: Any) -> dict[str, Any]:
    """Arguments of `mneme.layers.MixtureOfExperts(config.hidden_size, ...)`.

    Args:
        config: a `MixtralConfig`, whose router always renormalizes, or an `OlmoeConfig`.

    Raises:
        ValueError: another activation than SiLU, or noise on the router's input.
    """
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {config.hidden_act!r}")
    noise = getattr(config, "router_jitter_noise", 0.0)
    if noise:
        raise ValueError(f"router_jitter_noise must be 0, got {noise}")
    return {
        "experts": config.num_local_experts,
        "top_k": config.num_experts_per_tok,
        "expand": config.intermediate_size / config.hidden_size,
        "multiple_of": 1,
        "renormalize": getattr(config, "norm_topk_prob", True),
    }


def experts_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `mneme.layers.MixtureOfExperts` from that of Mixtral's or OLMoE's block.

    The files that were released for Mixtral have a matrix for each expert, w1, w3 and w2 (gate,
    value, out), which transformers stacks as it loads them.
    """
    return {
        "router.weight": state["gate.weight"],
        "experts.in_proj.weight": state["experts.gate_up_proj"],
        "experts.out_proj.weight": state["experts.down_proj"],
    }
