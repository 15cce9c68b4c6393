"""Tasks of finding one thing again, and of paths: solvers, examples, and what cannot be made."""

import numpy as np
import pytest
import torch

from mneme.tasks import (
    MQAR,
    CompositionalMQAR,
    Copying,
    Digits,
    Induction,
    ListOps,
    PathStar,
    PathStarInWeights,
    PhoneBook,
    ReadTwice,
    SetDisjointness,
)
from mneme.tasks.batch import IGNORE
from mneme.tasks.classification import CLOSE, OPEN, PAD, solve_list_ops
from mneme.tasks.path_star import EDGE, MARKS, PATH, solve_path_star
from mneme.tasks.recall import solve_mqar
from mneme.tasks.recall.copying import solve_copying
from mneme.tasks.recall.lookup import (
    DIGITS,
    make_compositional_mqar,
    make_phone_book,
    solve_compositional_mqar,
    solve_induction,
    solve_phone_book,
    solve_set_disjointness,
)
from tests.tasks.solving import digest, scores


def walked(inputs, task):
    """Paths in weights, by the graph that the task holds."""
    answers = torch.zeros_like(inputs)
    for row, tokens in enumerate(inputs.tolist()):
        path = next(p for p in task.paths.tolist() if p[-1] == tokens[1])
        answers[row, 1 + task.pauses :] = torch.tensor(path)
    return answers


