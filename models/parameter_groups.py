"""How the optimizer treats each parameter: learning rate, weight decay, kind of update."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mneme.layers.protocol import NO_OPTIONS, ParamOptions
from mneme.models.table_optimizer import OptimizerWithTables


def make_optimizer(
    model: nn.Module, factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`, each at the learning rate of its policy.

    A scheduler multiplies these rates. Where tables are updated row by row, the optimizer is
    wrapped in `OptimizerWithTables`.

    Raises:
        ValueError: the optimizer has an option that row updates do not follow.
    """
    optimizer = factory(parameter_groups(model))
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop("lr_multiplier", 1.0)
        if group["max_lr"] is not None:
            group["lr"] = min(group["lr"], group["max_lr"])
    return with_tables(optimizer)


def with_tables(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, or one that writes the tables of its groups row by row, if any are."""
    by_rows = any("update" in group for group in optimizer.param_groups)
    return OptimizerWithTables(optimizer) if by_rows else optimizer


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Splits the parameters into those that are treated alike.

    Parameters with two or more axes decay (linear maps, embeddings, filters, learned tokens).
    Vectors and scalars do not, which covers norms, biases and most decay parameters of gates, where
    decay would change how long a memory lasts. `param_options` of the layers that own them exempt
    others, such as the initial weights of a test-time memory, say how fast theirs may learn and
    which are updated row by row. A `ParameterList` has the policy that its owner gives its name.
    """
    groups: dict[ParamOptions, list[nn.Parameter]] = defaultdict(list)
    for parameter, policy in policies_of(model).items():
        if parameter.requires_grad:
            groups[_as_optimized(parameter, policy)].append(parameter)
    return [{"params": found, **_options(policy)} for policy, found in groups.items()]


def row_updated(model: nn.Module) -> list[nn.Parameter]:
    """The tables whose updates touch only the rows that have a gradient."""
    return [p for p, policy in policies_of(model).items() if policy.update != "dense"]


def policies_of(model: nn.Module) -> dict[nn.Parameter, ParamOptions]:
    """Every parameter once, in the model's order, with what the module that owns it says of it.

    If several modules share a parameter, the first that has a policy for it decides.

    Raises:
        ValueError: a row update is asked for what is not a table `[N, D]`.
    """
    found: dict[nn.Parameter, ParamOptions] = {}
    for module in model.modules():
        param_options = getattr(module, "param_options", {})
        for name, parameter in _own_parameters(module):
            policy = param_options.get(name, NO_OPTIONS)
            if policy.update != "dense" and parameter.ndim != 2:
                raise ValueError(
                    f"{type(module).__name__}.{name} has {parameter.ndim} axes; the update "
                    f"{policy.update!r} is for tables [N, D] and has two"
                )
            if found.get(parameter, NO_OPTIONS) == NO_OPTIONS:
                found[parameter] = policy
    return found


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a module names: its own, and those of lists under the list's name."""
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if isinstance(child, nn.ParameterList):
            yield from ((name, parameter) for parameter in child.parameters())


def _as_optimized(parameter: nn.Parameter, policy: ParamOptions) -> ParamOptions:
    """What of the policy the optimizer needs: equal for parameters that are treated alike."""
    decays = policy.decays and parameter.ndim >= 2
    return policy._replace(
        decays=True, weight_decay=policy.weight_decay if decays else 0.0, clip_group=None
    )


def _options(policy: ParamOptions) -> dict[str, Any]:
    """The options of a parameter group; what is left out is the optimizer's own."""
    options: dict[str, Any] = {"max_lr": policy.max_lr}
    if policy.weight_decay is not None:
        options["weight_decay"] = policy.weight_decay
    if policy.lr_multiplier != 1:
        options["lr_multiplier"] = policy.lr_multiplier
    if policy.update != "dense":
        options["update"] = policy.update
    return options
