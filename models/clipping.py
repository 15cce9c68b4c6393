"""Clipping of gradients by global norm, group by group, sparse gradients included."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mneme.models.parameter_groups import policies_of
from mneme.models.row_gradients import coalesced

MAIN = None
"""The clip group of parameters whose policy names none."""

_EPS = 1e-6  # added to a norm before dividing by it, as torch does


@torch.no_grad()
def clip_by_groups(model: nn.Module, limit: float) -> dict[str | None, Tensor]:
    """Scales down, in place, the gradients of each clip group whose global norm is above `limit`.

    Args:
        model: its modules' `param_options` name the groups; parameters without one form `MAIN`.
        limit: for the norm of every group alone; infinity scales nothing.

    Returns:
        The norm of each group before clipping, 0 where it has no gradient.
    """
    groups: dict[str | None, list[nn.Parameter]] = defaultdict(list, {MAIN: []})
    for parameter, policy in policies_of(model).items():
        groups[policy.clip_group].append(parameter)
    return {name: _clip(parameters, limit) for name, parameters in groups.items()}


def _clip(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """As torch's `clip_grad_norm_`, which refuses sparse gradients on the CPU."""
    if not any(p.grad is not None and p.grad.is_sparse for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    values = [_values(p) for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(values)
    scale = limit / (norm + _EPS)
    if scale < 1:
        torch._foreach_mul_(values, scale)
    return norm


def _values(parameter: nn.Parameter) -> Tensor:
    """The gradient's entries, as they are: of a sparse one, its coalesced rows."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = coalesced(parameter.grad)
    return parameter.grad.values()
