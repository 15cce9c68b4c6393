import pytest
import torch

from mneme.tasks import MQAR, ForgettingMQAR, Needle, RecallMixture
from mneme.tasks.recall import solve_mqar, solve_needle


def mqar(seq_len, pairs, **options):
    return MQAR(seq_len=seq_len, pairs=pairs, vocab_size=8192, random_filler=True, **options)


def preset_mix(**options):
    """The mixture of the linear-attention literature: five cells to train on, seven to test on."""
    train = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
    test = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    return RecallMixture(
        train=[mqar(*cell, batch_size=8) for cell in train],
        weights=[5, 1, 1, 1, 1],
        test=[mqar(*cell, batch_size=4, test_examples=6) for cell in test],
        **options,
    )


def cell(batch):
    return int(batch.slices["length"][0]), int(batch.slices["pairs"][0])


def test_training_follows_the_weights():
    mixture = preset_mix()
    cells = [cell(mixture.train_batch(index)) for index in range(180)]
    assert len(set(cells)) == 5
    # Expected 100 of 180, one standard deviation is 6.7.
    assert cells.count((64, 4)) == pytest.approx(100, abs=27)


def test_the_solver_is_right_on_every_cell():
    mixture = preset_mix()
    metrics = mixture.metrics()
    for batch in mixture.eval_batches("test"):
        answers = torch.nn.functional.one_hot(solve_mqar(batch.inputs), 8192)
        metrics.update(answers.half(), batch)
    results = metrics.compute()
    assert results["accuracy"] == results["accuracy/length=1024"] == 1.0
    lengths = {name for name in results if name.startswith("accuracy/length=")}
    assert lengths == {f"accuracy/length={n}" for n in (64, 128, 256, 512, 1024)}
    assert mixture.seq_len == 1024


def test_tasks_of_different_kinds_are_each_counted_in_their_own_slices():
    parts = [
        MQAR(pairs=4, test_examples=6),
        ForgettingMQAR(pairs=[4, 8], test_examples=6),
        Needle(seq_len=64, vocab_size=256, test_examples=6),
    ]
    mixture = RecallMixture(train=parts, test=parts)
    metrics = mixture.metrics()
    for batch in mixture.eval_batches("test"):
        is_needle = "depth" in batch.slices
        answers = solve_needle(batch.inputs) if is_needle else 0 * batch.inputs
        if "rewritten" in batch.slices:
            answers = solve_mqar(batch.inputs)
        metrics.update(torch.nn.functional.one_hot(answers, 256).float(), batch)
    results = metrics.compute()
    # All are right but MQAR's: of 24 answers to it, 24 + 48 to the other and 6 needles.
    assert results["accuracy"] == pytest.approx(78 / 102)
    assert results["accuracy/pairs=4"] == 24 / 48
    assert results["accuracy/length=64"] == 6 / 30
    ones = {"pairs=8", "rewritten=0", "rewritten=1", "value_length=1", "length=128"}
    assert {results[f"accuracy/{name}"] for name in ones} == {1.0}
    assert any(name.startswith("accuracy/depth=") for name in results)


def test_batches_are_pure_and_follow_the_mixtures_seed():
    one, same, other = preset_mix(seed=1), preset_mix(seed=1), preset_mix(seed=2)
    assert torch.equal(one.train_batch(5).inputs, same.train_batch(5).inputs)
    seen = [batch.inputs for batch in one.eval_batches("val")]
    again = [batch.inputs for batch in same.eval_batches("val")]
    others = [batch.inputs for batch in other.eval_batches("val")]
    assert len(seen) == 14  # seven cells of six examples in batches of four
    assert all(torch.equal(*pair) for pair in zip(seen, again, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(seen, others, strict=True))


def test_facts_name_the_cells():
    facts = preset_mix().facts()
    assert "mqar length 1024 level 256" in facts["test_segments"]
    assert facts["train_odds"] == "[0.555556, 0.111111, 0.111111, 0.111111, 0.111111]"
    assert facts["chance_level"] == 1 / 4096


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 2]}, "2 weights do not match 1 training tasks"),
        ({"weights": [0]}, "must not be negative, nor all zero"),
        ({"test": []}, r"tasks to train on \(got 1\) and to test on \(got 0\)"),
        ({"test": [MQAR(vocab_size=64)]}, r"share one vocab_size, but have \[64, 256\]"),
    ],
)
def test_what_cannot_be_mixed_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        RecallMixture(**({"train": [MQAR()], "test": [MQAR()]} | options))
