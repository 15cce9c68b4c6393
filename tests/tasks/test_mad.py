"""MAD's generators: what every example is, and the statistics of the published procedures.

The procedures are written here again, one example at a time, as arXiv 2403.17844 and its code
(mad/data/instances.py) have them; the generators under test make all examples at once.
"""

import numpy as np
import pytest
import torch

from mneme.tasks import FuzzyRecall, InContextRecall, Memorization, SelectiveCopying
from mneme.tasks.batch import IGNORE
from mneme.tasks.mad import (
    make_fuzzy_recall,
    make_in_context_recall,
    make_memorization,
    make_selective_copying,
    memorized_values,
    solve_fuzzy_recall,
    solve_selective_copying,
)
from mneme.tasks.recall import solve_mqar
from tests.tasks.solving import digest, scores

NOISY = {"vocab_size": 32, "noise_vocab": 16, "noise": 0.4}
TASKS = {
    "in_context": lambda **options: InContextRecall(**options),
    "noisy": lambda **options: InContextRecall(**NOISY, **options),
    "fuzzy": lambda **options: FuzzyRecall(**options),
    "copying": lambda **options: SelectiveCopying(seq_len=64, copied=8, **options),
    "memorization": lambda **options: Memorization(**options),
}


def by_heart(inputs, task):
    values = torch.from_numpy(task.values)
    return torch.cat([inputs[:, :1], values[inputs[:, :-1] % len(values)]], dim=1)


SOLVERS = {
    "in_context": lambda inputs, task: solve_mqar(inputs),
    "noisy": lambda inputs, task: solve_mqar(inputs),
    "fuzzy": lambda inputs, task: solve_fuzzy_recall(inputs, task.vocab_size),
    "copying": lambda inputs, task: solve_selective_copying(inputs, task.vocab_size),
    "memorization": by_heart,
}


@pytest.mark.parametrize("name", TASKS)
def test_a_solver_written_by_hand_is_always_right(name):
    task = TASKS[name](test_examples=200, batch_size=100)
    found = scores(task, lambda inputs: SOLVERS[name](inputs, task))
    assert found["exact_sequence_accuracy"] == 1


@pytest.mark.parametrize("name", TASKS)
def test_guessing_evenly_among_what_an_answer_can_be_scores_the_chance_level(name):
    task = TASKS[name](test_examples=500)
    answers = torch.cat([b.targets[b.targets != IGNORE] for b in task.eval_batches("val")])
    values = answers.unique()
    assert len(values) == round(1 / task.chance_level)
    assert ((values >= 0) & (values < task.vocab_size)).all()


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("in_context", "ba2272b7552468f8"),
        ("noisy", "75e22d6b447ffe71"),
        ("fuzzy", "b912d6b0cdd1d0be"),
        ("copying", "50b12ce7fa89e14a"),
        ("memorization", "af66ffe7d1e6f653"),
    ],
)
def test_the_first_examples_of_a_seed_stay_what_they_are(name, first):
    assert digest(TASKS[name](batch_size=4, seed=3).train_batch(0)) == first


def test_training_goes_over_a_fixed_set_in_ever_new_orders():
    task = InContextRecall(train_examples=10, batch_size=3)
    epochs = [[task.train_batch(3 * epoch + i) for i in range(3)] for epoch in range(4)]
    rows = [torch.cat([batch.inputs for batch in epoch]).tolist() for epoch in epochs]
    known = {tuple(row) for epoch in rows for row in epoch}
    assert len(known) == 10
    assert all(len({tuple(row) for row in epoch}) == 9 for epoch in rows)
    assert rows[0] != rows[1]
    again = InContextRecall(train_examples=10, batch_size=3).train_batch(7)
    assert torch.equal(again.inputs, task.train_batch(7).inputs)
    fresh = InContextRecall(train_examples=None, batch_size=3)
    assert not torch.equal(fresh.train_batch(0).inputs, fresh.train_batch(3).inputs)


@pytest.mark.parametrize("name", ["in_context", "noisy", "fuzzy"])
def test_recall_is_trained_on_every_next_token_and_tested_on_values_shown_before(name):
    task = TASKS[name](batch_size=50)
    batch = task.train_batch(0)
    assert torch.equal(batch.targets[:, :-1], batch.inputs[:, 1:])
    test = next(iter(task.eval_batches("test")))
    scored = test.targets != IGNORE
    assert torch.equal(test.targets[:, :-1][scored[:, :-1]], test.inputs[:, 1:][scored[:, :-1]])
    assert scored.any(1).all()


