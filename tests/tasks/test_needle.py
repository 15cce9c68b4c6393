import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mneme.tasks import Needle, RecallMixture
from mneme.tasks.batch import IGNORE
from mneme.tasks.recall import make_needle, solve_needle
from mneme.tasks.recall.needle import MARKER


@st.composite
def sizes(draw):
    """Any sizes that fit, up to the tightest: one token of noise."""
    value_length = draw(st.integers(1, 12))
    return {
        "vocab_size": 4 * draw(st.integers(2, 40)),
        "seq_len": 2 * value_length + 4 + draw(st.integers(0, 60)),
        "value_length": value_length,
        "period": draw(st.integers(1, 80)),
        "fixed_noise": draw(st.booleans()),
    }


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(0, 2**32 - 1))
def test_every_example_is_as_the_task_says(size, seed):
    batch = make_needle(np.random.default_rng(seed), 5, **size)
    value_length, period, quarter = size["value_length"], size["period"], size["vocab_size"] // 4
    assert batch.inputs.shape == batch.targets.shape == (5, size["seq_len"])
    rows = zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.slices["depth"].tolist(), strict=True
    )
    for inputs, targets, depth in rows:
        start, asked = (place for place, token in enumerate(inputs) if token == MARKER)
        key, *value = inputs[start + 1 : start + 2 + value_length]
        assert quarter <= key < 2 * quarter
        assert all(2 * quarter <= token < 4 * quarter for token in value)
        assert inputs[asked:] == [MARKER, key, *value[:-1]]
        assert targets == [IGNORE] * (asked + 1) + value
        noise = inputs[:start] + inputs[start + 2 + value_length : asked]
        assert all(1 <= token < quarter for token in noise)
        assert noise[period:] == noise[:-period]
        assert depth == 10 * start // (len(noise) + 1)
        if size["fixed_noise"]:
            wanted = [1 + place % period % (quarter - 1) for place in range(len(noise))]
            assert noise == wanted
    assert batch.slices["value_length"].tolist() == [value_length] * 5
    assert batch.slices["length"].tolist() == [size["seq_len"]] * 5


def score(task, answer):
    """The metrics of a solver, from tokens to answers, on the test set."""
    metrics = task.metrics()
    for batch in task.eval_batches("test"):
        answers = torch.nn.functional.one_hot(answer(batch.inputs), task.vocab_size)
        metrics.update(answers.float(), batch)
    return metrics.compute()


def test_the_solver_is_always_right():
    task = Needle(seq_len=128, value_length=[1, 7, 32], test_examples=200, batch_size=100)
    results = score(task, solve_needle)
    accuracies = {name: value for name, value in results.items() if "accuracy" in name}
    assert set(accuracies.values()) == {1.0}
    assert {f"accuracy/value_length={length}" for length in (1, 7, 32)} <= accuracies.keys()
    assert {f"accuracy/depth={tenth}" for tenth in range(10)} <= accuracies.keys()
    assert {"accuracy/length=128", "exact_sequence_accuracy"} <= accuracies.keys()


