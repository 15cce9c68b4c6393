"""Built without memory, given memory, loaded: the way large checkpoints come to a device."""

import pytest
import torch
from torch.nn import Module

from mneme.layers import LAYERS
from tests.helpers import LAYER_EXAMPLES, example_input, example_layer


def _given_memory(shell: Module) -> Module:
    """On the CPU, with values that nobody would take for right."""
    shell.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*shell.parameters(), *shell.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    return shell


@pytest.mark.parametrize(("name", "example"), LAYER_EXAMPLES, ids=str)
def test_a_layer_built_on_the_meta_device_is_what_its_state_dict_says(name, example):
    layer, x = example_layer(name, example), example_input(name)
    with torch.device("meta"):
        shell = LAYERS[name].build(example).to(x.dtype)
    _given_memory(shell).load_state_dict(layer.state_dict())
    torch.manual_seed(2)
    expected = layer(x).y
    torch.manual_seed(2)
    assert torch.equal(shell(x).y, expected)
