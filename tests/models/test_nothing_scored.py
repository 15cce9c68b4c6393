"""Where nothing is scored there is nothing to average over, and no figure that is not a number."""

import pytest
import torch
from torch.nn import functional as F

from mneme.models.lightning_module import mean_loss
from mneme.tasks.base import IGNORE, Batch
from mneme.tasks.metrics import RecallMetrics, TextMetrics

NOTHING = [(0, 3), (2, 0), (0, 0)]


def logits_for(targets):
    return torch.randn(*targets.shape, 5, requires_grad=True)


def batch_of(targets):
    slices = {"bytes": torch.ones_like(targets), "pairs": targets.new_full((len(targets),), 2)}
    return Batch(torch.zeros_like(targets), targets, slices)


@pytest.mark.parametrize("shape", [(2, 3), *NOTHING], ids=str)
def test_the_loss_of_no_target_is_zero_and_moves_nothing(shape):
    targets = torch.full(shape, IGNORE)
    logits = logits_for(targets)
    loss = mean_loss(logits, targets)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_the_loss_of_some_targets_is_their_mean():
    targets = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 0]])
    logits = logits_for(targets)
    loss = mean_loss(logits, targets)
    scored = targets != IGNORE
    assert torch.equal(loss, F.cross_entropy(logits[scored], targets[scored]))
    assert torch.isnan(mean_loss(logits * torch.nan, targets))


@pytest.mark.parametrize(
    "make", [TextMetrics, lambda: RecallMetrics({"pairs": [2]})], ids=["text", "recall"]
)
@pytest.mark.parametrize("shape", [(2, 3), *NOTHING], ids=str)
def test_batches_without_a_target_change_no_metric(make, shape):
    metrics = make()
    some, none = torch.tensor([[1, IGNORE, 2]]), torch.full(shape, IGNORE)
    metrics.update(logits_for(some), batch_of(some))
    before = metrics.compute()
    metrics.update(logits_for(none), batch_of(none))
    assert metrics.compute() == before
    assert all(value == value for value in before.values())  # NaN is not itself
