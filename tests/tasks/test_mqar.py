import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mneme.tasks import MQAR
from mneme.tasks.batch import IGNORE
from mneme.tasks.recall import make_mqar, solve_mqar
from mneme.tasks.recall.sampling import distinct, weighted


@st.composite
def sizes(draw):
    """Any sizes that fit, up to the tightest: all keys used, no room left."""
    pairs = draw(st.integers(1, 12))
    vocab = 2 * draw(st.integers(pairs + 1, pairs + 300))
    length = 4 * pairs + 2 * draw(st.integers(0, 40))
    filler = draw(st.booleans())
    return {"vocab_size": vocab, "seq_len": length, "pairs": pairs, "random_filler": filler}


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(0, 2**32 - 1))
def test_every_example_is_as_the_task_says(size, seed):
    batch = make_mqar(np.random.default_rng(seed), 5, **size)
    pairs, half = size["pairs"], size["vocab_size"] // 2
    assert batch.inputs.shape == batch.targets.shape == (5, size["seq_len"])
    for inputs, targets, gaps in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.slices["gap"].tolist(), strict=True
    ):
        keys, values = inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < half for key in keys)
        assert all(half <= value < 2 * half for value in values)
        asked = [place for place, target in enumerate(targets) if target != IGNORE]
        assert sorted(inputs[place] for place in asked) == sorted(keys)
        assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
        for place in asked:
            index = keys.index(inputs[place])
            assert targets[place] == values[index]
            assert gaps[place] == place - 2 * index
        filler = [inputs[p] for p in range(2 * pairs, len(inputs)) if p not in asked]
        assert not set(filler) & set(keys)
        assert all(0 <= token < 2 * half for token in filler)
        assert size["random_filler"] or not any(filler)
        assert all(gap == 0 for place, gap in enumerate(gaps) if place not in asked)
    assert batch.slices["pairs"].tolist() == [pairs] * 5
    assert batch.slices["length"].tolist() == [size["seq_len"]] * 5


@pytest.mark.parametrize("random_filler", [False, True])
def test_the_dictionary_solver_is_always_right(random_filler):
    task = MQAR(pairs=[1, 4, 16], random_filler=random_filler, test_examples=200, batch_size=100)
    metrics = task.metrics()
    for batch in task.eval_batches("test"):
        answers = torch.nn.functional.one_hot(solve_mqar(batch.inputs), task.vocab_size)
        metrics.update(answers.float(), batch)
    results = metrics.compute()
    accuracies = {name: value for name, value in results.items() if "accuracy" in name}
    assert set(accuracies.values()) == {1.0}
    assert {"accuracy/pairs=1", "accuracy/pairs=16", "accuracy/length=64"} <= accuracies.keys()
    assert "accuracy/gap=33-64" in accuracies


def test_guessing_reaches_the_guess_level():
    task = MQAR(vocab_size=32, pairs=8, test_examples=2000, batch_size=500)
    metrics = task.metrics()
    generator = torch.Generator().manual_seed(0)
    for batch in task.eval_batches("test"):
        noise = torch.rand(*batch.inputs.shape, 32, generator=generator)
        noise[..., :16] = -1  # never a key
        metrics.update(noise, batch)
    # 16,000 answers: one standard deviation is 0.002
    assert metrics.compute()["accuracy"] == pytest.approx(task.chance_level, abs=0.008)
    assert task.chance_level == 1 / 16


@pytest.mark.parametrize(
    ("seq_len", "pairs", "quantiles"), [(256, 16, [34, 64, 184]), (64, 4, [8, 16, 46])]
)
def test_queries_stand_where_those_of_the_public_code_do(seq_len, pairs, quantiles):
    rng = np.random.default_rng(1)
    batch = make_mqar(rng, 4000, vocab_size=256, seq_len=seq_len, pairs=pairs)
    places = (batch.targets != IGNORE).nonzero()[:, 1].numpy()
    found = np.quantile(places, [0.1, 0.5, 0.9])
    assert found[:2].tolist() == quantiles[:2]
    # Exactly 90 % lies on the edge of a slot (186 or 46 to 48), so samples differ by a slot or two.
    assert found[2] == pytest.approx(quantiles[2], abs=4)


def test_slots_are_drawn_as_numpy_draws_them_one_example_at_a_time():
    rng, rows = np.random.default_rng(2), 8000
    batch = make_mqar(rng, rows, vocab_size=256, seq_len=64, pairs=4)
    odds = np.arange(1, 29) ** -0.99
    odds /= odds.sum()
    drawn = np.stack([rng.choice(28, size=4, replace=False, p=odds) for _ in range(rows)])
    gaps = 8 + 2 * drawn - np.arange(0, 8, 2)  # pair j is queried in the slot drawn j-th
    for pair in range(4):
        place = batch.inputs[:, 8:] == batch.inputs[:, 2 * pair, None]
        found = batch.slices["gap"][:, 8:][place].numpy()
        assert found.mean() == pytest.approx(gaps[:, pair].mean(), abs=5 * 16 / rows**0.5 * 2**0.5)


