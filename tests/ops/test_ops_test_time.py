"""What test-time memories owe beyond the conformance of every op."""

import contextlib
import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from mneme.ops.gated_delta import gated_delta_naive
from mneme.ops.test_time import (
    MLP,
    OP,
    Boundary,
    DotProduct,
    Gates,
    Huber,
    LpError,
    LqNorm,
    Matrix,
    RowNorm,
    Rule,
    Slots,
    Softmax,
    SquaredError,
    SwiGLU,
    UnitSlots,
    memorize,
    memorize_naive,
    newton_schulz,
    recall,
)
from mneme.ops.test_time.examples import REGIMES, Regime, inputs_of
from mneme.ops.test_time.memories import ACTIVATIONS
from tests.ops.calls import cut, make, replaced, results, tensors
from tests.ops.closeness import assert_close

every_regime = pytest.mark.parametrize("regime", REGIMES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def tokens(length: int = 20, width: int = 6) -> dict[str, Tensor]:
    shape = (2, length, 3, width)
    return {"q": unit(*shape, seed=1), "k": unit(*shape, seed=2), "v": normal(*shape, seed=3)}


def zeros(rule: Rule, width: int = 6):
    shapes = rule.memory.shapes(width, width)
    return rule.start(tuple(torch.zeros(2, 3, *s, dtype=torch.float64) for s in shapes))


class TestReductions:
    """Papers that are special cases of each other are, to rounding."""

    def test_linear_attention(self):
        """Dot product, no decay, no momentum: every pair is added once."""
        rule = Rule(memory=Matrix(), objective=DotProduct(), momentum=False, chunk=7)
        x = tokens()
        gates = Gates(torch.ones(2, 20, 3, 1, dtype=torch.float64))
        y, _ = memorize(**x, gates=gates, state=zeros(rule), rule=rule)
        scores = torch.einsum("bthd,bshd->bhts", x["q"], x["k"]).tril()
        assert_close({"y": y}, {"y": torch.einsum("bhts,bshd->bthd", scores, x["v"])}, 1e-12)

    @pytest.mark.parametrize("chunk", [1, 6, 16])
    def test_gated_delta_rule(self, chunk):
        """Without momentum, with exact errors; it takes the error after the decay, we before."""
        rule = Rule(memory=Matrix(), gradient_reference="token", momentum=False, chunk=chunk)
        x, keep = tokens(), normal(2, 20, 3, 1, seed=4).sigmoid()
        theta = normal(2, 20, 3, 1, seed=5).sigmoid()
        y, state = memorize(
            **x, gates=Gates(theta, log_keep=keep.log()), state=zeros(rule), rule=rule
        )
        delta = gated_delta_naive(
            x["q"],
            x["k"],
            keep * x["v"],
            keep.log()[..., 0],
            (theta / keep)[..., 0],
            scale=1.0,
        )
        got = {"y": y, "state": state.weights[0]}
        assert_close(got, dict(zip(("y", "state"), delta, strict=True)), 1e-12)

    def test_ttt_linear(self):
        """The dual form of its mini-batch: `G[t, j] = theta_j / t`."""
        rule = Rule(
            memory=MLP(depth=1, residual=False, norm=False),
            update="average",
            decay="none",
            momentum=False,
            chunk=4,
        )
        x, theta = tokens(8), normal(2, 8, 3, 1, seed=5).sigmoid()
        w = normal(2, 3, 6, 6, seed=6)
        position = 1 / torch.arange(1, 5, dtype=torch.float64)
        slow = OP.inputs(torch.Generator(), 1, 1, regime="averaged")["slow"]
        slow = slow._replace(gain=None, bias=None, position=position)
        y, _ = memorize(**x, gates=Gates(theta), state=rule.start((w,)), rule=rule, slow=slow)
        q, k, v, step = (t.transpose(1, 2) for t in (x["q"], x["k"], x["v"], theta))
        expected = []
        for start in (0, 4):
            part = slice(start, start + 4)
            error = k[:, :, part] @ w - v[:, :, part]
            mix = (position[:, None] * step[:, :, part].mT).tril()
            read = q[:, :, part] @ w - (mix * (q[:, :, part] @ k[:, :, part].mT)) @ error
            expected.append(read)
            w = w - (position[-1] * step[:, :, part] * k[:, :, part]).mT @ error
        assert_close({"y": y}, {"y": torch.cat(expected, 2).transpose(1, 2)}, 1e-12)

    def test_a_chunk_of_one_is_online_learning(self):
        """Gradients at the chunk's start are then those at the weights before the token."""
        stale, exact = (
            Rule(memory=Matrix(), chunk=1),
            Rule(memory=Matrix(), chunk=16, gradient_reference="token"),
        )
        inputs = make(OP, 40, regime="exact")
        start = inputs["state"]
        outputs = [
            memorize(**inputs | {"rule": rule, "state": rule.start(start.weights)})[0]
            for rule in (stale, exact)
        ]
        assert_close({"y": outputs[0]}, {"y": outputs[1]}, 1e-12)

    def test_exact_errors_make_the_chunk_a_tiling_choice(self):
        inputs = make(OP, 70, regime="exact")
        rule, start = inputs["rule"], inputs["state"].weights
        whole = [
            results(
                memorize,
                inputs | {"rule": replace(rule, chunk=c), "state": rule.start(start)},
            )
            for c in (1, 5, 64, 128)
        ]
        for other in whole[1:]:
            assert_close(other, whole[0], 1e-12)

    def test_a_window_of_one_is_no_window(self):
        inputs = make(OP, 40, regime="window")
        rule = replace(inputs["rule"], window=2)
        only_itself = torch.zeros(2, 40, 3, 2, dtype=torch.float64)
        only_itself[..., 0] = 1.0
        gates, start = inputs["gates"], inputs["state"].weights
        windowed = inputs | {
            "rule": rule,
            "gates": gates._replace(window=only_itself),
            "state": rule.start(start),
        }
        plain = inputs | {
            "rule": (alone := replace(rule, window=1)),
            "gates": gates._replace(window=None),
            "state": alone.start(start),
        }
        assert_close({"y": memorize(**windowed)[0]}, {"y": memorize(**plain)[0]}, 1e-12)


class TestInnerGradients:
    """The analytic pieces against automatic differentiation."""

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_slope_is_the_derivative_twice_differentiable(self, name):
        activation, z = ACTIVATIONS[name], normal(50).requires_grad_()
        value, slope = activation.with_slope(z)
        (expected,) = torch.autograd.grad(activation.value(z).sum(), z)
        assert_close(
            {"value": value, "slope": slope},
            {"value": activation.value(z), "slope": expected},
            1e-12,
        )
        assert torch.autograd.gradcheck(activation.with_slope, (z,))

    @pytest.mark.parametrize(
        ("objective", "loss"),
        [
            (SquaredError(), lambda r, v, y, d: 0.5 * (r * r).sum()),
            (DotProduct(), lambda r, v, y, d: -(y * v).sum()),
            (
                Huber("clip"),
                lambda r, v, y, d: torch.where(
                    r.norm(dim=-1) <= d[..., 0],
                    0.5 * (r * r).sum(-1),
                    d[..., 0] * (r.norm(dim=-1) - d[..., 0] / 2),
                ).sum(),
            ),
        ],
        ids=["squared", "dot", "huber"],
    )
    def test_errors_are_derivatives_of_their_losses(self, objective, loss):
        y, v, delta = normal(40, 5).requires_grad_(), normal(40, 5, seed=1), 0.5 + unit(40, 1).abs()
        (expected,) = torch.autograd.grad(loss(y - v, v, y, delta), y)
        assert_close({"error": objective.error(y, v, delta)}, {"error": expected}, 1e-9)

    def test_lp_error_away_from_zero_is_the_derivative_of_the_lp_loss(self):
        r = normal(200)
        r = (r[r.abs() > 0.7])[:, None]
        error = LpError(3.0).error(r, torch.zeros_like(r), None)
        assert_close({"error": error}, {"error": 3 * r.sign() * r * r}, 1e-4)

    def test_the_sign_form_of_huber_leaves_small_errors_alone(self):
        r, delta = torch.tensor([[0.3, 0.4], [3.0, -4.0]]), torch.ones(2, 1)
        error = Huber("sign").error(r, torch.zeros_like(r), delta)
        torch.testing.assert_close(error, torch.tensor([[0.3, 0.4], [1.0, -1.0]]))

    @pytest.mark.parametrize("form", ["decode", "encode", "similarity"])
    def test_slots_gradient_is_that_through_their_normalization(self, form):
        """Reading slots as directions makes their gradient tangent to the sphere."""
        p, k, v = unit(1, 4, 6).requires_grad_(), normal(1, 1, 4, seed=1), normal(1, 1, 6, seed=2)
        slots = F.normalize(p, dim=-1)
        code, value = v @ slots.mT, k @ slots
        losses = {
            "decode": 0.5 * (value - v).square().sum(),
            "encode": 0.5 * (code - k).square().sum(),
            "similarity": -(code * k).sum(),
        }
        (expected,) = torch.autograd.grad(losses[form], p)
        rule = Rule(memory=Slots(4, form), boundary=UnitSlots(), momentum=False, chunk=2)
        state = rule.start((p.detach()[:, None],))
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        shaped = {"q": k[:, None], "k": k[:, None], "v": v[:, None]}
        _, after = memorize(**shaped, gates=Gates(one), state=state, rule=rule)
        assert_close({"u": p - after.weights[0][:, 0]}, {"u": expected}, 1e-12)

    @every_regime
    def test_surprise_is_the_norm_of_the_inner_gradient(self, regime):
        """With a step of one token at a time, the naive form shows each gradient by its effect."""
        if regime.startswith("exact") or "window" in regime or regime in ("muon", "chunk_of_one"):
            pytest.skip("the state moves by other tokens' gradients, or at other weights")
        inputs = make(OP, 3, regime=regime)
        rule, seen = inputs["rule"], {}
        memorize(**inputs, watch=lambda name, x: seen.update({name: x}))
        assert seen["surprise"].shape == (2, 3, 3)
        state = inputs["state"]
        for t in range(3):
            piece = cut(inputs, OP, t, t + 1)
            gates = piece["gates"]
            still, one = torch.zeros_like(gates.inner_lr), torch.ones_like(gates.inner_lr)
            fixed = gates._replace(
                log_keep=None if gates.log_keep is None else torch.zeros_like(gates.log_keep),
                log_momentum=None
                if gates.log_momentum is None
                else torch.zeros_like(gates.log_momentum),
            )
            moved, stayed = (
                memorize_naive(
                    **piece
                    | {
                        "gates": fixed._replace(inner_lr=s),
                        "state": state._replace(offset=state.offset[:, :0]),
                        "rule": replace(rule, chunk=max(rule.chunk, 2)),
                    }
                )[1]
                for s in (one, still)
            )
            where = "weights" if rule.update == "token" else "pending"
            pairs = zip(getattr(moved, where), getattr(stayed, where), strict=True)
            square = sum((a - b).square().sum((-2, -1)) for a, b in pairs)
            assert_close({"surprise": seen["surprise"][:, t]}, {"surprise": square.sqrt()}, 1e-6)


class TestBehavior:
    """What users rely on."""

    @every_regime
    def test_a_step_of_zero_changes_nothing(self, regime):
        """Without decay and steps, the memory still answers, and still knows what it knew."""
        inputs = make(OP, 2 * REGIMES[regime].rule.chunk + 3, regime=regime)
        rule, gates = inputs["rule"], inputs["gates"]
        shapes = [w.shape for w in inputs["state"].weights]
        first = rule.start(tuple(normal(*s, seed=i) for i, s in enumerate(shapes)))
        if isinstance(rule.boundary, RowNorm):
            norms = [w[0].norm(dim=-2, keepdim=True) for w in first.weights]
            first = first._replace(weights=tuple(w[:1].expand_as(w).clone() for w in first.weights))
            inputs["slow"] = inputs["slow"]._replace(norms=tuple(norms))
        still = gates._replace(inner_lr=torch.zeros_like(gates.inner_lr), log_keep=None)
        _, after = memorize(**inputs | {"gates": still, "state": first})
        named = {f"w{i}": w for i, w in enumerate(after.weights)}
        assert_close(named, {f"w{i}": w for i, w in enumerate(first.weights)}, 1e-9)

    @every_regime
    def test_it_learns_without_gradients_as_with_them(self, regime):
        inputs = make(OP, 40, regime=regime)
        leaves = {path: x.detach().requires_grad_() for path, x in tensors(inputs).items()}
        with_gradients = results(memorize, replaced(inputs, leaves))
        with torch.no_grad():
            assert_close(results(memorize, inputs), with_gradients, 1e-12)
            assert_close(results(memorize_naive, inputs), with_gradients, 1e-10)
        with torch.inference_mode():
            assert_close(results(memorize, inputs), with_gradients, 1e-12)

    @every_regime
    def test_recall_reads_what_the_last_token_read(self, regime):
        inputs = make(OP, 21, regime=regime)
        y, state = memorize(**inputs)
        if state.offset.shape[1] == 0:
            pytest.skip("the chunk ended with the last token: the next one reads other weights")
        got = recall(inputs["q"][:, -1:], state, rule=inputs["rule"], slow=inputs["slow"])
        assert_close({"y": got}, {"y": y[:, -1:]}, 1e-10)

    @every_regime
    def test_recomputing_changes_nothing(self, regime):
        inputs = make(OP, 70, regime=regime)
        leaves = {path: x.detach().requires_grad_() for path, x in tensors(inputs).items()}
        gradients = []
        for recompute in (False, True):
            y, _ = memorize(**replaced(inputs, leaves), recompute=recompute)
            grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
            gradients.append({p: g for p, g in zip(leaves, grads, strict=True) if g is not None})
        assert_close(gradients[1], gradients[0], 1e-12)

    @every_regime
    def test_tokens_of_zeros_are_harmless(self, regime):
        """A fully masked chunk: keys, queries and values of zero, written with ordinary gates."""
        inputs = make(OP, 40, regime=regime)
        blank = {name: torch.zeros_like(inputs[name]) for name in ("q", "k", "v")}
        arguments = inputs | blank
        leaves = {path: x.detach().requires_grad_() for path, x in tensors(arguments).items()}
        out = results(memorize, replaced(arguments, leaves))
        assert all(x.isfinite().all() for x in out.values())
        loss = sum(x.square().sum() for x in out.values())
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)

    def test_states_of_copies_are_independent(self):
        inputs = make(OP, 30)
        _, state = memorize(**inputs)
        rows = torch.tensor([0, 0, 1])
        beams = tree_map_only(Tensor, lambda x: x.index_select(0, rows), state)
        before = tree_map_only(Tensor, torch.clone, beams)
        three = {name: inputs[name][rows] for name in ("q", "k", "v")}
        three["v"][1] += 1.0
        gates = tree_map_only(Tensor, lambda x: x[rows], inputs["gates"])
        y, after = memorize(**inputs | three | {"gates": gates, "state": beams})
        alone, _ = memorize(**inputs | {"state": state})
        assert_close({"first": y[0], "last": y[2]}, {"first": alone[0], "last": alone[1]}, 1e-12)
        assert not torch.allclose(y[0], y[1])
        assert not torch.equal(after.weights[0][0], after.weights[0][1])
        for a, b in zip(tensors(beams).values(), tensors(before).values(), strict=True):
            assert torch.equal(a, b)

    def test_the_state_does_not_grow(self):
        inputs = make(OP, 64, regime="window_momentum")
        sizes = []
        for length in (10, 30, 60):
            state = memorize(**cut(inputs, OP, 0, length))[1]
            sizes.append({p: x.shape for p, x in tensors(state).items() if "offset" not in p})
        assert sizes[0] == sizes[1] == sizes[2]


