"""Rotary positions against the published formula, in complex numbers."""

import pytest
import torch

from mneme.layers.parts.rotary import rotate
from tests.helpers import assert_close


@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_pairs_turn_by_position_times_their_wavelength(base):
    # f(x, m)_i = (x_i + j x_{i + d/2}) exp(j m theta_i), theta_i = base^(-2 (i - 1) / d), i from 1
    # (arXiv 2104.09864, equations 14 and 15; pairs of halves, as GPT-NeoX and Llama have them).
    width, half = 10, 5
    x = torch.randn(2, 7, 3, width, dtype=torch.float64)
    positions = torch.arange(4, 11)[None]
    (turned,) = rotate(x, positions=positions, base=base)
    for i in range(half):
        theta = base ** (-2 * i / width)
        pair = torch.complex(x[..., i], x[..., i + half])
        angle = torch.exp(1j * theta * positions.double())[..., None]
        assert_close(turned[..., i], (pair * angle).real, f"first of pair {i}", 1e-12)
        assert_close(turned[..., i + half], (pair * angle).imag, f"second of pair {i}", 1e-12)
