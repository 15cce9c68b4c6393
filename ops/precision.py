"""Keeping an op's arithmetic in the precision that it chooses."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """Runs an op with autocast off, for one whose states must not be rounded to bf16.

    Autocast would otherwise cast the operands of every product inside, fp32 states included. The
    first argument of the op must be a tensor.
    """

    @functools.wraps(op)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(first, Tensor)
        device = first.device.type
        if not torch.amp.is_autocast_available(device):  # the meta device has none
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return exact