class TestBoundaries:
    """The maps where chunks meet."""

    def test_newton_schulz_brings_singular_values_near_one(self):
        for shape in ((3, 8, 5), (2, 5, 8)):
            values = torch.linalg.svdvals(newton_schulz(normal(*shape)))
            assert values.min() > 0.6
            assert values.max() < 1.3
        assert newton_schulz(torch.zeros(1, 4, 4)).abs().max() == 0

    def test_row_norm_restores_each_units_norm(self):
        norms = 1 + unit(2, 1, 5).abs()
        settled = RowNorm().settle(normal(2, 7, 5), norms)
        assert_close({"n": settled.norm(dim=-2, keepdim=True)}, {"n": norms}, 1e-9)

    @pytest.mark.parametrize("q", [2.5, 4.0])
    def test_lq_norm_starts_from_the_weights_given(self, q):
        boundary, w = LqNorm(q), normal(2, 7, 5)
        a = boundary.start(w)
        assert_close({"w": boundary.view(a)}, {"w": w}, 1e-5)
        mean = (a.abs() ** q).mean((-2, -1), keepdim=True) ** (1 / q)
        assert_close({"w": boundary.view(a)}, {"w": a / mean ** (q - 2)}, 1e-5)

    def test_softmax_ignores_what_the_paper_normalizes_away(self):
        """`softmax(alpha log W - eta u)` step by step is the softmax of an unnormalized sum."""
        boundary, a, w = Softmax(2.0), normal(3, 6, 4), None
        w = boundary.view(a)
        for seed in range(5):
            u = normal(3, 6, 4, seed=seed + 1)
            a = 0.9 * a - 0.1 * u
            w = 2.0 * torch.softmax(0.9 * (w / 2.0).log() - 0.1 * u, -2)
        assert_close({"w": boundary.view(a)}, {"w": w}, 1e-12)

    def test_unit_slots_stay_on_the_sphere(self):
        state = memorize(**make(OP, 50, regime="slots_decode"))[1]
        norms = state.reference[0].norm(dim=-1)
        assert (norms - 1).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"gradient_reference": "token"}, "needs a matrix memory"),
        (
            {"gradient_reference": "token", "memory": Matrix(), "read_before": True},
            "needs update='token'",
        ),
        ({"update": "chunk"}, "needs reads before the write"),
        ({"orthogonal": True}, "need update='chunk'"),
        ({"boundary": Softmax()}, "Softmax needs reads before the write"),
        ({"boundary": UnitSlots()}, "need each other"),
        ({"memory": Slots(4)}, "need each other"),
        ({"update": "average"}, "has no momentum"),
        ({"window": 2, "memory": MLP(bias=True)}, "without biases"),
        ({"chunk": 0}, "chunk must be 1 or more, got 0"),
        ({"update": "average", "momentum": False}, "needs decay='none'"),
        ({"decay": "channel"}, "no momentum and no window"),
        ({"window": 3, "objective": Huber()}, "needs window=1"),
        (
            {"memory": Slots(4, "encode"), "boundary": UnitSlots(), "objective": DotProduct()},
            "leave SquaredError",
        ),
    ],
    ids=str,
)
def test_choices_that_do_not_go_together_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Rule(**choices)


