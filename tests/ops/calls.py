"""Calling any registered op: results and gradients by name."""

import torch
from torch import Tensor
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_map_only,
    tree_map_with_path,
)

from mneme.ops import OPS, Op

# Parametrisations with readable ids: every op, and every fast form of every op.
EVERY_OP = list(OPS)
EVERY_FORM = [(name, form) for name, op in OPS.items() for form in op.forms]
EVERY_REGIME = [(name, form, regime) for name, form in EVERY_FORM for regime in OPS[name].regimes]
STATEFUL_FORMS = [(name, form) for name, form in EVERY_FORM if OPS[name].stateful]
EMPTY_STARTS = [(name, form) for name, form in STATEFUL_FORMS if OPS[name].starts_empty]


def ident(parameters):
    return "-".join(parameters)


def make(op: Op, length: int, *, seed=0, batch=2, dtype=torch.float64, regime=None, **sizes):
    """Inputs of odd sizes, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    regime = regime or op.regimes[0]
    return op.inputs(generator, batch, length, dtype=dtype, regime=regime, **op.odd_sizes | sizes)


def tensors(values) -> dict[str, Tensor]:
    """Every tensor inside nested values that has elements, by its path."""
    paths, _ = tree_flatten_with_path(values)
    return {keystr(path): x for path, x in paths if isinstance(x, Tensor) and x.numel()}


def replaced(values, new: dict[str, Tensor]):
    """Nested values with some of their tensors replaced, by path."""
    return tree_map_with_path(lambda path, x: new.get(keystr(path), x), values)


def cut(inputs, op: Op, start: int, stop: int):
    """The arguments for some of the tokens."""
    return inputs | {
        key: tree_map_only(Tensor, lambda x: x[:, start:stop], inputs[key]) for key in op.timed
    }


def results(function, inputs) -> dict[str, Tensor]:
    """What a form returns, by name."""
    out = function(**inputs)
    if isinstance(out, Tensor):
        return {"y": out}
    y, state = out
    return {"y": y} | {f"state{path}": x for path, x in tensors(state).items()}


def scalar(out: dict[str, Tensor], only: str | None = None) -> Tensor:
    """A fixed random functional of results, or of those whose name starts with `only`."""
    generator = torch.Generator().manual_seed(1)
    return sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
        for name, x in out.items()
        if name.startswith(only or "")
    )


def gradients(function, inputs, *, only: str | None = None) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the results (or of `only` some of them)."""
    leaves = {path: x.detach().requires_grad_() for path, x in tensors(inputs).items()}
    loss = scalar(results(function, replaced(inputs, leaves)), only)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        f"d{name}": torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(leaves.items(), grads, strict=True)
    }
