"""Generation continues with carried state and samples as asked."""

from functools import partial

import pytest
import torch

from mneme.layers import GatedDeltaNet, SoftmaxAttention
from mneme.models import LanguageModel, generate
from mneme.models.generation import filter_logits


@pytest.fixture(params=[GatedDeltaNet, SoftmaxAttention], ids=lambda c: c.__name__)
def model(request):
    torch.manual_seed(0)
    mixer = partial(request.param, heads=2)
    net = LanguageModel(16, vocab_size=11, n_layers=2, pattern=[[mixer]]).double().eval()
    torch.nn.init.normal_(net.embedding.weight)  # large logits, so that greedy choices are clear
    return net


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_greedy_equals_recomputing_everything_at_each_step(model):
    new, _ = generate(model, PROMPT, 12, temperature=0)
    tokens = PROMPT
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens).y[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(new, tokens[:, 3:])


def test_generation_goes_on_from_a_state(model):
    whole, _ = generate(model, PROMPT, 9, temperature=0)
    first, state = generate(model, PROMPT, 4, temperature=0)
    rest, _ = generate(model, first[:, -1:], 5, temperature=0, state=state)
    assert torch.equal(torch.cat([first, rest], dim=1), whole)


def test_sampling_repeats_with_its_generator_alone(model):
    draws = [
        generate(model, PROMPT, 8, temperature=50.0, generator=torch.Generator().manual_seed(seed))[
            0
        ]
        for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_likeliest_token_alone_is_greedy(model):
    greedy, _ = generate(model, PROMPT, 6, temperature=0)
    assert torch.equal(generate(model, PROMPT, 6, top_k=1)[0], greedy)
    assert torch.equal(generate(model, PROMPT, 6, top_p=1e-9)[0], greedy)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()[:, [2, 0, 3, 1]]
    kept = [filter_logits(logits, top_p=p).isfinite().sum().item() for p in (0.4, 0.6, 0.9, 1.0)]
    assert kept == [1, 2, 3, 4]
    assert filter_logits(logits, top_p=0.6).isfinite().tolist() == [[False, True, False, True]]


def test_top_k_keeps_k():
    logits = torch.randn(3, 10)
    assert (filter_logits(logits, top_k=4).isfinite().sum(-1) == 4).all()
    assert torch.equal(filter_logits(logits, top_k=10), logits)


def test_of_equal_logits_the_lower_token_is_the_likelier():
    """So that k are k, and one is the greedy choice."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0]])
    for k, kept in {1: [1], 2: [1, 2], 3: [1, 2, 4], 4: [1, 2, 3, 4], 6: [*range(6)]}.items():
        assert filter_logits(logits, top_k=k)[0].isfinite().nonzero().flatten().tolist() == kept
    assert filter_logits(logits, top_p=1e-9)[0].isfinite().nonzero().flatten().tolist() == [1]
    assert logits.argmax() == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_is_nearly_greedy(model, temperature):
    greedy, _ = generate(model, PROMPT, 6, temperature=0)
    assert torch.equal(generate(model, PROMPT, 6, temperature=temperature)[0], greedy)
    assert torch.equal(generate(model, PROMPT, 6, temperature=temperature, top_k=3)[0], greedy)
    assert torch.equal(generate(model, PROMPT, 6, temperature=temperature, top_p=0.9)[0], greedy)


def test_no_new_token_is_no_new_token(model):
    assert generate(model, PROMPT, 0)[0].shape == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0 .* got nan"),
        ({"temperature": float("inf")}, "temperature must be 0 .* got inf"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, **{"max_new_tokens": 1, **options})


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(model, PROMPT[:, :0], 1)
