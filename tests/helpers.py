"""What several test files share."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from mneme.layers import LAYERS, Output, State, state_tensors

LAYER_EXAMPLES = [(name, example) for name, entry in LAYERS.items() for example in entry.examples]


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """RMS of the difference against the RMS of what is expected, with the tensor's name."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    if not actual.numel():
        return
    with torch.no_grad():
        actual, expected = actual.to_dense(), expected.to_dense()  # gradients of tables are sparse
        error = (actual.double() - expected.double()).square().mean().sqrt().item()
        scale = expected.double().square().mean().sqrt().item()
    limit = tolerance * scale + 1e-14  # the floor lets a gradient that is zero be zero
    assert error <= limit, f"{what}: RMS error {error:.2e} > {limit:.2e}, RMS of it {scale:.2e}"


def assert_states_close(actual: State, expected: State, tolerance: float = 1e-10) -> None:
    pairs = zip(state_tensors(actual), state_tensors(expected), strict=True)
    for i, (a, e) in enumerate(pairs):
        assert_close(a, e, f"state tensor {i}", tolerance)


def run_in_pieces(layer, x: Tensor, sizes: list[int], state: State = None) -> Output:
    """Feeds `x` piece by piece, the state carried."""
    outputs = []
    for piece in x.split(sizes, dim=1):
        y, state, _ = layer(piece, state)
        outputs.append(y)
    return Output(torch.cat(outputs, dim=1), state)


def example_layer(name: str, example: str, dtype=torch.float64):
    """A registered layer with every parameter off its symmetric start."""
    torch.manual_seed(0)
    layer = LAYERS[name].build(example).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return layer


def example_input(name: str, batch: int = 2, length: int = 13, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, length, LAYERS[name].d_model)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_parameter_gradients_are_right(layer, x: Tensor) -> None:
    """Gradients of all parameters at once against central differences, in fp64."""
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(*given: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, given, strict=True)), (x,)).y

    assert torch.autograd.gradcheck(output, values, atol=1e-7, rtol=1e-5, fast_mode=True)


def mean_square(function: Callable[[Tensor], Tensor], std: float = 1.0) -> float:
    """`E f(std g)^2` of a normal number g, by quadrature."""
    g = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = (-g.square() / 2).exp() / math.sqrt(2 * math.pi)
    return (function(std * g).square() * density).sum().item() * 1e-3


def assert_order_of_tokens_means_nothing(name: str, example: str) -> None:
    """Outputs of a registered layer stay with their tokens, in any order and any sequence."""
    layer, x = example_layer(name, example), example_input(name)
    order = torch.randperm(x[..., 0].numel(), generator=torch.Generator().manual_seed(2))

    def shuffled(tokens: Tensor) -> Tensor:
        return tokens.flatten(0, 1)[order].view(tokens.shape)

    y = layer(x).y
    assert_close(layer(shuffled(x)).y, shuffled(y), "output", 1e-12)
    assert not torch.allclose(y, shuffled(y))
