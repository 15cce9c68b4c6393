"""torch.compile changes nothing: compiled equals eager in output, state and gradients."""

import pytest

from mneme.layers import LAYERS


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_equals_eager(name, compiled):
    assert compiled("layer", name) == ""
