"""States are pytrees that can be handled without knowing the layer."""

from typing import Literal

import pytest
import torch

from mneme.layers import GatedDeltaNet, SwiGLU, is_loss, load_state, save_state, state_tensors
from mneme.layers.protocol import Layer, join_aux, require_choice


def test_a_state_of_another_layer_is_refused(tmp_path):
    layer = GatedDeltaNet(16, heads=2)
    save_state((), tmp_path / "none.pt")
    with pytest.raises(ValueError, match="holds 0 tensors; this layer's state has 2"):
        load_state(tmp_path / "none.pt", like=layer.init_state(1))


def test_a_stateless_layer_has_no_state():
    layer = SwiGLU(16)
    assert layer.init_state(3) is None
    assert layer.state_size(100) == 0
    assert state_tensors(layer(torch.zeros(1, 2, 16)).state) == []


def test_losses_are_told_from_telemetry_by_name():
    aux = join_aux({"0": {"loss_z": torch.ones(())}, "1": {"load": torch.ones(())}})
    assert {name: is_loss(name) for name in aux} == {"0/loss_z": True, "1/load": False}


def test_a_layer_without_a_forward_says_so():
    with pytest.raises(TypeError, match="Layer does not define forward"):
        Layer()(torch.zeros(1, 1, 1))


def test_active_parameters_of_a_dense_layer_are_all_of_them():
    layer = SwiGLU(16)
    assert layer.active_parameters() == sum(p.numel() for p in layer.parameters())


def test_a_choice_that_does_not_exist_is_refused_by_name():
    require_choice(Literal["layer", "none"], norm="none")
    with pytest.raises(ValueError, match=r"norm must be one of 'layer', 'none'; got 'layr'"):
        require_choice(Literal["layer", "none"], norm="layr")
