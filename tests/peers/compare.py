"""Compares a layer of ours with a public implementation whose weights it was given."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mneme.layers import Layer
from tests.helpers import assert_close

Weights = dict[str, Tensor]


class InDouble(TorchFunctionMode):
    """While it is entered, whatever asks for fp32 gets fp64.

    Many peers cast to fp32 inside, which would hide every difference below 1e-7. Their code runs as
    it is; only its casts, and the default dtype, mean another precision.
    """

    def __enter__(self):
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(self.default)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float:
            function = Tensor.double
        given = args, kwargs or {}
        args, kwargs = pytree.tree_map(lambda a: torch.float64 if a is torch.float32 else a, given)
        return function(*args, **kwargs)


def peer(build: Callable[[], nn.Module]) -> nn.Module:
    """A public implementation in fp64, with every parameter off its start (ones, zeros, ...)."""
    torch.manual_seed(0)
    with InDouble():
        module = build().double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def assert_same(
    ours: Layer,
    theirs: nn.Module,
    mapping: Callable[[Weights], Weights],
    x: Tensor,
    tolerance: float = 1e-10,
    *,
    run: Callable[[Tensor], Tensor] | None = None,
    in_double: bool = True,
) -> None:
    """Outputs agree, and gradients of the input and of each of the peer's parameters.

    Ours is run on the mapped weights, and its gradients go back through the mapping.

    Args:
        ours: the layer; its own weights are replaced.
        theirs: the peer, on the same precision as `x`.
        mapping: from the peer's state dict to ours; it must give all of ours, and no other.
        x: `[B, T, D]`.
        tolerance: RMS of each difference over the RMS of what is expected.
        run: the peer's output for an input, where calling it does not give that alone.
        in_double: turn the peer's casts to fp32 into casts to fp64.
    """
    run = theirs if run is None else run
    ours = ours.to(x.dtype).eval()
    ours.load_state_dict(mapping(theirs.state_dict()))

    their_x, their_weights = x.clone().requires_grad_(), dict(theirs.named_parameters())
    with InDouble() if in_double else nullcontext():
        expected = run(their_x)
        dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(expected)
        their_gradients = _gradients(expected, their_x, their_weights, dy)

    our_x = x.clone().requires_grad_()
    leaves = {
        n: w.detach().clone().requires_grad_(w.requires_grad) for n, w in their_weights.items()
    }
    weights = mapping({**theirs.state_dict(), **leaves})
    actual = functional_call(ours, weights, (our_x,), strict=True).y

    assert_close(actual, expected, "output", tolerance)
    for name, gradient in _gradients(actual, our_x, leaves, dy.to(actual)).items():
        assert_close(gradient, their_gradients[name], f"gradient of {name}", tolerance)


def _gradients(y: Tensor, x: Tensor, weights: Weights, dy: Tensor) -> Weights:
    """By name; zeros for a weight that is not used."""
    leaves = {"the input": x, **{n: w for n, w in weights.items() if w.requires_grad}}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    pairs = zip(leaves.items(), gradients, strict=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in pairs}