def within(window, vocab, generator):
    """The perfect solver that reads the last tokens only, and guesses a value otherwise."""

    def answer(inputs):
        guesses = torch.randint(vocab // 2, vocab, inputs.shape, generator=generator)
        answers = solve_needle(inputs[:, -window:])
        known = answers != MARKER
        guesses[:, -window:][known] = answers[known]
        return guesses

    return answer


@pytest.mark.parametrize("value_length", [1, 7])
def test_who_sees_the_end_only_is_at_the_guess_level(value_length):
    task = Needle(
        seq_len=240, value_length=value_length, vocab_size=32, test_examples=4000, batch_size=1000
    )
    blind = within(20, 32, torch.Generator().manual_seed(0))
    results = score(task, blind)
    # 4000 examples: one standard deviation is 0.004 of all answers, 0.012 of those of a tenth
    assert task.chance_level == 1 / 16
    for depth in range(9):
        assert results[f"accuracy/depth={depth}"] == pytest.approx(1 / 16, abs=0.06)
    below = [results[f"accuracy/depth={depth}"] for depth in range(9)]
    assert np.mean(below) == pytest.approx(1 / 16, abs=0.02)
    # An insert that starts in the window of 20 does so in the last tenth, and is read.
    places = 240 - 2 * value_length - 2
    seen = (20 - 2 * value_length - 2) / places
    assert results["accuracy"] == pytest.approx(seen + (1 - seen) / 16, abs=0.025)


def features(inputs, window, vocab):
    """Which token stands at each of the last positions, `[B, window * vocab]`."""
    return torch.nn.functional.one_hot(inputs[:, -window:], vocab).flatten(1).double()


@pytest.mark.parametrize("value_length", [1, 3])
@pytest.mark.parametrize("fixed_noise", [False, True])
def test_nothing_outside_the_insert_tells_of_the_value(value_length, fixed_noise):
    """A linear reader of the last tokens learns nothing; shown the insert, it learns all."""
    options = {"vocab_size": 32, "seq_len": 40, "value_length": value_length, "period": 4}
    rng = np.random.default_rng(0)
    train = make_needle(rng, 6000, **options, fixed_noise=fixed_noise)
    test = make_needle(rng, 6000, **options, fixed_noise=fixed_noise)
    window = 16

    def accuracy(train_rows, test_rows):
        read = features(train.inputs[train_rows], window, 32)
        wanted = torch.nn.functional.one_hot(train.targets[train_rows, -1], 32).double()
        ridge = read.T @ read + 1e-3 * torch.eye(read.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(ridge, read.T @ wanted)
        answers = (features(test.inputs[test_rows], window, 32) @ weights).argmax(1)
        return (answers == test.targets[test_rows, -1]).double().mean()

    def rows(batch, allowed):
        first = (batch.inputs == MARKER).int().argmax(1)
        return allowed(first).nonzero().squeeze(1)

    edge = 40 - window
    before = edge - value_length - 2  # an insert that starts later reaches into the window
    hidden = [rows(batch, lambda first: first <= before) for batch in (train, test)]
    shown = [rows(batch, lambda first: first == edge) for batch in (train, test)]
    assert len(hidden[1]) > 2000
    # 2000 answers and more: a standard deviation is at most 0.0055
    assert accuracy(*hidden) == pytest.approx(1 / 16, abs=0.0275)
    assert accuracy(*shown) > 0.9


def test_the_insert_starts_anywhere_with_equal_chance():
    rows, places = 40_000, 64 - 2 * 3 - 2
    batch = make_needle(np.random.default_rng(0), rows, vocab_size=64, seq_len=64, value_length=3)
    start = (batch.inputs == MARKER).int().argmax(1)
    counts = torch.bincount(start, minlength=places).double()
    assert len(counts) == places
    wanted, freedom = rows / places, places - 1
    chi_squared = float(((counts - wanted) ** 2 / wanted).sum())
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5


def test_keys_and_values_are_drawn_evenly_and_values_may_repeat():
    batch = make_needle(np.random.default_rng(0), 20_000, vocab_size=32, seq_len=32, value_length=4)
    value = batch.targets[:, -4:]
    counts = torch.bincount(value.flatten(), minlength=32)
    assert counts[:16].sum() == 0
    assert counts[16:].numpy() == pytest.approx(5000, abs=5 * 68)
    keys = torch.bincount(batch.inputs[:, -4], minlength=32)
    assert keys.sum() == keys[8:16].sum()
    assert keys[8:16].numpy() == pytest.approx(2500, abs=5 * 47)
    pairs = torch.bincount((value[:, 0] - 16) * 16 + value[:, 1] - 16, minlength=256)
    assert pairs.numpy() == pytest.approx(78.125, abs=5 * 8.8)  # repeats among them


def test_noise_is_each_examples_own_unless_it_is_fixed():
    for fixed in (False, True):
        task = Needle(seq_len=64, fixed_noise=fixed, batch_size=50)
        inputs = torch.cat([task.train_batch(index).inputs for index in range(2)])
        late = inputs[(inputs[:, :16] != MARKER).all(1), :16]
        assert len(late) > 50
        assert len({tuple(row) for row in late.tolist()}) == (1 if fixed else len(late))
        assert not fixed or late[0].tolist() == list(range(1, 17))


@pytest.mark.parametrize("value_length", range(1, 33))
def test_every_length_of_value_can_be_made_and_solved(value_length):
    task = Needle(value_length=value_length, seq_len=80, batch_size=8)
    batch = task.train_batch(0)
    scored = batch.targets != IGNORE
    assert scored.sum(1).tolist() == [value_length] * 8
    assert torch.equal(solve_needle(batch.inputs)[scored], batch.targets[scored])


def test_eight_thousand_tokens_are_solved_too():
    task = Needle(seq_len=8192, value_length=7, test_examples=20, batch_size=2)
    assert score(task, solve_needle)["accuracy/length=8192"] == 1.0


GOLDEN = {
    (0, False): "d32fe0d24c7cd9bb",
    (1, False): "5dc678a580131393",
    (0, True): "e2f8a0f3a6eec832",
}


@pytest.mark.parametrize(("seed", "fixed_noise"), GOLDEN)
def test_the_examples_of_a_seed_never_change(seed, fixed_noise):
    task = Needle(seed=seed, batch_size=4, value_length=7, fixed_noise=fixed_noise)
    batch = task.train_batch(0)
    content = batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN[seed, fixed_noise]


def test_batches_are_pure_and_leave_global_random_state_alone():
    task = Needle(batch_size=4)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = task.train_batch(7)
    task.train_batch(3)
    assert torch.equal(task.train_batch(7).inputs, first.inputs)
    assert not torch.equal(task.train_batch(8).inputs, first.inputs)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_each_training_batch_has_one_level_and_all_levels_occur():
    task = Needle(value_length=[1, 7, 32], batch_size=8)
    levels = [
        task.train_batch(index).slices["value_length"].unique().tolist() for index in range(60)
    ]
    assert {len(level) for level in levels} == {1}
    counts = [levels.count([length]) for length in (1, 7, 32)]
    assert sum(counts) == 60
    assert min(counts) >= 10


@pytest.mark.parametrize("asked", [[1, 32], 32])
def test_test_value_length_replaces_the_training_levels(asked):
    task = Needle(value_length=7, test_value_length=asked, test_examples=3)
    lengths = torch.cat([batch.slices["value_length"] for batch in task.eval_batches("test")])
    wanted = [asked] if isinstance(asked, int) else asked
    assert lengths.tolist() == [length for length in wanted for _ in range(3)]
    assert task.facts()["test_value_length"] == str(wanted)
    assert task.facts()["train_value_length"] == "[7]"


def test_a_mixture_of_lengths_is_scored_by_length_and_depth():
    mixture = RecallMixture(
        train=[Needle(seq_len=64)],
        test=[Needle(seq_len=length, test_examples=100) for length in (64, 256)],
    )
    results = score(mixture, solve_needle)
    assert results["accuracy/length=64"] == results["accuracy/length=256"] == 1.0
    assert results["accuracy/depth=9"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_length": 0}, r"value_length \(0\) must be at least 1"),
        ({"value_length": []}, r"at least one level to train on \(got \[\]\)"),
        ({"test_value_length": []}, r"one to test on \(got \[\]\)"),
        (
            {"seq_len": 64, "value_length": 32},
            r"32 \+ 2 = 34 positions, the query 32 \+ 1 = 33 and the noise at least 1, "
            r"2 \* 32 \+ 4 = 68 > 64; use seq_len >= 68 or value_length <= 30",
        ),
        (
            {"seq_len": 64, "test_value_length": [1, 40]},
            r"value_length \(40\) does not fit seq_len \(64\)",
        ),
        ({"seq_len": 5}, r"2 \* 1 \+ 4 = 6 > 5; use seq_len >= 6$"),
        ({"vocab_size": 126}, r"vocab_size \(126\) must be a multiple of 4 .* use 128"),
        ({"vocab_size": 4}, r"vocab_size \(4\) must be .* at least 8: .* use 8"),
        ({"period": 0}, r"period \(0\) must be at least 1"),
    ],
)
def test_what_does_not_fit_is_explained_with_the_arithmetic(options, message):
    with pytest.raises(ValueError, match=message):
        Needle(**options)


@pytest.mark.parametrize(
    ("seq_len", "value_length", "vocab"), [(6, 1, 128), (68, 32, 8), (18, 7, 8)]
)
def test_the_tightest_sizes_can_be_made(seq_len, value_length, vocab):
    task = Needle(seq_len=seq_len, value_length=value_length, vocab_size=vocab, batch_size=50)
    starts = (task.train_batch(0).inputs == MARKER).int().argmax(1)
    assert sorted(set(starts.tolist())) == [0, 1]  # before and after the only token of noise