def accepted_rules(count: int) -> list[Rule]:
    """A fixed sample of all the combinations of choices that `Rule` lets pass."""
    choices = {
        "memory": [
            MLP(expand=1),
            MLP(depth=1, norm=False),
            MLP(depth=3, expand=1),
            MLP(bias=True, expand=1),
            Matrix(),
            SwiGLU(),
            Slots(3),
            Slots(3, "encode"),
        ],
        "objective": [SquaredError(), DotProduct(), LpError(), Huber("clip")],
        "boundary": [Boundary(), RowNorm(), LqNorm(), Softmax(), UnitSlots()],
        "update": ["token", "average", "chunk"],
        "decay": ["none", "head", "channel"],
        "gradient_reference": ["chunk", "token"],
        "momentum": [True, False],
        "orthogonal": [True, "scheduled", False],
        "outer_lr": [True, False],
        "window": [1, 3],
        "read_before": [True, False],
    }
    rules = []
    for values in itertools.product(*choices.values()):
        with contextlib.suppress(ValueError):
            rules.append(Rule(chunk=4, **dict(zip(choices, values, strict=True))))
    return random.Random(0).sample(rules, count)


def test_whatever_is_accepted_is_computed_as_specified():
    for rule in accepted_rules(150):
        regime = Regime(rule)
        generator = torch.Generator().manual_seed(0)
        inputs = inputs_of(regime, generator, 1, 10, torch.float64, 1, 4)
        with torch.no_grad():
            fast, naive = results(memorize, inputs), results(memorize_naive, inputs)
        try:
            assert_close(fast, naive, 1e-8)
        except AssertionError as error:
            raise AssertionError(f"{rule}: {error}") from None


