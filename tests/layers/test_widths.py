"""A ratio of widths gives the width it is the ratio of."""

import inspect
from itertools import pairwise

import pytest

from mneme.layers import LAYERS
from mneme.ops.options import scaled_width
from mneme.ops.test_time import MLP, SwiGLU

D = 22  # 25 / 11 * 11 is rounded up and 15 / 11 * 11 down, and so are their doubles
WIDTHS = range(12, 60)


def ratios(layer) -> dict:
    parameters = inspect.signature(layer).parameters
    named = {name: p.annotation for name, p in parameters.items() if name.startswith("expand")}
    return {name: annotation for name, annotation in named.items() if annotation is not int}


LAYERS_WITH_A_RATIO = [
    (name, ratio) for name, entry in LAYERS.items() for ratio in ratios(entry.cls)
]


@pytest.mark.parametrize(("name", "ratio"), LAYERS_WITH_A_RATIO)
def test_one_unit_more_is_the_same_parameters_more(name, ratio):
    taken = inspect.signature(LAYERS[name].cls).parameters
    given = {"heads": 1, "head_dim": D, "multiple_of": 1}
    options = {option: value for option, value in given.items() if option in taken}
    layers = (LAYERS[name].cls(D, **options, **{ratio: width / D}) for width in WIDTHS)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert len({b - a for a, b in pairwise(sizes)}) == 1


@pytest.mark.parametrize("network", [MLP, SwiGLU])
def test_hidden_width_of_a_test_time_memory(network):
    assert all(network(expand=w / D).shapes(D, D)[0][1] == w for w in WIDTHS)


def test_a_width_that_is_no_multiple_is_cut_off_or_rounded_up():
    assert scaled_width(10, 0.79) == 7
    assert scaled_width(10, 0.71, multiple_of=1) == 8
    assert scaled_width(10, 0.71, multiple_of=4) == 8
    assert scaled_width(50, 56 / 50, multiple_of=8) == 56
    assert scaled_width(3, 8 / 3, multiple_of=8) == 8
