"""Which parameters the optimiser decays."""

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Splits the parameters into those that decay and those that do not.

    One rule: parameters with two or more axes decay (linear maps, embeddings, filters, learned
    tokens). Vectors and scalars do not, which covers norms, biases and the decay parameters of
    gates (A_log, dt_bias), where decay would change how long a memory lasts.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices},  # with the optimiser's own decay
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