def test_parts_refuse_impossible_values():
    with pytest.raises(ValueError, match="depth must be 1 to 4, got 5"):
        MLP(depth=5)
    with pytest.raises(ValueError, match=r"expand=0\.01 leaves no hidden unit"):
        MLP(expand=0.01).shapes(4, 4)
    with pytest.raises(ValueError, match="a Matrix has depth 1"):
        Matrix(residual=True)
    with pytest.raises(ValueError, match="slots must be 1 or more, got 0"):
        Slots(0)
    with pytest.raises(ValueError, match="p must be 1 or more"):
        LpError(0.5)
    with pytest.raises(ValueError, match="q must be above 2 and not 3"):
        LqNorm(3)
    with pytest.raises(ValueError, match="keys as wide as values, got 4 and 6"):
        SwiGLU(residual=True).shapes(4, 6)


def test_flops_are_those_of_the_two_layer_memory():
    """22 d h + 4 C (d + h) a token and head with momentum, for d - h - d."""
    d, h, c = 8, 32, 16
    inputs = make(OP, 5, batch=1, heads=1, width=d)
    assert math.isclose(OP.flops(inputs), 5 * (22 * d * h + 4 * c * (d + h)))


def test_boundary_alone_is_no_map():
    w = normal(2, 3, 4)
    boundary = Boundary()
    assert boundary.settle(w, None) is w
    assert boundary.view(w) is w
    assert boundary.scale(w) is None
