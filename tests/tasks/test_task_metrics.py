import math

import pytest
import torch

from mneme.tasks.batch import IGNORE, Batch
from mneme.tasks.metrics import ROWS, RecallMetrics, TextMetrics, doubling_edges


def random_case(seed, batch=5, length=9, vocab=7):
    """Logits and a recall batch with about half of its positions scored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocab, generator=generator)
    targets = torch.randint(vocab, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < 0.5] = IGNORE
    targets[0] = logits[0].argmax(-1)  # one example all right
    targets[1] = IGNORE  # and one that is asked for nothing
    slices = {
        "pairs": torch.randint(2, 4, (batch,), generator=generator),
        "gap": torch.randint(1, 21, (batch, length), generator=generator),
        "bytes": torch.randint(4, (batch, length), generator=generator),
    }
    return logits, Batch(torch.zeros_like(targets), targets, slices)


def gap_label(gap):
    low, high = 1, 1
    while gap > high:
        low, high = high + 1, 2 * high
    return f"{low}" if low == high else f"{low}-{high}"


def recall_by_hand(cases):
    """Every metric from plain loops over positions."""
    hits, losses, shares = {}, [], []
    for logits, batch in cases:
        for row in range(len(logits)):
            mine = []
            for place in range(logits.shape[1]):
                target = int(batch.targets[row, place])
                if target == IGNORE:
                    continue
                scores = logits[row, place].double().tolist()
                right = scores.index(max(scores)) == target
                losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[target])
                gap = gap_label(int(batch.slices["gap"][row, place]))
                pairs = int(batch.slices["pairs"][row])
                for name in ("accuracy", f"accuracy/gap={gap}", f"accuracy/pairs={pairs}"):
                    hits.setdefault(name, []).append(right)
                mine.append(right)
            if mine:
                shares.append(sum(mine) / len(mine))
    metrics = {name: sum(values) / len(values) for name, values in hits.items()}
    metrics["loss"] = sum(losses) / len(losses)
    metrics["accuracy_by_example"] = sum(shares) / len(shares)
    metrics["exact_sequence_accuracy"] = sum(share == 1 for share in shares) / len(shares)
    return metrics


def recall_metrics():
    return RecallMetrics({"pairs": [2, 3], "gap": [20]})


def test_recall_metrics_equal_a_hand_loop():
    cases = [random_case(seed) for seed in range(3)]
    metrics = recall_metrics()
    for logits, batch in cases:
        metrics.update(logits, batch)
    wanted = recall_by_hand(cases)
    assert metrics.compute() == pytest.approx(wanted, rel=1e-6)
    assert {"accuracy/gap=1", "accuracy/gap=3-4", "accuracy/gap=17-32"} <= wanted.keys()


def test_text_metrics_equal_a_hand_loop():
    logits, batch = random_case(4)
    metrics = TextMetrics()
    metrics.update(logits, batch)
    scored = (batch.targets != IGNORE).nonzero().tolist()
    nll = sum(
        float(-logits[row, place].double().log_softmax(-1)[batch.targets[row, place]])
        for row, place in scored
    )
    size = sum(int(batch.slices["bytes"][row, place]) for row, place in scored)
    wanted = {
        "loss": nll / len(scored),
        "perplexity": math.exp(nll / len(scored)),
        "bits_per_byte": nll / math.log(2) / size,
        "tokens": len(scored),
        "bytes": size,
    }
    assert metrics.compute() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("make", [recall_metrics, TextMetrics])
def test_sums_of_ranks_give_the_metrics_of_the_whole(make):
    cases = [random_case(seed) for seed in range(4)]
    whole, ranks = make(), [make(), make()]
    for index, (logits, batch) in enumerate(cases):
        whole.update(logits, batch)
        ranks[index % 2].update(logits, batch)
    total = ranks[0].state() + ranks[1].state()
    ranks[0].load_sum(total)
    assert ranks[0].compute() == pytest.approx(whole.compute(), rel=1e-12)
    total.zero_()  # the accumulator holds its own copy
    assert ranks[0].compute() == pytest.approx(whole.compute(), rel=1e-12)
    ranks[0].update(*cases[0])
    assert ranks[0].state().sum() > whole.state().sum()


@pytest.mark.parametrize("make", [recall_metrics, TextMetrics])
def test_an_unscored_batch_counts_for_nothing(make):
    logits, batch = random_case(0)
    metrics = make()
    metrics.update(logits, batch._replace(targets=torch.full_like(batch.targets, IGNORE)))
    assert (metrics.state() == 0).all()
    with pytest.raises(ValueError, match="no scored target"):
        metrics.compute()


def test_more_positions_than_are_scored_at_a_time():
    length = ROWS // 2 + 3
    logits, batch = random_case(0, batch=5, length=length)
    whole, rows = TextMetrics(), TextMetrics()
    whole.update(logits, batch)
    for row in range(5):
        slices = {"bytes": batch.slices["bytes"][row : row + 1]}
        part = Batch(batch.inputs[row : row + 1], batch.targets[row : row + 1], slices)
        rows.update(logits[row : row + 1], part)
    assert whole.compute()["tokens"] > ROWS
    assert whole.compute() == pytest.approx(rows.compute(), rel=1e-9)


def test_half_precision_logits_are_scored_in_fp32():
    logits, batch = random_case(0)
    logits = logits.bfloat16()
    half, full = TextMetrics(), TextMetrics()
    half.update(logits, batch)
    full.update(logits.float(), batch)
    assert half.compute() == full.compute()


def test_the_numbers_are_python_floats_and_hold_no_graph():
    logits, batch = random_case(0)
    metrics = recall_metrics()
    metrics.update(logits.requires_grad_(), batch)
    assert not metrics.state().requires_grad
    assert {type(value) for value in metrics.compute().values()} == {float}


def test_an_undeclared_slice_value_is_an_error():
    logits, batch = random_case(0)
    with pytest.raises(ValueError, match=r"slice 'pairs' holds 3, .* built for \[2, 4\]"):
        RecallMetrics({"pairs": [2, 4], "gap": [20]}).update(logits, batch)


def test_logits_that_do_not_match_are_an_error():
    logits, batch = random_case(0)
    with pytest.raises(ValueError, match=r"\(5, 8, 7\) must be targets \(5, 9\) plus"):
        TextMetrics().update(logits[:, 1:], batch)


@pytest.mark.parametrize(
    ("largest", "edges"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (64, [1, 2, 4, 8, 16, 32, 64])]
)
def test_doubling_edges(largest, edges):
    assert doubling_edges(largest) == edges
