import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mneme.tasks import MQAR, ForgettingMQAR
from mneme.tasks.batch import IGNORE
from mneme.tasks.recall import make_forgetting_mqar, make_mqar, solve_mqar


@st.composite
def sizes(draw):
    """Any sizes that fit, up to the tightest: all keys or values used, no room left."""
    pairs = draw(st.integers(1, 8))
    rewrites = draw(st.integers(0, pairs))
    rounds = draw(st.integers(1, 3))
    written = pairs + rounds * rewrites
    return {
        "vocab_size": 2 * (max(pairs + 1, written) + draw(st.integers(0, 200))),
        "seq_len": 2 * (written + pairs) + 2 * draw(st.integers(0, 30)),
        "pairs": pairs,
        "rewrites": rewrites,
        "rounds": rounds,
        "random_filler": draw(st.booleans()),
    }


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(0, 2**32 - 1))
def test_every_example_is_as_the_task_says(size, seed):
    batch = make_forgetting_mqar(np.random.default_rng(seed), 5, **size)
    pairs, rewrites, rounds = size["pairs"], size["rewrites"], size["rounds"]
    written, half = pairs + rounds * rewrites, size["vocab_size"] // 2
    assert batch.inputs.shape == batch.targets.shape == (5, size["seq_len"])
    columns = (batch.inputs, batch.targets, batch.slices["gap"], batch.slices["rewritten"])
    for inputs, targets, gaps, times in zip(*(c.tolist() for c in columns), strict=True):
        keys, values = inputs[0 : 2 * written : 2], inputs[1 : 2 * written : 2]
        assert len(set(keys)) == len(set(keys[:pairs])) == pairs
        for start in range(pairs, written, rewrites or 1):
            assert len(set(keys[start : start + rewrites])) == rewrites
        assert len(set(values)) == written
        assert all(1 <= key < half for key in keys)
        assert all(half <= value < 2 * half for value in values)
        asked = [place for place, target in enumerate(targets) if target != IGNORE]
        assert sorted(inputs[place] for place in asked) == sorted(keys[:pairs])
        assert all(place >= 2 * written and place % 2 == 0 for place in asked)
        for place in asked:
            writings = [index for index, key in enumerate(keys) if key == inputs[place]]
            assert targets[place] == values[writings[-1]]
            assert gaps[place] == place - 2 * writings[-1]
            assert times[place] == len(writings) - 1
        filler = [inputs[p] for p in range(2 * written, len(inputs)) if p not in asked]
        assert not set(filler) & set(keys)
        assert all(0 <= token < 2 * half for token in filler)
        assert size["random_filler"] or not any(filler)
        assert not any(gaps[p] or times[p] for p in range(len(inputs)) if p not in asked)
    assert batch.slices["pairs"].tolist() == [pairs] * 5
    assert batch.slices["length"].tolist() == [size["seq_len"]] * 5


def score(task, answer):
    """The metrics of a solver, from tokens to logits, on the test set."""
    metrics = task.metrics()
    for batch in task.eval_batches("test"):
        metrics.update(answer(batch.inputs), batch)
    return metrics.compute()


@pytest.mark.parametrize("random_filler", [False, True])
def test_the_dictionary_solver_is_always_right(random_filler):
    task = ForgettingMQAR(
        pairs=[1, 4, 16], rounds=2, random_filler=random_filler, test_examples=200, batch_size=100
    )
    results = score(task, lambda inputs: one_hot(solve_mqar(inputs), 256))
    accuracies = {name: value for name, value in results.items() if "accuracy" in name}
    assert set(accuracies.values()) == {1.0}
    assert {"accuracy/pairs=1", "accuracy/pairs=16", "accuracy/length=128"} <= accuracies.keys()
    assert {f"accuracy/rewritten={times}" for times in (0, 1, 2)} <= accuracies.keys()
    assert "accuracy/gap=33-64" in accuracies


def one_hot(tokens, vocab):
    return torch.nn.functional.one_hot(tokens, vocab).float()


