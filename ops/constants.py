"""Tensors that depend on a few numbers alone: made once, kept for the process.

A cache of tensors outlives the mode in which its entries were made. One made in inference mode may
not be saved for a backward pass, and one made in a fake mode has no values.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def kept(make: Callable[P, tuple[Tensor, ...]]) -> Callable[P, tuple[Tensor, ...]]:
    """Decorates a function whose tensors follow from its arguments, which must be hashable.

    They are made outside of inference mode, and kept if they are plain tensors. In a mode whose
    tensors are not plain, such as a fake mode, and while a caller is being compiled, they are made
    anew. The device must be one of the arguments; a caller must not write to what it gets.
    """
    known: dict[object, tuple[Tensor, ...]] = {}

    @functools.wraps(make)
    def constants(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling() or type(torch.empty(0, device="meta")) is not Tensor:
            return make(*args, **kwargs)
        key = (args, tuple(kwargs.items()))
        if key not in known:
            with torch.inference_mode(False):
                known[key] = make(*args, **kwargs)
        return known[key]

    return constants
