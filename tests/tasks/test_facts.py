import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer

from mneme.harness.run.data import TaskData
from mneme.tasks import ZipfFacts
from mneme.tasks.batch import IGNORE, Batch
from mneme.tasks.facts import Exposures, FactMetrics, World, make_world, tell
from mneme.tasks.facts.metrics import decades
from mneme.tasks.facts.world import alphabet_for


def small(**options):
    defaults = {"subjects": 30, "objects": 8, "batch_size": 16, "counted_batches": 20}
    return ZipfFacts(**(defaults | options))


def told_by_hand(task, batches):
    """Object by the tokens that ask for it: a dictionary filled from training batches."""
    known, times = {}, {}
    for index in range(batches):
        batch = task.train_batch(index)
        for asked, labels in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            known[tuple(asked)] = labels[-1]
            times[tuple(asked)] = times.get(tuple(asked), 0) + 1
    return known, times


def answered(task, answer, split="test"):
    """The metrics of a solver, from the tokens of a question to a token or None."""
    metrics = task.metrics()
    for batch in task.eval_batches(split):
        logits = torch.zeros(*batch.inputs.shape, task.vocab_size)
        for row, asked in enumerate(batch.inputs.tolist()):
            if (said := answer(tuple(asked))) is not None:
                logits[row, -1, said] = 100.0
        metrics.update(logits, batch)
    return metrics.compute()