def first_value(inputs):
    """What followed the first occurrence of each token: a memory that is never written twice."""
    first = (inputs[:, :, None] == inputs[:, None, :]).int().argmax(2)
    return inputs.roll(-1, 1).gather(1, first)


@pytest.mark.parametrize(
    ("rewrites", "rounds", "kept"), [(0, 1, 1), (4, 1, 3 / 4), (0.5, 2, 1 / 4), ("all", 1, 0)]
)
def test_the_first_value_is_right_where_nothing_was_rewritten_and_only_there(
    rewrites, rounds, kept
):
    task = ForgettingMQAR(pairs=16, rewrites=rewrites, rounds=rounds, test_examples=500)
    results = score(task, lambda inputs: one_hot(first_value(inputs), 256))
    groups = {int(k.split("=")[1]): v for k, v in results.items() if k.startswith("accuracy/rew")}
    assert groups == {times: float(times == 0) for times in groups}
    # 8,000 keys: of half of them in two rounds, one standard deviation is below 0.005
    assert results["accuracy"] == pytest.approx(kept, abs=0.025 if rounds > 1 else 0)
    assert task.baselines("test")["the first value"] == task.first_value_level == kept


def matrix_memory(inputs, vocab, overwrite):
    """Reads a matrix written with exact keys, after adding each value or in place of the old."""
    memory = torch.zeros(len(inputs), vocab, vocab)
    rows = torch.arange(len(inputs))
    read = []
    for before, token in zip(inputs.T, inputs.T[1:], strict=False):
        if overwrite:
            memory[rows, before] = 0
        memory[rows, before, token] += 1
        read.append(memory[rows, token])
    return torch.stack([torch.zeros(len(inputs), vocab), *read], dim=1)


def test_adding_up_cannot_tell_the_last_value_and_overwriting_can():
    task = ForgettingMQAR(
        pairs=8, rewrites="all", rounds=2, vocab_size=64, test_examples=400, batch_size=400
    )
    noise = torch.rand(400, 128, 64, generator=torch.Generator().manual_seed(0)) / 2
    added = score(task, lambda inputs: matrix_memory(inputs, 64, overwrite=False) + noise)
    # 3,200 answers: one standard deviation is 0.008
    assert added["accuracy/rewritten=2"] == pytest.approx(1 / 3, abs=0.04)
    assert score(task, lambda inputs: matrix_memory(inputs, 64, overwrite=True))["accuracy"] == 1


def test_guessing_reaches_the_guess_level():
    task = ForgettingMQAR(vocab_size=32, pairs=8, test_examples=2000, batch_size=500)
    generator = torch.Generator().manual_seed(0)

    def guess(inputs):
        noise = torch.rand(*inputs.shape, 32, generator=generator)
        noise[..., :16] = -1  # never a key
        return noise

    # 16,000 answers: one standard deviation is 0.002
    assert score(task, guess)["accuracy"] == pytest.approx(task.chance_level, abs=0.008)
    assert task.chance_level == 1 / 16


def test_every_key_is_equally_likely_to_be_rewritten_and_in_any_order():
    rng, rows = np.random.default_rng(0), 12_000
    size = {"vocab_size": 64, "seq_len": 24, "pairs": 4, "rewrites": 2, "rounds": 2}
    inputs = make_forgetting_mqar(rng, rows, **size).inputs
    drawn = (inputs[:, 8:16:2, None] == inputs[:, None, 0:8:2]).int().argmax(2)  # [rows, 2 * 2]
    cells = torch.bincount(drawn @ torch.tensor([64, 16, 4, 1]), minlength=256).double()
    wanted = rows / 12**2  # two ordered choices of two keys, one after the other
    found = cells[cells > 0]
    assert len(found) == 12**2
    chi_squared, freedom = ((found - wanted) ** 2 / wanted).sum(), 12**2 - 1
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_without_rewriting_it_is_mqar():
    size = {"vocab_size": 256, "seq_len": 64, "pairs": 8, "random_filler": True}
    plain = make_mqar(np.random.default_rng(5), 20, **size)
    none = make_forgetting_mqar(np.random.default_rng(5), 20, **size, rewrites=0, rounds=3)
    assert torch.equal(plain.inputs, none.inputs)
    assert torch.equal(plain.targets, none.targets)
    assert not none.slices["rewritten"].any()


