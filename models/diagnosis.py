"""Finding where a forward pass first went wrong."""

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mneme.layers import State
from mneme.models.optim import coalesced
from mneme.ops.contract import contained


class NonFiniteError(RuntimeError):
    """A loss or a gradient is no longer a number; training on would destroy the weights."""


@torch.no_grad()
def first_nonfinite(model: nn.Module, inputs: Tensor, state: State = None) -> str:
    """Names the module whose output first holds a NaN or an infinity when `inputs` are read.

    Args:
        model: a language model.
        inputs: tokens.
        state: that it starts from.

    Returns:
        The module's dotted name, and of an output with a row for each token the first bad token
        ("at sequence 0, token 17"); if every output is finite, a sentence that says so.
    """
    guilty: list[str] = []

    def watch(name: str, output: object) -> None:
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if not guilty and not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
            guilty.append(name + _first_token(tensors[0], inputs))

    hooks = [
        module.register_forward_hook(lambda _m, _args, output, name=name: watch(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with contained():  # or a token's NaN would be in the outputs of tokens before it
            model(inputs, state)
    finally:
        for hook in hooks:
            hook.remove()
    return guilty[0] if guilty else "none (every activation is finite; the loss itself is not)"


def _first_token(output: Tensor, inputs: Tensor) -> str:
    """Where an output first holds no number, if it has a row for each token."""
    if output.shape[:2] != inputs.shape or output.ndim < 3:
        return ""
    places = (~output.isfinite()).flatten(2).any(-1).nonzero()
    if not len(places):
        return ""
    sequence, token = min(places.tolist(), key=lambda place: place[1])
    return f" at sequence {sequence}, token {token}"


def nonfinite_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient holds a NaN or an infinity."""
    named = ((name, p.grad) for name, p in model.named_parameters())
    return [name for name, grad in named if grad is not None and not _is_finite(grad)]


def _is_finite(gradient: Tensor) -> bool:
    entries = coalesced(gradient).values() if gradient.is_sparse else gradient
    return bool(entries.isfinite().all())
