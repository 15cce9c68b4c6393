"""What the configs of TTT and LaCT share with the published code, from its formulas."""

import pytest
import torch
from torch.nn import functional as F

from mneme.harness.config.build import build
from mneme.harness.config.compose import compose_checked
from mneme.ops.test_time import newton_schulz
from tests.helpers import assert_close

SCHEDULE = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def from_config(*overrides: str):
    recipe = build(compose_checked(list(overrides)).config["mixer"])
    torch.manual_seed(0)
    layer = recipe(32).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def normal(*shape: int):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp"])
def test_ttt_normalizes_all_heads_together_and_has_no_gate(name):
    layer, reads = from_config(f"mixer={name}"), []
    layer.norm.register_forward_pre_hook(lambda _, args: reads.append(args[0]))
    y = layer(normal(2, 40, 32)).y
    read = reads[0].flatten(2)
    centered = read - read.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (normed * layer.norm.weight + layer.norm.bias) @ layer.out_proj.weight.T
    assert_close(y, expected, "output")


def test_queries_and_keys_of_lact_have_a_scale_and_an_offset_before_silu():
    _, memory = from_config("mixer=lact").parts
    x = normal(1, 1, 32)  # the first token, which rotary positions leave alone
    taps = memory.conv.weight[:, 0]  # of one token each
    raw = x @ memory.qkv_proj.weight.T * taps
    scale, offset = memory.qk_scale, memory.qk_offset
    parts = [
        F.silu(part * s + o).unflatten(-1, (2, 16))
        for part, s, o in zip(raw.chunk(3, -1)[:2], scale.chunk(2), offset.chunk(2), strict=True)
    ]
    expected = [part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in parts]
    q, k, v = memory._features(memory.conv(memory.qkv_proj(x)).y, memory.init_state(1))
    assert_close(q, expected[0], "queries")
    assert_close(k, expected[1], "keys")
    assert_close(v, F.silu(raw.chunk(3, -1)[2]).unflatten(-1, (2, 16)), "values")


def test_scale_and_offset_of_lact_start_as_one_and_zero():
    _, memory = build(compose_checked(["mixer=lact"]).config["mixer"])(32).parts
    assert torch.equal(memory.qk_scale, torch.ones(64))
    assert torch.equal(memory.qk_offset, torch.zeros(64))


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8)])
def test_each_step_of_lacts_newton_schulz_has_coefficients_of_its_own(shape):
    """On a matrix they are an odd polynomial of its singular values."""
    update = normal(*shape)
    values = torch.linalg.svdvals(update)
    values = values / values.norm(dim=-1, keepdim=True)
    for a, b, c in SCHEDULE:
        values = a * values + b * values**3 + c * values**5
    got = torch.linalg.svdvals(newton_schulz(update, "scheduled"))
    assert_close(got, values.sort(-1, descending=True).values, "singular values", 1e-9)


def test_the_config_of_lact_takes_the_schedule_and_refuses_another():
    _, memory = from_config("mixer=lact", "mixer.layers.1.learner.orthogonal=scheduled").parts
    assert memory.rule.orthogonal == "scheduled"
    assert memory(normal(1, 40, 32)).y.isfinite().all()
    with pytest.raises(ValueError, match="orthogonal"):
        from_config("mixer=lact", "mixer.layers.1.learner.orthogonal=exact")