@pytest.mark.parametrize(
    ("rewrites", "keys"), [(2, [2, 2, 2]), (0.5, [2, 2, 8]), (0.01, [1, 1, 1]), ("all", [3, 4, 16])]
)
def test_rewrites_are_a_number_a_share_or_all(rewrites, keys):
    task = ForgettingMQAR(pairs=[3, 4, 16], rewrites=rewrites, test_examples=5, batch_size=5)
    counts = [batch.slices["rewritten"].sum(1) for batch in task.eval_batches("val")]
    assert [count.tolist() for count in counts] == [[number] * 5 for number in keys]


GOLDEN = {0: "881f3849cc111361", 1: "0c3923f576338ba8"}


@pytest.mark.parametrize("seed", GOLDEN)
def test_the_examples_of_a_seed_never_change(seed):
    task = ForgettingMQAR(seed=seed, batch_size=4, rounds=2, random_filler=True)
    batch = task.train_batch(0)
    content = batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN[seed]


def test_queries_stand_where_those_of_mqar_do():
    task = ForgettingMQAR(pairs=8, rewrites="all", seq_len=80, batch_size=4000)
    plain = MQAR(pairs=8, seq_len=64, batch_size=4000)  # as many slots: 80 - 32 = 64 - 16
    batches = ((task.train_batch(0), 32), (plain.train_batch(0), 16))
    places = [(batch.targets != IGNORE).nonzero()[:, 1] - start for batch, start in batches]
    means = [float(place.double().mean()) for place in places]
    # 32,000 positions of standard deviation 13: one of the difference is at most 0.11
    assert means[0] == pytest.approx(means[1], abs=0.55)


def test_facts_say_what_a_solver_reaches():
    facts = ForgettingMQAR(pairs=[4, 8], rewrites=2, rounds=2).facts()
    assert facts["first_value_level"] == pytest.approx((4 * 0.5**2 + 8 * 0.75**2) / 12)
    assert facts["guess_level_from_context"] == pytest.approx((1 / 4 + 1 / 8) / 2)
    assert (facts["rewrites"], facts["rounds"]) == ("2", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 22}, r"22 \+ 1 \* 11 = 33 pairs are written .* 2 \* 33 \+ 2 \* 22 = 110 > 100"),
        ({"pairs": 5, "rewrites": "all", "rounds": 9}, r"use seq_len >= 110, or fewer pairs"),
        ({"pairs": 4, "test_pairs": [4, 25]}, r"pairs \(25\), rewrites \(12\) and rounds \(1\)"),
        ({"vocab_size": 16, "pairs": 6}, r"6 \+ 1 \* 3 = 9 .* 16 / 2 = 8; use vocab_size >= 18"),
        ({"vocab_size": 16}, r"vocab_size \(16\) has 16 / 2 - 1 = 7; use vocab_size >= 18"),
        ({"rewrites": 9}, r"rewrites \(9\) must be from 0 to pairs \(8\), .* a share such as 0.5"),
        ({"rewrites": -1}, r"rewrites \(-1\) must be from 0 to pairs \(8\)"),
        ({"rewrites": 1.0}, r"rewrites \(1.0\) as a share .* between 0 and 1; use 'all' for every"),
        ({"rounds": 0}, r"rounds \(0\) must be at least 1; without rewriting: rewrites = 0"),
        ({"vocab_size": 255}, r"vocab_size \(255\) and seq_len \(100\) must be even"),
        ({"pairs": 0}, r"pairs \(0\) must be at least 1"),
    ],
)
def test_what_does_not_fit_is_explained_with_the_arithmetic(options, message):
    with pytest.raises(ValueError, match=message):
        ForgettingMQAR(**({"seq_len": 100} | options))