def published_in_context(rng, vocab_size, seq_len, noise_vocab, noise):
    """One test example, with its last token kept."""
    symbols = vocab_size - noise_vocab
    half, shown, inputs, labels = symbols // 2, {}, [], []
    safe = rng.integers(seq_len // 2 - 1)
    for pair in range(seq_len // 2 - 1):
        if pair != safe and rng.random() < noise:
            inputs += rng.integers(symbols, vocab_size, size=2).tolist()
            labels += [IGNORE, IGNORE]
            continue
        key = int(rng.integers(half))
        labels += [shown.get(key, IGNORE), IGNORE]
        shown.setdefault(key, int(rng.integers(half, symbols)))
        inputs += [key, shown[key]]
    key = int(rng.choice(list(shown)))
    return [*inputs, key, shown[key]], [*labels, shown[key], IGNORE]


def published_fuzzy(rng, vocab_size, seq_len):
    """One test example: keys of three tokens, values of one to three, padded on the left."""
    half, symbols = (vocab_size - 1) // 2, vocab_size - 1

    def key():
        return tuple(rng.permutation(half)[:3].tolist())

    def value():
        return (half + rng.permutation(symbols - half)[: rng.integers(1, 4)]).tolist()

    probe, answer = key(), value()
    size = 3 + len(answer)
    place, added = rng.integers(seq_len - 2 * size), False
    known, shown, tokens, labels = {}, set(), [], []
    while len(tokens) < seq_len - size - 6:
        at_place = len(tokens) >= place and not added
        found = probe if at_place else key()
        added |= found == probe
        known.setdefault(found, answer if found == probe else value())
        scored = known[found] if found in shown and not at_place else [IGNORE] * len(known[found])
        tokens += [*found, *known[found]]
        labels += [IGNORE] * 3 + scored
        shown.add(found)
    tokens, labels = [*tokens, *probe, *answer], [*labels, *[IGNORE] * 3, *answer]
    pad = seq_len + 1 - len(tokens)
    return ([symbols] * pad + tokens)[:-1], ([IGNORE] * pad + labels)[1:]


def published_copying(rng, vocab_size, seq_len, copied):
    tokens = rng.integers(vocab_size - 2, size=copied)
    blanks = seq_len - 2 * copied - 1
    row = np.insert(tokens, rng.integers(copied, size=blanks), [vocab_size - 2] * blanks)
    inputs = [*row, vocab_size - 1, *[vocab_size - 2] * copied]
    return inputs, [*[IGNORE] * (seq_len - copied), *tokens]


CASES = {
    "in_context": (
        published_in_context, (16, 64, 0, 0.0),
        lambda rng, n: make_in_context_recall(rng, n, vocab_size=16, seq_len=64)),
    "noisy": (
        published_in_context, (32, 64, 16, 0.4),
        lambda rng, n: make_in_context_recall(rng, n, seq_len=64, **NOISY)),
    "fuzzy": (
        published_fuzzy, (10, 64),
        lambda rng, n: make_fuzzy_recall(rng, n, vocab_size=10, seq_len=64)),
    "copying": (
        published_copying, (16, 40, 6),
        lambda rng, n: make_selective_copying(rng, n, vocab_size=16, seq_len=40, copied=6)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_labels_are_distributed_as_published(name):
    """Means by position and by token within five standard errors of a difference, of 4,000 rows."""
    published, sizes, make = CASES[name]
    rng, rows = np.random.default_rng(5), 4000
    theirs = np.array([published(rng, *sizes) for _ in range(rows)])
    ours = make(rng, rows)
    inputs, targets = ours.inputs.numpy(), ours.targets.numpy()
    features = {
        "scored, by position": (targets != IGNORE, theirs[:, 1] != IGNORE),
        "labels of a row": (
            (targets != IGNORE).sum(1, keepdims=True),
            (theirs[:, 1] != IGNORE).sum(1, keepdims=True),
        ),
        "tokens of a row": tuple(
            np.stack([(part == token).sum(1) for token in range(sizes[0])], axis=1)
            for part in (inputs, theirs[:, 0])
        ),
        "first half of the vocabulary, by position": (
            inputs < sizes[0] // 2, theirs[:, 0] < sizes[0] // 2),
        "same as two before, by position": (
            inputs[:, 2:] == inputs[:, :-2], theirs[:, 0, 2:] == theirs[:, 0, :-2]),
    }  # fmt: skip
    for what, (mine, other) in features.items():
        mine, other = mine.astype(float), other.astype(float)
        error = np.sqrt((mine.var(0) + other.var(0)) / rows)
        assert (np.abs(mine.mean(0) - other.mean(0)) <= 5 * error + 1e-3).all(), what


def test_the_map_of_memorization_is_one_to_one_and_the_same_for_all_seeds():
    tasks = [Memorization(seed=seed) for seed in (0, 1)]
    assert (tasks[0].values == tasks[1].values).all()
    assert [len(set(task.values.tolist())) for task in tasks] == [127, 127]
    assert not (memorized_values(256, 1) == tasks[0].values).all()
    batch = make_memorization(
        np.random.default_rng(0), 3, values=tasks[0].values, vocab_size=256, seq_len=8
    )
    assert (batch.inputs[:, 1::2] == 255).all()
    assert (batch.targets[:, ::2] == IGNORE).all()
    assert batch.targets[:, 1::2].tolist() == tasks[0].values[batch.inputs[:, ::2]].tolist()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: InContextRecall(seq_len=9), "seq_len .9. must be even"),
        (lambda: InContextRecall(noise=0.2), "noise .0.2. must be in .0, 1., and noise_vocab"),
        (lambda: InContextRecall(noise=0.1, noise_vocab=15), "must hold a key and a value"),
        (lambda: FuzzyRecall(vocab_size=6), "must be at least 7"),
        (lambda: FuzzyRecall(seq_len=19), "must be at least 20"),
        (lambda: SelectiveCopying(seq_len=33), "must be above 2 . copied . 1 = 33"),
        (lambda: Memorization(seq_len=5), "must be even"),
        (lambda: Memorization(train_examples=100), "must be at least batch_size .128."),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