def test_power_one_spreads_queries_evenly():
    rng = np.random.default_rng(1)
    batch = make_mqar(rng, 4000, vocab_size=256, seq_len=64, pairs=4, power=1)
    places = (batch.targets != IGNORE).nonzero()[:, 1]
    counts = torch.bincount(places, minlength=64)[8::2].double()
    wanted = 4 * 4000 / 28  # queries per slot; a standard deviation is 22
    assert counts.numpy() == pytest.approx(wanted, abs=5 * 22)


GOLDEN = {0: "3711a60cf4ed0b25", 1: "d20d7cf732dc7f9c"}


@pytest.mark.parametrize("seed", GOLDEN)
def test_the_examples_of_a_seed_never_change(seed):
    task = MQAR(seed=seed, batch_size=4, random_filler=True)
    batch = task.train_batch(0)
    content = batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN[seed]


def test_each_training_batch_has_one_level_and_all_levels_occur():
    task = MQAR(pairs=[1, 4, 16], batch_size=8)
    levels = [task.train_batch(index).slices["pairs"].unique().tolist() for index in range(60)]
    assert {len(level) for level in levels} == {1}
    counts = [levels.count([pairs]) for pairs in (1, 4, 16)]
    assert sum(counts) == 60
    assert min(counts) >= 10


def test_test_pairs_replace_the_training_levels():
    task = MQAR(pairs=4, test_pairs=[2, 16], test_examples=3)
    pairs = torch.cat([batch.slices["pairs"] for batch in task.eval_batches("test")])
    assert pairs.tolist() == [2] * 3 + [16] * 3
    assert task.facts()["guess_level_from_context"] == pytest.approx((1 / 2 + 1 / 16) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 17}, r"4 \* 17 = 68 > 64; use seq_len >= 68 or pairs <= 16"),
        ({"pairs": 8, "test_pairs": [8, 20]}, r"pairs \(20\) do not fit seq_len \(64\)"),
        ({"vocab_size": 16}, r"vocab_size \(16\) has 16 / 2 - 1 = 7; use vocab_size >= 18"),
        ({"vocab_size": 255}, r"vocab_size \(255\) and seq_len \(64\) must be even"),
        ({"seq_len": 63}, r"seq_len \(63\) must be even"),
        ({"pairs": 0}, r"pairs \(0\) must be at least 1"),
        ({"pairs": []}, r"at least one level to train on \(got \[\]\)"),
        ({"power": 0.0}, r"power \(0.0\) must be positive"),
    ],
)
def test_what_does_not_fit_is_explained_with_the_arithmetic(options, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**options)


@pytest.mark.parametrize(
    ("seq_len", "pairs", "vocab"),
    [
        (64, 8, 256),
        (64, 4, 8192),
        (128, 8, 8192),
        (256, 16, 8192),
        (512, 64, 8192),
        (1024, 256, 8192),
    ],
)
def test_the_sizes_of_the_literature_can_be_made(seq_len, pairs, vocab):
    task = MQAR(seq_len=seq_len, pairs=pairs, vocab_size=vocab, batch_size=16)
    batch = task.train_batch(0)
    scored = batch.targets != IGNORE
    assert scored.sum() == 16 * pairs
    assert torch.equal(solve_mqar(batch.inputs)[scored], batch.targets[scored])


@pytest.mark.parametrize("items", [4, 40])  # ranked whole, and redrawn on collision
def test_ordered_choices_are_equally_likely(items):
    rows = 40_000
    drawn = distinct(np.random.default_rng(0), rows, 2, items)
    cells = np.bincount(drawn[:, 0] * items + drawn[:, 1], minlength=items**2)
    cells = cells.reshape(items, items)
    wanted = rows / (items * (items - 1))
    off_diagonal = cells[~np.eye(items, dtype=bool)]
    assert np.diag(cells).sum() == 0
    chi_squared = ((off_diagonal - wanted) ** 2 / wanted).sum()
    freedom = len(off_diagonal) - 1
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_weighted_draws_follow_successive_sampling():
    weights = np.array([1.0, 2.0, 5.0])
    rows = 40_000
    drawn = weighted(np.random.default_rng(0), rows, 2, weights)
    for first in range(3):
        for second in range(3):
            share = (drawn == [first, second]).all(axis=1).mean()
            rest = 8 - weights[first]
            wanted = weights[first] / 8 * weights[second] / rest if first != second else 0
            assert share == pytest.approx(wanted, abs=0.0125)  # five standard deviations
