"""Tensors kept for the process serve whatever mode asks next."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mneme.ops import OPS
from mneme.ops.contract import kept
from mneme.ops.gated_delta import gated_delta_chunk
from tests.ops.calls import make


@kept
def _ramp(stop: int, device: torch.device) -> tuple[torch.Tensor]:
    return (torch.arange(float(stop), device=device),)


CPU = torch.device("cpu")


def test_what_is_kept_is_made_once():
    assert _ramp(3, CPU)[0] is _ramp(3, CPU)[0]
    assert _ramp(3, CPU)[0] is not _ramp(4, CPU)[0]


@pytest.mark.parametrize("stop", [5, 6])
def test_what_inference_made_can_be_differentiated_with(stop):
    with torch.inference_mode():
        (made,) = _ramp(stop, CPU)
    x = torch.ones(stop, requires_grad=True)
    (made * x).sum().backward()
    assert torch.equal(x.grad, torch.arange(float(stop)))


def test_a_fake_mode_gets_fake_tensors_and_leaves_none():
    with FakeTensorMode():
        (fake,) = _ramp(7, CPU)
        _ramp(3, CPU)[0] + fake[:3]
    assert type(_ramp(7, CPU)[0]) is torch.Tensor


def test_an_op_serves_training_after_a_fake_mode_and_inference():
    """Its masks are kept by dtype, so a dtype that no other test has asked for."""
    inputs = {key: x.float() for key, x in make(OPS["gated_delta"], 130).items()}
    with FakeTensorMode() as mode:
        gated_delta_chunk(**{key: mode.from_tensor(x) for key, x in inputs.items()})
    with torch.inference_mode():
        gated_delta_chunk(**inputs)
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    gated_delta_chunk(**leaves)[0].sum().backward()
    assert inputs["k"].grad.isfinite().all()
