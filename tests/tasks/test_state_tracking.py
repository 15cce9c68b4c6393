"""State tracking: answers equal those of Python's own arithmetic and of permutations."""

import numpy as np
import pytest
import torch

from mneme.tasks import GroupWords, ModularArithmetic, Parity
from mneme.tasks.batch import IGNORE
from mneme.tasks.state_tracking import (
    make_arithmetic,
    make_group_words,
    make_parity,
    multiplication_table,
    solve_arithmetic,
    solve_group_words,
    solve_parity,
)
from tests.tasks.solving import digest, scores

KINDS = {
    "parity": (Parity, solve_parity, "4786be730130d15d"),
    "arithmetic": (ModularArithmetic, solve_arithmetic, "9f73fe88a80d16e7"),
    "words": (GroupWords, lambda inputs: solve_group_words(inputs, "A5"), "4b35788a3bb538bf"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_solver_is_right_and_examples_stay_what_they_are(kind):
    make, solve, first = KINDS[kind]
    task = make(batch_size=4, test_examples=20, seed=3)
    found = scores(task, solve)
    assert found["exact_sequence_accuracy"] == found["accuracy/last=1"] == 1
    assert all(f"accuracy/length={length}" in found for length in task.test_levels)
    assert digest(task.train_batch(0)) == first


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_asked_for_and_tests_go_beyond_training(kind):
    task = KINDS[kind][0](
        min_length=3, max_length=5, test_length=[8], batch_size=2, test_examples=4
    )
    lengths = {int(task.train_batch(i).slices["length"][0]) for i in range(60)}
    assert lengths == {3, 4, 5}
    (batch,) = list(task.eval_batches("val"))[:1]
    assert batch.inputs.shape[1] == task.positions(8) == task.seq_len
    assert task.slice_values().keys() == batch.slices.keys()


def test_parity_counts_ones():
    batch = make_parity(np.random.default_rng(0), 50, length=9, labels="every")
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert tokens[-1] == 2
        assert set(tokens[:-1]) <= {0, 1}
        assert targets[:-1] == [sum(tokens[: i + 1]) % 2 for i in range(9)]
        assert targets[-1] == sum(tokens[:-1]) % 2
    last = make_parity(np.random.default_rng(0), 50, length=9)
    assert torch.equal(last.inputs, batch.inputs)
    assert (last.targets[:, :-1] == IGNORE).all()
    assert torch.equal(last.targets[:, -1], batch.targets[:, -1])


@pytest.mark.parametrize("modulus", [2, 5, 7])
def test_expressions_have_the_value_that_python_gives_them(modulus):
    batch = make_arithmetic(np.random.default_rng(1), 200, length=7, modulus=modulus)
    signs = "+-*="
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        text = "".join(str(t) if t < modulus else signs[t - modulus] for t in tokens)
        assert text[-1] == "="
        assert targets[:-1] == [IGNORE] * 13
        assert eval(text[:-1]) % modulus == targets[-1]
    assert {int(t) for t in batch.inputs.unique()} == set(range(modulus + 4))


@pytest.mark.parametrize(
    ("group", "size", "commutes"),
    [("Z60", 60, True), ("S3", 6, False), ("A5", 60, False), ("S5", 120, False),
     ("A4xZ5", 60, False)],
)  # fmt: skip
def test_tables_are_those_of_groups(group, size, commutes):
    table = multiplication_table(group)
    elements = np.arange(size)
    assert table.shape == (size, size)
    assert (table[0] == elements).all()
    assert (table[:, 0] == elements).all()
    assert (np.sort(table, axis=0) == elements[:, None]).all()
    assert (np.sort(table, axis=1) == elements).all()
    a, b, c = np.random.default_rng(0).integers(size, size=(3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table == table.T).all() == commutes


def test_the_derived_subgroup_tells_which_groups_are_solvable():
    """Commutators of A5 give A5 again, for ever; those of the others come down to the identity."""

    def derived(table, members):
        inverse = table.argmin(axis=1)  # 0, the identity, is the least
        found = {int(table[table[a, b], inverse[table[b, a]]]) for a in members for b in members}
        while True:
            more = found | {int(table[a, b]) for a in found for b in found}
            if more == found:
                return found
            found = more

    for group, solvable in {"Z60": True, "S3": True, "A4xZ5": True, "A5": False}.items():
        table = multiplication_table(group)
        members = set(range(len(table)))
        for _ in range(4):
            members = derived(table, members)
        assert (members == {0}) == solvable


def test_words_are_multiplied_from_the_left():
    batch = make_group_words(np.random.default_rng(2), 20, length=6, group="S3")
    table = multiplication_table("S3")
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        product = 0
        for token, target in zip(tokens, targets, strict=True):
            product = table[product, token]
            assert product == target


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Parity(min_length=50), "min_length .50. must be from 1 to max_length .40."),
        (lambda: Parity(test_length=[0]), "test_length must hold lengths of 1 or more"),
        (lambda: ModularArithmetic(modulus=1), "modulus .1. must be at least 2"),
    ],
)
def test_what_cannot_be_made_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
