"""What several test files share."""

import torch
from torch import Tensor

from layers import LAYERS, Output, State, state_tensors

LAYER_EXAMPLES = [(name, example) for name, entry in LAYERS.items() for example in entry.examples]


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """RMS of the difference against the RMS of what is expected, with the tensor's name."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    if not actual.numel():
        return
    with torch.no_grad():
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
