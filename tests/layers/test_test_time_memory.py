"""What the test-time memory layer and its configs promise beyond conformance."""

import math

import pytest
import torch
from torch.nn import functional as F

from mneme.harness.config.build import build
from mneme.harness.config.compose import CONFIG_DIR, compose_checked
from mneme.layers import Features, ForgetGate, Learner, TestTimeMemory, recording, state_tensors
from mneme.layers.test_time.test_time_parts import PolynomialFeatures
from mneme.ops.test_time import MLP, Matrix, Slots, UnitSlots
from tests.helpers import assert_close, run_in_pieces

CONFIGS = (
    "titans_lmm",
    "titans_mac",
    "titans_mag",
    "titans_mal",
    "titans_linear",
    "ttt_linear",
    "ttt_mlp",
    "lact",
    "moneta",
    "yaad",
    "memora",
    "lattice_decode",
    "lattice_encode",
    "lattice_similarity",
    "omeganet",
    "atlas",
)

every_config = pytest.mark.parametrize("name", CONFIGS)


def from_config(name: str, d_model: int = 32):
    factory = build(compose_checked([f"mixer={name}"]).config["mixer"])
    torch.manual_seed(0)
    return factory(d_model)


def tokens(batch: int, length: int, width: int = 32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)


@every_config
def test_every_config_is_shipped_and_names_its_paper(name):
    lines = (CONFIG_DIR / "mixer" / f"{name}.yaml").read_text().splitlines()
    heading = " ".join(line[2:] for line in lines if line.startswith("# "))
    assert "arXiv" in heading
    assert not name.startswith("lattice") or "erived" in heading


@every_config
def test_finite_in_bf16_over_4k_random_tokens_from_initialization(name):
    """The conformance tests take the class through 16K."""
    layer = from_config(name).bfloat16()
    with torch.no_grad():
        y, state, _ = layer(tokens(1, 4096, dtype=torch.bfloat16))
    assert y.isfinite().all()
    assert all(t.isfinite().all() for t in state_tensors(state))


@every_config
def test_small_changes_stay_small_from_initialization(name):
    """A memory that amplifies is chaotic: rounding would decide what a long text leaves behind."""
    layer = from_config(name, 64).double()
    x = tokens(2, 512, 64)
    changed = x.clone()
    changed[:, 0] += 1e-7 * tokens(2, 1, 64)[:, 0]
    with torch.no_grad():
        effect = (layer(changed).y - layer(x).y).norm(dim=-1).mean(0)
    assert effect[:16].mean() > 0
    assert effect[-16:].mean() < 100 * effect[:16].mean()


@every_config
def test_the_state_does_not_grow_with_the_sequence(name):
    layer = from_config(name)
    assert layer.state_size(512) == layer.state_size(65_536)


@every_config
def test_it_adapts_in_eval_and_without_gradients(name):
    """What was read changes what is answered, with nothing but a forward pass."""
    layer = from_config(name).double().eval()
    x = tokens(1, 64)
    with torch.inference_mode():
        answers = [layer(x, layer(past).state).y for past in (tokens(1, 64), -tokens(1, 64))]
    assert not torch.allclose(*answers)
    assert_close(layer(x).y, layer.train()(x).y, "training mode", 1e-12)


def test_reset_restores_the_learned_memory():
    layer = from_config("titans_lmm").double()
    x = tokens(2, 40)
    before = layer(x).y
    written = layer(x).state
    assert not torch.equal(written.fast.weights[0], layer.init_state(2).fast.weights[0])
    assert torch.equal(layer(x, layer.init_state(2)).y, before)
    for weights, learned in zip(layer.init_state(2).fast.weights, layer.initial, strict=True):
        assert torch.equal(weights, learned.expand_as(weights))


def test_gates_start_where_the_documentation_says():
    layer = TestTimeMemory(16, heads=2)
    with recording() as record:
        layer(torch.randn(1, 8, 16))
    (values,) = record.by_layer(layer).values()
    assert values["forget"].mean().item() == pytest.approx(torch.tensor(-7.0).sigmoid().item())
    assert values["momentum"].mean().item() == pytest.approx(0.5)
    assert values["inner_lr"].mean().item() == pytest.approx(0.25)


def test_recall_scales_queries_as_a_call_does_where_the_convolution_has_one_tap():
    still = {"forget_gate": ForgetGate("none"), "learner": Learner(max_inner_lr=0.0)}
    layer = TestTimeMemory(16, heads=2, features=Features(conv_size=1), **still).double()
    x = tokens(2, 20, width=16)
    assert_close(layer.recall(x), layer(x).y, "recalled from a memory that learns nothing")


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        ({}, 0.5),
        ({"memory": MLP(norm=False), "chunk_size": 8}, 1 / 8),
        ({"memory": Matrix(), "learner": Learner(gradient_reference="token")}, 1.0),
        ({"learner": Learner(max_inner_lr=0.3)}, 0.3),
    ],
)
def test_steps_are_bounded_whatever_the_token_says(options, largest):
    layer = TestTimeMemory(16, heads=2, **options)
    with torch.no_grad():
        layer.gates_proj.weight.normal_(std=100.0)
        step = layer._gates(torch.randn(2, 50, 16)).inner_lr
    assert 0 <= step.min() <= step.max() <= largest
    assert step.max() > 0.9 * largest