@settings(max_examples=60, deadline=None)
@given(
    subjects=st.integers(1, 40),
    relations=st.integers(1, 4),
    objects=st.integers(2, 9),
    letters=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_sequence_is_as_the_task_says(subjects, relations, objects, letters, seed):
    task = ZipfFacts(
        subjects=subjects,
        relations=relations,
        objects=objects,
        subject_tokens=letters,
        second_phase_after=1,
        batch_size=16,
        seed=seed,
    )
    batches = list(task.eval_batches("val"))
    inputs, targets = (torch.cat([b[i] for b in batches]).tolist() for i in range(2))
    assert len(inputs) == 2 * subjects * relations
    first_relation = task.vocab_size - objects - relations
    alphabet, rest = divmod(first_relation - 1, letters)
    assert rest == 0
    assert (alphabet - 1) ** letters < 2 * subjects <= alphabet**letters
    for tokens, labels in zip(inputs, targets, strict=True):
        start, *name, relation = tokens
        assert start == 0
        assert [(letter - 1) // alphabet for letter in name] == list(range(letters))
        assert 0 <= relation - first_relation < relations
        assert labels[:-1] == [IGNORE] * (letters + 1)
        assert 0 <= labels[-1] - first_relation - relations < objects
    assert len({tuple(tokens) for tokens in inputs}) == len(inputs), "a question asked twice"


def test_the_example_of_the_docstring():
    objects = np.zeros((3, 2), dtype=np.int64)
    objects[1, 1] = 2
    world = World(names=np.array([[0, 0], [2, 0], [3, 3]]), objects=objects, alphabet=4)
    batch = tell(world, np.array([1 * 2 + 1]))
    assert batch.inputs.tolist() == [[0, 3, 5, 10]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, IGNORE, 13]]
    assert batch.slices["fact"].tolist() == [3]


@pytest.mark.parametrize("second_phase_after", [None, 5])
def test_a_dictionary_of_the_training_batches_knows_all_that_was_told(second_phase_after):
    task = small(second_phase_after=second_phase_after)
    known, _ = told_by_hand(task, task.counted_batches)
    results = answered(task, known.get)
    assert results["accuracy/exposures=0"] == 0
    assert results["accuracy/exposures=1"] == results["accuracy/exposures=10"] == 1
    assert results["facts_stored"] == len(known)
    facts = task.phases * 60
    assert results["accuracy"] == pytest.approx(len(known) / facts)
    missed = 1 - len(known) / facts
    assert task.dictionary_level == pytest.approx(results["accuracy"] + missed / 8)
    assert 0 < missed < 0.9
    assert results["stored_bits"] == pytest.approx(len(known) * (3 - 3 / 8))
    assert task.facts()["facts_exposed"] == len(known)


def test_guessing_reaches_the_guess_level():
    task = small(subjects=2000, counted_batches=1, batch_size=1000)
    draw = np.random.default_rng(0)
    results = answered(task, lambda asked: task.vocab_size - 1 - draw.integers(8))
    # 4,000 answers: a standard deviation is 0.005
    assert results["accuracy"] == pytest.approx(task.chance_level, abs=0.026)
    assert task.chance_level == 1 / 8


@pytest.mark.parametrize("second_phase_after", [None, 5])
def test_exposures_are_those_of_the_training_batches(second_phase_after):
    task = small(second_phase_after=second_phase_after)
    _, times = told_by_hand(task, task.counted_batches)
    questions = tell(task.world, np.arange(len(task.exposures.times))).inputs.tolist()
    assert task.exposures.times.tolist() == [times.get(tuple(q), 0) for q in questions]
    assert task.exposures.times.sum() == 20 * 16


@pytest.mark.parametrize(("power", "offset"), [(0.0, 0.0), (1.0, 0.0), (1.2, 5.0)])
def test_subjects_are_drawn_by_rank_and_relations_evenly(power, offset):
    task = small(subjects=50, relations=3, power=power, offset=offset, batch_size=40_000)
    ranks = np.arange(1, 51)
    odds = np.repeat((ranks + offset) ** -power, 3)
    wanted = 40_000 * odds / odds.sum()
    drawn = np.bincount(task.draw(0), minlength=150)
    chi_squared = ((drawn - wanted) ** 2 / wanted).sum()
    assert abs(chi_squared - 149) < 5 * math.sqrt(2 * 149)
    assert task.exposures.odds.numpy() == pytest.approx(wanted / 40_000)


def test_objects_are_drawn_evenly_and_names_do_not_tell_ranks():
    world = make_world(
        np.random.default_rng(0), subjects=10_000, relations=2, objects=16, letters=2
    )
    counts = np.bincount(world.objects.ravel(), minlength=16)
    assert ((counts - 2500) ** 2 / 2500).sum() < 15 + 5 * math.sqrt(30)
    # 20,000 names: a correlation of random ranks has a standard deviation of 0.007
    for letter in world.names.T:
        assert abs(np.corrcoef(letter, np.arange(20_000))[0, 1]) < 0.036


def test_the_second_phase_tells_other_facts_of_other_subjects():
    one, two = small(), small(second_phase_after=7)
    for index in range(20):
        before, after = one.train_batch(index), two.train_batch(index)
        if index < 7:
            assert torch.equal(before.inputs, after.inputs)
            assert torch.equal(before.targets, after.targets)
        assert torch.equal(after.slices["fact"] >= 60, torch.full((16,), index >= 7))
    names = {tuple(name) for name in two.world.names.tolist()}
    assert len(names) == 60
    assert two.exposures.phase.tolist() == [0] * 60 + [1] * 60
    assert two.facts()["facts"] == 2 * one.facts()["facts"] == 120


def test_training_batches_are_pure_and_evaluation_asks_every_fact_once():
    task, again = small(seed=3), small(seed=3)
    again.train_batch(5)
    first = task.train_batch(7)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again.train_batch(7)[:2], strict=True))
    assert not torch.equal(first.inputs, task.train_batch(8).inputs)
    batches = task.eval_batches("val")
    orders = [[b.slices["fact"] for b in each] for each in (batches, batches)]
    orders.append([b.slices["fact"] for b in small(seed=3, batch_size=7).eval_batches("test")])
    val, val_again, test = (torch.cat(order) for order in orders)
    assert torch.equal(val, val_again)
    assert torch.equal(val, test)
    assert sorted(val.tolist()) == list(range(60)) != val.tolist()


GOLDEN = {0: "114f10eb10e18de7", 1: "495ccd8fec6247db"}


@pytest.mark.parametrize("seed", GOLDEN)
def test_the_facts_of_a_seed_never_change(seed):
    batch = ZipfFacts(seed=seed, batch_size=64).train_batch(3)
    content = batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN[seed]


EXPOSURES = [0, 1, 9, 10, 99, 100, 0, 5, 30, 1000]
OBJECTS = range(3, 7)  # of 8 tokens: a model may know more than the task has


def told():
    return Exposures(
        times=torch.tensor(EXPOSURES),
        odds=torch.linspace(0.05, 0.5, 10, dtype=torch.float64),
        phase=torch.tensor([0] * 5 + [1] * 5),
    )


