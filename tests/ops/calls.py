"""Calling any registered op: results and gradients by name."""

import torch
from torch import Tensor

from ops import OPS, Op

# Parametrisations with readable ids: every op, and every fast form of every op.
EVERY_OP = list(OPS)
EVERY_FORM = [(name, form) for name, op in OPS.items() for form in op.forms]
EVERY_REGIME = [(name, form, regime) for name, form in EVERY_FORM for regime in OPS[name].regimes]
STATEFUL_FORMS = [(name, form) for name, form in EVERY_FORM if OPS[name].stateful]


def ident(parameters):
    return "-".join(parameters)


def make(op: Op, length: int, *, seed=0, batch=2, dtype=torch.float64, regime=None, **sizes):
    """Inputs of odd sizes, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    regime = regime or op.regimes[0]
    return op.inputs(generator, batch, length, dtype=dtype, regime=regime, **op.odd_sizes | sizes)


def results(function, inputs) -> dict[str, Tensor]:
    """What a form returns, by name."""
    out = function(**inputs)
    return {"y": out} if isinstance(out, Tensor) else dict(zip(("y", "state"), out, strict=True))


def gradients(function, inputs, *, only: str | None = None) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the results (or of `only` one of them)."""
    leaves = {
        name: x.detach().requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)
    }
    out = results(function, inputs | leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
        for name, x in out.items()
        if only in (None, name)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        f"d{name}": torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(leaves.items(), grads, strict=True)
    }
