"""The residual stack: patterns, initialization, recomputation, losses of layers."""

from functools import partial
from typing import ClassVar

import pytest
import torch

from mneme.layers import (
    GatedDeltaNet,
    Layer,
    Output,
    ParamOptions,
    Residual,
    SoftmaxAttention,
    SwiGLU,
)
from mneme.models import LanguageModel
from mneme.models.optim import make_optimizer, parameter_groups
from tests.helpers import assert_close

MIXER = partial(GatedDeltaNet, heads=2)


def model(**options):
    torch.manual_seed(0)
    defaults = {"vocab_size": 13, "n_layers": 2, "pattern": [[MIXER, partial(SwiGLU)]]}
    return LanguageModel(16, **{**defaults, **options})


def test_a_pattern_is_repeated_over_depth():
    attention = partial(SoftmaxAttention, heads=2)
    hybrid = model(n_layers=8, pattern=[[MIXER]] * 3 + [[attention]])
    kinds = [type(block.parts[0].parts[0]).__name__ for block in hybrid.blocks]
    assert kinds == (["GatedDeltaNet"] * 3 + ["SoftmaxAttention"]) * 2


def test_none_entries_are_left_out():
    assert len(model(pattern=[[MIXER, None]]).blocks[0].parts) == 1


@pytest.mark.parametrize("options", [{"n_layers": 0}, {"pattern": []}, {"pattern": [[None]]}])
def test_a_model_without_layers_is_refused(options):
    with pytest.raises(ValueError, match="a model needs layers"):
        model(**options)


def test_tied_and_untied_heads():
    tied, untied = model(), model(tie_embeddings=False)
    assert untied.head is not None
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 13 * 16
    # a tied table is read whole by every token, an untied one a row at a time
    assert tied.active_parameters() == sum(p.numel() for p in tied.parameters())
    assert untied.active_parameters() == tied.active_parameters() + 16


def test_an_untied_head_makes_the_logits():
    untied = model(tie_embeddings=False)
    with torch.no_grad():
        untied.head.weight.zero_()
        untied.head.weight[3] = 1.0
    logits = untied(torch.tensor([[1, 2, 5]])).y
    assert (logits[..., 3] != 0).all()
    assert logits.square().sum() == logits[..., 3].square().sum()


def test_residual_outputs_shrink_with_depth_and_gates_keep_their_start():
    shallow, deep = model(n_layers=1), model(n_layers=16)
    ratio = deep.blocks[0].parts[0].parts[0].out_proj.weight.std() / (
        shallow.blocks[0].parts[0].parts[0].out_proj.weight.std()
    )
    assert ratio.item() == pytest.approx((2 / 32) ** 0.5, rel=0.15)
    for block in deep.blocks:
        rates = block.parts[0].parts[0].decay.A_log.exp()
        assert (rates[0] <= 8).all()
        assert (rates[1] >= 8).all()


def test_first_logits_are_near_zero_so_the_first_loss_is_that_of_guessing():
    logits = model()(torch.arange(13)[None]).y
    assert logits.std() < 0.5


def test_recomputed_blocks_give_the_same_gradients():
    x = torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        net = model(checkpoint_blocks=recompute, dropout=0.1).double()
        torch.manual_seed(5)
        net(x, keep_state=False).y.square().sum().backward()
        gradients.append({n: p.grad for n, p in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, name, 1e-12)


class Chatty(Layer):
    """Reports a loss and a figure."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(d_model))

    def forward(self, x, state=None):
        aux = {"loss_balance": self.scale.sum(), "load": self.scale.max()}
        return Output(x * self.scale, None, aux)


def test_what_layers_report_arrives_under_their_place():
    aux = model(pattern=[[Chatty]])(torch.zeros(1, 3, dtype=torch.long)).aux
    assert set(aux) == {f"{i}/0/{name}" for i in (0, 1) for name in ("loss_balance", "load")}


def test_matrices_decay_and_vectors_do_not():
    net = model()
    decayed, kept = torch.optim.AdamW(parameter_groups(net), weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    kept_ids = {id(p) for p in kept["params"]}
    for name, parameter in net.named_parameters():
        spared = name.endswith(("A_log", "dt_bias", "norm.weight", "bias"))
        assert (id(parameter) in kept_ids) == spared, name
    assert len(decayed["params"]) + len(kept["params"]) == len(list(net.parameters()))


class Filter(Layer):
    param_options: ClassVar = {"taps": ParamOptions(decays=False, max_lr=1e-3)}

    def __init__(self, d_model):
        super().__init__()
        self.taps = torch.nn.Parameter(torch.ones(4, d_model))


def test_a_layer_may_spare_its_parameters_decay_and_slow_them_down():
    net = torch.nn.Sequential(Filter(8), torch.nn.Linear(8, 8, bias=False))
    optimizer = make_optimizer(net, partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1))
    treated = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert treated == {id(net[0].taps): (1e-3, 0.0), id(net[1].weight): (1e-2, 0.1)}


def test_a_frozen_parameter_is_left_to_itself():
    net = model()
    net.embedding.weight.requires_grad_(False)
    listed = {id(p) for group in parameter_groups(net) for p in group["params"]}
    assert id(net.embedding.weight) not in listed


def test_residual_adds_what_the_layer_makes_of_the_normalized_input():
    residual = Residual(16, layer=partial(SwiGLU))
    x = torch.randn(1, 4, 16)
    assert_close(residual(x).y, x + residual.parts[0](residual.norm(x)).y, "residual", 1e-6)
