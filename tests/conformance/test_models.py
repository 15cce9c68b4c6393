"""What a whole model promises, for every mixer and every pattern that is shipped."""

from functools import cache, partial

import pytest
import torch
from torch.nn import functional as F

from mneme.harness.config.build import build
from mneme.harness.config.compose import CONFIG_DIR, compose_checked
from mneme.layers import GENERIC, HierarchicalFFN, detach_state, state_tensors
from mneme.models import budget
from mneme.models.optim import make_optimizer
from tests.helpers import assert_close, assert_states_close, run_in_pieces

MIXERS = sorted(path.stem for path in (CONFIG_DIR / "mixer").glob("*.yaml"))
PATTERNS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml"))
VOCABULARY = 11

every_model = pytest.mark.parametrize(
    ("mixer", "pattern"),
    # bank_early and its like are lm but for which blocks have the chosen feed-forward
    [(m, "lm") for m in MIXERS]
    + [("gated_deltanet", p) for p in PATTERNS if p != "lm" and not p.startswith("bank_")],
    ids=str,
)


@cache  # composing takes longer than most of these tests
def small_config(mixer: str, pattern: str, *overrides: str):
    layers = 2 if pattern == "lm" else 4  # enough for every kind of a pattern's blocks
    small = ["model.d_model=16", f"model.n_layers={layers}"]
    return compose_checked([f"mixer={mixer}", f"model={pattern}", *small, *overrides]).config


def small_model(mixer: str, pattern: str, *overrides: str, dtype=torch.float64):
    config = small_config(mixer, pattern, *overrides)
    torch.manual_seed(0)
    return build(config["model"], vocab_size=VOCABULARY).to(dtype)


def tokens(batch: int = 2, length: int = 40):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@every_model
def test_pieces_give_what_the_whole_gives(mixer, pattern):
    model, x = small_model(mixer, pattern), tokens()
    whole, pieces = model(x), run_in_pieces(model, x, [17, 1, 1, 20, 1])
    assert_close(pieces.y, whole.y, "logits")
    assert_states_close(pieces.state, whole.state)


@every_model
def test_prefill_then_decoding_gives_what_the_whole_gives(mixer, pattern):
    model, x = small_model(mixer, pattern), tokens()
    pieces = run_in_pieces(model, x, [30] + [1] * 10)
    assert_close(pieces.y, model(x).y, "logits")


@every_model
def test_later_tokens_never_change_earlier_logits(mixer, pattern):
    model, x = small_model(mixer, pattern), tokens()
    changed = x.clone()
    changed[0, 25] = (changed[0, 25] + 1) % VOCABULARY
    before, after = model(x).y, model(changed).y
    assert torch.equal(before[0, :25], after[0, :25])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 25:], after[0, 25:])


@every_model
def test_budget_counts_what_is_there(mixer, pattern):
    model = small_model(mixer, pattern, dtype=torch.float32)
    costs = budget(model, 40)
    state = model(tokens(batch=1)).state
    assert costs.state_bytes == sum(t.numel() * t.element_size() for t in state_tensors(state))
    assert model.state_size(40) == sum(t.numel() for t in state_tensors(state))
    assert costs.parameters == sum(p.numel() for p in model.parameters())
    assert costs.flops_per_token >= 2 * sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight")
    )
    assert budget(model, 200).flops_per_token > 0  # several chunks, without any numbers


@every_model
def test_training_overfits_one_batch(mixer, pattern):
    model, x = small_model(mixer, pattern, dtype=torch.float32), tokens(length=20)
    optimizer = make_optimizer(model, partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0))
    losses = []
    for _ in range(40):
        logits = model(x[:, :-1]).y
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_model
def test_a_model_without_state_kept_returns_the_same_logits(mixer, pattern):
    model, x = small_model(mixer, pattern), tokens()
    output = model(x, keep_state=False)
    assert output.state is None
    assert torch.equal(output.y, model(x).y)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_route_reaches_every_layer_that_reads_the_bank(pattern):
    model = small_model("attention", pattern, "ffn=bank")
    readers = [layer for layer in model.modules() if isinstance(layer, HierarchicalFFN)]
    if not readers:
        pytest.skip("this pattern has no place for the feed-forward that is chosen")
    route, x = torch.tensor([3, GENERIC]), tokens()
    wanted = model.bank.eval().fetch(route)
    read = []
    for layer in readers:
        layer.register_forward_pre_hook(lambda _, given: read.append(given[1]))
    model.eval()(x, model.init_state(2, route))
    assert len(read) == len(readers)
    assert all(torch.equal(blocks, wanted[:, i]) for i, blocks in enumerate(read))


@every_model
def test_state_continues_after_detaching(mixer, pattern):
    model, x = small_model(mixer, pattern), tokens()
    state = detach_state(model(x[:, :20]).state)
    logits = model(x[:, 20:], state).y
    assert_close(logits, model(x).y[:, 20:], "logits after detaching")
    logits.sum().backward()
