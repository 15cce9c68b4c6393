"""Functions that torch.compile leaves alone, marked without importing Dynamo.

`torch.compiler.disable` as a decorator imports Dynamo with the module that it stands in, which
takes as long as torch itself, also where nothing is ever compiled. Here it is called when the
function is, and only once something else has imported Dynamo: before that nothing compiles.
"""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable(function)`."""
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # Dynamo calls it, and goes on
    return call


def constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.assume_constant_result(function)`."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