CASES = {
    "copying": (Copying, lambda x, task: solve_copying(x), "d9af9d28be28ffe1"),
    "turns": (
        lambda **o: PhoneBook(questions=5, **o),
        lambda x, task: solve_phone_book(x),
        "4f2238e40fcba714",
    ),
    "list_ops": (ListOps, lambda x, task: solve_list_ops(x), "46d65d915eee8625"),
    "induction": (Induction, lambda x, task: solve_induction(x), "3b430bdce17a94ce"),
    "phone_book": (PhoneBook, lambda x, task: solve_phone_book(x), "052ef9a50b4b305d"),
    "compositional": (
        CompositionalMQAR,
        lambda x, task: solve_compositional_mqar(x),
        "a162de8d6b265947",
    ),
    "sets": (SetDisjointness, lambda x, task: solve_set_disjointness(x), "1a757d3fbba3d1ec"),
    "path_star": (PathStar, lambda x, task: solve_path_star(x, 20), "55cc706f56f353ab"),
    "in_weights": (PathStarInWeights, walked, "f0660ebeda3576f8"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_solver_is_right_and_examples_stay_what_they_are(name):
    make, solve, first = CASES[name]
    task = make(batch_size=4, test_examples=20, seed=3)
    found = scores(task, lambda inputs: solve(inputs, task))
    assert found["exact_sequence_accuracy"] == 1
    for batch in task.eval_batches("test"):
        assert batch.slices.keys() == task.slice_values().keys()
        assert batch.inputs.shape[1] <= task.seq_len
    batch = task.train_batch(0)
    assert int(batch.inputs.max()) < task.vocab_size
    assert digest(batch) == first


def test_the_mark_of_induction_stands_anywhere_and_once_before_the_end():
    task = Induction(length=8, test_length=8, vocab_size=5, batch_size=2000)
    batch = task.train_batch(0)
    marks = batch.inputs == 4
    assert (marks.sum(1) == 2).all()
    assert marks[:, -1].all()
    counts = marks[:, :-1].sum(0)
    assert counts[-1] == 0  # or the mark would follow itself
    assert (counts[:-1] - 2000 / 6).abs().max() < 5 * (2000 / 6) ** 0.5
    assert torch.equal(batch.slices["gap"][:, -1], 7 - marks[:, :-1].int().argmax(1))


def test_a_phone_book_asks_for_numbers_of_its_own_names():
    batch = make_phone_book(
        np.random.default_rng(0), 30, names=40, entries=6, digits=3, questions=2
    )
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        book = {tokens[i]: tokens[i + 1 : i + 4] for i in range(0, 24, 4)}
        assert len(book) == 6
        assert min(book) > DIGITS
        for start in (24, 28):
            assert tokens[start] == DIGITS
            number = book[tokens[start + 1]]
            assert tokens[start + 2 : start + 4] == number[:2]
            assert targets[start : start + 4] == [IGNORE, *number]
        assert targets[:24] == [IGNORE] * 24
    scored = batch.targets != IGNORE
    back = torch.arange(32) - batch.slices["gap"]
    assert torch.equal(batch.inputs.gather(1, back)[scored], batch.inputs[scored])


def test_lists_have_the_value_that_python_gives_them():
    task = ListOps(seq_len=80, shortest=10, batch_size=40, seed=1)
    names = {"MIN": min, "MAX": max, "SM": lambda them: sum(them) % 10}
    names["MED"] = lambda them: int(
        (sorted(them)[(len(them) - 1) // 2] + sorted(them)[len(them) // 2]) / 2
    )
    batch = task.train_batch(0)
    for tokens, target in zip(batch.inputs.tolist(), batch.targets[:, -1].tolist(), strict=True):
        text = ""
        for token in tokens[:-1]:
            if OPEN <= token < CLOSE:
                text += f"{('MIN', 'MAX', 'MED', 'SM')[token - OPEN]}(["
            elif token != PAD:
                text += "])," if token == CLOSE else f"{token},"
        assert eval(text, names)[0] == target
        assert 10 <= sum(token != PAD for token in tokens[:-1]) < 80


def test_digits_are_dealt_out_once_and_trained_on_the_pixels_if_asked():
    task = Digits(batch_size=100)
    sets = {
        split: {tuple(row) for batch in task.eval_batches(split) for row in batch.inputs.tolist()}
        for split in ("val", "test")
    }
    trained = {tuple(row) for i in range(11) for row in task.train_batch(i).inputs.tolist()}
    assert (len(sets["val"]), len(sets["test"]), len(trained)) == (300, 300, 1100)
    assert not sets["val"] & sets["test"]
    assert not trained & (sets["val"] | sets["test"])
    pixels = Digits(objective="next_token").train_batch(0)
    assert torch.equal(pixels.targets[:, :-1], pixels.inputs[:, 1:])
    assert task.chance_level == 0.1


def test_no_half_of_a_compound_key_tells_the_value():
    batch = make_compositional_mqar(
        np.random.default_rng(1), 40, vocab_size=60, seq_len=60, pairs=9
    )
    for tokens, targets, gaps in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.slices["gap"].tolist(), strict=True
    ):
        triples = [tuple(tokens[i : i + 3]) for i in range(0, 27, 3)]
        firsts, seconds, values = zip(*triples, strict=True)
        assert len({*firsts}) == len({*seconds}) == 3
        assert len({(a, b) for a, b, _ in triples}) == len({*values}) == 9
        asked = [place for place, target in enumerate(targets) if target != IGNORE]
        assert sorted((tokens[p - 1], tokens[p], targets[p]) for p in asked) == sorted(triples)
        assert all(tokens[p - gaps[p]] == tokens[p] for p in asked)
        assert all((p - 1) % 3 == 0 for p in asked)


def test_sets_share_one_token_and_come_in_both_orders():
    task = SetDisjointness(sizes=[[2, 6]], vocab_size=64, batch_size=50, test_examples=60)
    seen = set()
    for index in range(12):
        batch = task.train_batch(index)
        first, second = int(batch.slices["first"][0]), int(batch.slices["second"][0])
        seen.add((first, second))
        back = batch.inputs.shape[1] - 1 - batch.slices["gap"][:, -1:]
        assert torch.equal(batch.inputs.gather(1, back), batch.targets[:, -1:])
        for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            a, b = tokens[1 : 1 + first], tokens[2 + first : -1]
            assert len(b) == second
            assert {*a} & {*b} == {targets[-1]}
            assert len({*a, *b}) == first + second - 1
            assert (tokens[0], tokens[1 + first], tokens[-1]) == (0, 1, 2)
    assert seen == {(2, 6), (6, 2)}


def test_reading_twice_scores_the_second_time_only():
    task, once = ReadTwice(task=MQAR(seed=5, test_examples=10)), MQAR(seed=5, test_examples=10)
    assert torch.equal(task.train_batch(2).inputs[:, 64:], once.train_batch(2).inputs)
    assert torch.equal(task.train_batch(2).inputs[:, :64], once.train_batch(2).inputs)
    for mine, theirs in zip(task.eval_batches("val"), once.eval_batches("val"), strict=True):
        assert (mine.targets[:, :64] == IGNORE).all()
        assert torch.equal(mine.targets[:, 64:], theirs.targets)
    found = scores(task, solve_mqar)
    assert found["accuracy"] == found["accuracy/pairs=8"] == 1
    assert task.name == "mqar_twice"
    assert task.facts()["chance_level"] == once.chance_level


def test_tests_in_weights_ask_for_leaves_that_training_never_asks_for():
    task = PathStarInWeights(arms=20, length=3, batch_size=40, test_examples=100)
    asked, edges = set(), set()
    for index in range(60):
        for tokens, targets in zip(*task.train_batch(index)[:2], strict=True):
            if tokens[0] == PATH:
                asked.add(int(tokens[1]))
            else:
                assert tokens[0] == EDGE
                edges.add((int(tokens[1]), int(targets[1])))
    leaves = {
        split: {int(row[1]) for batch in task.eval_batches(split) for row in batch.inputs}
        for split in ("val", "test")
    }
    assert len(asked) == 15
    assert len(leaves["val"]) + len(leaves["test"]) == 5
    assert not asked & (leaves["val"] | leaves["test"])
    assert not leaves["val"] & leaves["test"]
    assert len(edges) == 2 * 40  # every edge, in both directions
    assert len({int(node) for node in task.paths.ravel()}) == 41
    assert task.paths.min() >= MARKS


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Copying(test_length=0), "length and test_length must be 1 or more"),
        (lambda: ListOps(depth=1), "depth .1. and arguments .10. must be at least 2"),
        (lambda: ListOps(shortest=200), "shortest .200. must be from 1 to below seq_len .128."),
        (lambda: Induction(test_length=2), "length and test_length must be at least 3"),
        (lambda: PhoneBook(entries=4, questions=5), "entries .4. must be from questions .5."),
        (lambda: PhoneBook(digits=0), "must be at least 1"),
        (lambda: CompositionalMQAR(pairs=8), "pairs .8. must be a square"),
        (lambda: CompositionalMQAR(pairs=16), "must be at least 6 . pairs = 96"),
        (lambda: CompositionalMQAR(vocab_size=9), "vocab_size .9. must hold 3 keys and 9 values"),
        (lambda: SetDisjointness(sizes=[[4]]), "pairs of 1 or more"),
        (lambda: SetDisjointness(sizes=[[40, 40]], vocab_size=64), "together at most 60"),
        (lambda: PathStar(arms=1), "arms .1. and length .5. must be at least 2"),
        (lambda: PathStar(nodes=20), "nodes .20. must be at least 21"),
        (lambda: PathStarInWeights(held_out=0.0), "must leave one or more to train on and two"),
        (lambda: PathStarInWeights(pauses=-1), "pauses .-1. must be 0 or more"),
    ],
)
def test_what_cannot_be_made_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