@pytest.mark.parametrize("memory", [MLP(), Matrix()], ids=["mlp", "matrix"])
def test_channels_may_forget_all_within_a_chunk(memory):
    """Their decays fold into factors that grow as fast; in fp32 the gradient must survive that."""
    torch.manual_seed(0)
    layer = TestTimeMemory(
        32,
        heads=2,
        memory=memory,
        forget_gate=ForgetGate("channel", bias=20.0),
        learner=Learner(momentum=False),
    )
    y = layer(torch.randn(2, 64, 32)).y
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_memory_writes_and_answers():
    """Shown the same pair again and again, the memory learns it; its surprise falls."""
    torch.manual_seed(0)
    layer = TestTimeMemory(
        16, heads=1, forget_gate=ForgetGate("none"), features=Features(conv_size=1), chunk_size=4
    )
    x = torch.randn(1, 1, 16).expand(1, 200, 16)
    with recording() as record, torch.no_grad():
        layer(x)
    surprise = next(iter(record.by_layer(layer).values()))["surprise"][0, :, 0]
    assert surprise[-4:].mean() < 0.05 * surprise[:4].mean()


def test_recomputing_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = TestTimeMemory(16, heads=2, recompute=recompute).double()
        y = layer(tokens(2, 70, 16)).y
        gradients.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))
    for i, (a, b) in enumerate(zip(*gradients, strict=True)):
        assert_close(a, b, f"gradient {i}", 1e-10)


def test_rotary_positions_survive_any_split():
    for rope in ("sequence", "chunk"):
        torch.manual_seed(0)
        layer = TestTimeMemory(16, heads=2, features=Features(rope=rope), chunk_size=6).double()
        x = tokens(2, 40, 16)
        pieces = run_in_pieces(layer, x, [5, 1, 7, 27])
        assert_close(pieces.y, layer(x).y, rope)


class TestPolynomialFeatures:
    """phi(q) . phi(k) is a polynomial of q . k."""

    @pytest.mark.parametrize("degree", [2, 3])
    def test_products_are_those_of_the_truncated_exponential(self, degree):
        features = PolynomialFeatures(5, degree).double()
        q, k = tokens(1, 7, 10)[..., :5], tokens(1, 7, 10)[..., 5:]
        got = (features(q[:, :, None]) * features(k[:, :, None])).sum(-1)[..., 0]
        inner = (q * k).sum(-1)
        start = features.coefficients.detach() ** 2
        assert_close(start, torch.tensor([1.0, 1.0, 0.5, 1 / 6][: degree + 1]), "start", 1e-6)
        expected = sum(a * inner**i for i, a in enumerate(start))
        assert_close(got, expected, "product", 1e-10)

    def test_their_number_is_what_the_layer_expects(self):
        for width, degree in ((5, 2), (4, 3)):
            found = PolynomialFeatures(width, degree)(torch.zeros(1, 1, 1, width)).shape[-1]
            assert (
                found == Features(degree=degree).width(width) == math.comb(width + degree, degree)
            )

    def test_coefficients_are_learned(self):
        features = PolynomialFeatures(3, 2)
        x = F.normalize(torch.randn(1, 4, 1, 3), dim=-1)
        features(x).square().sum().backward()
        assert features.coefficients.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"heads \(3\) must divide d_model \(16\)"),
        ({"heads": 0}, "heads must be 1 or more, got 0"),
        ({"chunk_size": 0}, "chunk_size must be 1 or more, got 0"),
        ({"features": Features(degree=2)}, "needs keys as wide as values"),
        ({"memory": Slots(4)}, "need each other"),
        (
            {
                "memory": Slots(5),
                "forget_gate": ForgetGate(boundary=UnitSlots()),
                "features": Features(rope="sequence"),
            },
            "even key size, got 5",
        ),
    ],
    ids=str,
)
def test_impossible_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TestTimeMemory(16, **options)


def test_parts_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="inner_lr_per_weight needs update='chunk'"):
        Learner(inner_lr_per_weight=True)
    with pytest.raises(ValueError, match="max_inner_lr must be 0 or more, got -1"):
        Learner(max_inner_lr=-1)
    with pytest.raises(ValueError, match="degree must be 1 or more, got 0"):
        Features(degree=0)