def case(facts, seed=0, scale=3.0, vocab=8):
    """Logits and a batch that asks for some facts, whose answers are among OBJECTS."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(facts), 3, vocab, generator=generator)
    targets = torch.full((len(facts), 3), IGNORE)
    targets[:, -1] = torch.randint(3, 7, (len(facts),), generator=generator)
    targets[::2, -1] = logits[::2, -1, 3:7].argmax(-1) + 3
    return logits, Batch(torch.zeros_like(targets), targets, {"fact": torch.tensor(facts)})


def by_hand(cases):
    """Every metric from plain loops over facts; there are two phases, so no `half_exposures`."""
    given, scale = told(), 10 / sum(len(batch.targets) for _, batch in cases)
    hits, weighted, weights, losses, stored, bits = {}, 0.0, 0.0, [], 0, 0.0
    for logits, batch in cases:
        for row, fact in enumerate(batch.slices["fact"].tolist()):
            target = int(batch.targets[row, -1])
            logs = logits[row, -1].double().log_softmax(-1).tolist()
            right, exposures = logs[target] == max(logs), EXPOSURES[fact]
            edge = 10 ** (len(str(exposures)) - 1) if exposures else 0
            for name in ("", f"/exposures={edge}", f"/phase={fact // 5}"):
                hits.setdefault(f"accuracy{name}", []).append(right)
            weights += float(given.odds[fact])
            weighted += float(given.odds[fact]) * right
            losses.append(-logs[target])
            stored += math.exp(logs[target]) > 0.5
            gains = {token: max(0.0, 2 + logs[token] / math.log(2)) for token in OBJECTS}
            bits += gains[target] - sum(gains.values()) / len(OBJECTS)
    return {name: sum(values) / len(values) for name, values in hits.items()} | {
        "accuracy_weighted": weighted / weights,
        "loss": sum(losses) / len(losses),
        "facts_stored": stored * scale,
        "stored_bits": bits * scale,
    }


@pytest.mark.parametrize("facts", [range(10), [0, 3, 5, 9]])
def test_metrics_equal_a_hand_loop_and_a_sample_is_scaled_up(facts):
    cases = [case(list(part), seed) for seed, part in enumerate((facts[:3], facts[3:]))]
    metrics = FactMetrics(told(), OBJECTS)
    for logits, batch in cases:
        metrics.update(logits, batch)
    found, wanted = metrics.compute(), by_hand(cases)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert {type(value) for value in found.values()} == {float}
    assert ("accuracy/exposures=1" in found) == (len(facts) == 10)


def test_sums_of_ranks_give_the_metrics_of_the_whole():
    whole, ranks = FactMetrics(told(), OBJECTS), [FactMetrics(told(), OBJECTS) for _ in range(2)]
    for index, facts in enumerate(([0, 1, 2], [3, 4], [5, 6, 7, 8, 9])):
        whole.update(*case(facts, index))
        ranks[index % 2].update(*case(facts, index))
    total = ranks[0].state() + ranks[1].state()
    ranks[0].load_sum(total)
    total.zero_()  # the accumulator holds its own copy
    assert ranks[0].compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_an_unscored_batch_counts_for_nothing():
    metrics = FactMetrics(told(), OBJECTS)
    logits, batch = case([0, 1, 2])
    metrics.update(logits, batch._replace(targets=torch.full_like(batch.targets, IGNORE)))
    assert (metrics.state() == 0).all()
    with pytest.raises(ValueError, match="no fact was asked for"):
        metrics.compute()


@pytest.mark.parametrize("scale", [0.3, 2.0, 30.0])
def test_a_model_that_knows_nothing_has_stored_nothing(scale):
    count, objects = 20_000, 64
    nothing = Exposures(
        torch.zeros(count, dtype=torch.int64),
        torch.full((count,), 1 / count, dtype=torch.float64),
        torch.zeros(count, dtype=torch.int64),
    )
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(count, 1, objects, generator=generator)
    targets = torch.randint(objects, (count, 1), generator=generator)
    metrics = FactMetrics(nothing, range(objects))
    metrics.update(logits, Batch(targets, targets, {"fact": torch.arange(count)}))
    # Per fact a standard deviation of at most 6 bits once in 64 times, sqrt(36 / 64) bits.
    assert abs(metrics.compute()["stored_bits"]) < 5 * math.sqrt(count * 36 / 64)


@pytest.mark.parametrize(
    ("right", "half"),
    [
        ([0, 0, 1, 1], math.sqrt(20 * 200)),  # halfway between the means 20 and 200
        ([0, 0.25, 0.75, 1], math.sqrt(20 * 200)),
        ([0, 0.25, 1, 1], 20 * 10 ** (1 / 3)),
        ([0, 0, 0, 0.25], None),
        ([1, 0.75, 0.5, 1], None),
        ([None, 0, None, 1], math.sqrt(20 * 2000)),  # decades of which nothing was asked
    ],
)
def test_half_exposures_lie_between_two_decades(right, half):
    edges = [e for e in (0, 2, 20, 200, 2000) for _ in range(4)]
    many = Exposures(
        torch.tensor(edges), torch.ones(20, dtype=torch.float64), torch.zeros(20).long()
    )
    metrics = FactMetrics(many, range(2))
    for decade, share in enumerate([1, *right]):  # facts never told count for nothing here
        for place in range(0 if share is None else 4):
            said = 1 if place < 4 * share else 0
            logits = torch.eye(2)[None, None, said]
            slices = {"fact": torch.tensor([4 * decade + place])}
            metrics.update(logits, Batch(torch.zeros(1, 1), torch.ones(1, 1).long(), slices))
    results = metrics.compute()
    assert ("half_exposures" in results) == (half is not None)
    assert half is None or results["half_exposures"] == pytest.approx(half)


@pytest.mark.parametrize(
    ("largest", "edges"),
    [(0, [0]), (1, [0, 1]), (9, [0, 1]), (10, [0, 1, 10]), (12345, [0, 1, 10, 100, 1000, 10000])],
)
def test_decades(largest, edges):
    assert decades(largest) == edges


@pytest.mark.parametrize(
    ("subjects", "letters", "alphabet"),
    [(1, 1, 2), (1, 3, 2), (32, 3, 4), (33, 3, 5), (500_000, 3, 100), (500_001, 3, 101)],
)
def test_an_alphabet_is_as_small_as_it_can_be(subjects, letters, alphabet):
    assert alphabet_for(subjects, letters) == alphabet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": 0}, r"subjects \(0\) must be at least 1"),
        ({"relations": 0}, r"relations \(0\) must be at least 1"),
        ({"subject_tokens": 0}, r"subject_tokens \(0\) must be at least 1"),
        ({"counted_batches": 0}, r"counted_batches \(0\) must be at least 1"),
        ({"objects": 1}, r"objects \(1\) must be at least 2"),
        ({"offset": -1.0}, r"offset \(-1.0\) must be above -1"),
        ({"second_phase_after": 20}, r"second_phase_after \(20\) must be from 1 to .* = 19"),
        ({"second_phase_after": 0}, r"second_phase_after \(0\) must be from 1"),
    ],
)
def test_what_cannot_be_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def trainer_of(max_steps, accumulate, processes):
    return SimpleNamespace(
        max_steps=max_steps, accumulate_grad_batches=accumulate, world_size=processes
    )


@pytest.mark.parametrize("trainer", [(20, 1, 1), (10, 2, 1), (5, 2, 2), (-1, 3, 2), None])
def test_a_run_that_draws_the_counted_batches_may_start(trainer):
    task = small()
    task.trainer = trainer and trainer_of(*trainer)
    task.setup("fit")
    assert int(task.exposures.times.sum()) == 20 * task.batch_size


@pytest.mark.parametrize(("trainer", "drawn"), [((20, 2, 1), 40), ((20, 1, 2), 40), ((6, 1, 1), 6)])
def test_a_run_that_draws_other_batches_is_refused(trainer, drawn):
    task = small()
    task.trainer = trainer_of(*trainer)
    message = f"counted over 20 training batches, but the run draws {drawn}: .*batches={drawn}$"
    with pytest.raises(ValueError, match=message):
        task.setup("fit")
    task.setup("test")  # of which training is no part


class Untrained(LightningModule):
    """What a trainer asks for before it starts."""

    def configure_optimizers(self):
        raise AssertionError("training has begun")

    def training_step(self, batch, index):
        raise AssertionError("training has begun")


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_refuses_before_training_begins():
    trainer = Trainer(max_steps=20, accumulate_grad_batches=2, accelerator="cpu", barebones=True)
    with pytest.raises(ValueError, match=r"but the run draws 40: 20 .* 2 .* 1 \(processes\)"):
        trainer.fit(Untrained(), datamodule=TaskData(small()))
