"""How the optimiser treats each parameter: its weight decay and its largest learning rate."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from layers.protocol import NO_POLICY, Layer, Policy


def make_optimizer(
    model: nn.Module, factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`, none faster than its parameters allow."""
    optimizer = factory(parameter_groups(model))
    for group in optimizer.param_groups:
        if group["max_lr"] is not None:
            group["lr"] = min(group["lr"], group["max_lr"])
    return optimizer


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Splits the parameters into those that are treated alike.

    Parameters with two or more axes decay (linear maps, embeddings, filters, learned tokens).
    Vectors and scalars do not, which covers norms, biases and most decay parameters of gates, where
    decay would change how long a memory lasts. A layer's `policies` exempt others, and say how fast
    theirs may learn.
    """
    groups: dict[tuple[bool, float | None], list[nn.Parameter]] = defaultdict(list)
    for parameter, policy in _with_policies(model):
        if parameter.requires_grad:
            groups[policy.decays and parameter.ndim >= 2, policy.max_lr].append(parameter)
    return [
        # "weight_decay" is left to the optimiser's own option where parameters decay
        {"params": parameters, "max_lr": max_lr} | ({} if decays else {"weight_decay": 0.0})
        for (decays, max_lr), parameters in groups.items()
    ]


def _with_policies(model: nn.Module) -> Iterator[tuple[nn.Parameter, Policy]]:
    """Every parameter once, with what the module that owns it says of it."""
    seen: set[int] = set()
    for module in model.modules():
        policies = module.policies if isinstance(module, Layer) else {}
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter, policies.get(name, NO_POLICY)
