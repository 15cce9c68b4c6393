import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mneme.tasks import ClassIncremental
from mneme.tasks.streams import Labeled


@pytest.fixture(scope="module")
def stream():
    return ClassIncremental()


@pytest.fixture(scope="module")
def shown(stream):
    """The splits in their order."""
    return [stream.split(index, 600) for index in range(stream.splits)]


def accuracy(answer, data):
    return (answer(data.features) == data.labels).double().mean().item()


def fit(probe, data, steps):
    optimizer = torch.optim.Adam(probe.parameters(), lr=3e-2)
    for _ in range(steps):
        loss = F.cross_entropy(probe(data.features), data.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def together(parts):
    features, labels = zip(*parts, strict=True)
    return Labeled(torch.cat(features), torch.cat(labels))


def test_a_linear_probe_learns_all_classes_together_and_forgets_them_in_turn(stream, shown):
    test = stream.test(2000)
    joint, in_turn = torch.nn.Linear(128, 10), torch.nn.Linear(128, 10)
    fit(joint, together(shown), 100)
    assert accuracy(lambda x: joint(x).argmax(-1), test) > 0.95
    for split in shown:
        fit(in_turn, split, 40)
    assert accuracy(lambda x: in_turn(x).argmax(-1), test) < 0.25, "two of ten classes are left"
    assert accuracy(lambda x: in_turn(x).argmax(-1), shown[-1]) > 0.95


def test_a_class_is_in_no_one_place(stream, shown):
    features, labels = together(shown)
    means = torch.stack([features[labels == label].mean(0) for label in range(10)])
    nearest = accuracy(lambda x: torch.cdist(x, means).argmin(1), stream.test(2000))
    assert 0.4 < nearest < 0.8


def test_keys_from_unlabelled_features_serve_a_memory_that_does_not_forget(stream, shown):
    """Counts of labels at fixed keys, filled split by split."""
    keys = stream.unlabelled(1000)

    def nearest(features):
        return torch.cdist(features, keys).argmin(1)

    counts = torch.zeros(len(keys), stream.classes)
    for split in shown:
        where = nearest(split.features), split.labels
        counts.index_put_(where, torch.ones(600), accumulate=True)
    reached = accuracy(lambda x: counts[nearest(x)].argmax(1), stream.test(2000))
    assert reached > 0.7


def test_a_split_has_its_classes_evenly_and_the_test_all_of_them():
    stream = ClassIncremental(classes=12, splits=4)
    seen = []
    for index in range(4):
        labels = stream.split(index, 3000).labels.bincount(minlength=12)
        occurring = labels.nonzero().squeeze(1).tolist()
        assert occurring == list(stream.classes_of(index))
        # a standard deviation is 26
        assert (labels[occurring] - 1000).abs().max() < 5 * 26
        seen += occurring
    assert seen == list(range(12))
    labels = stream.test(12_000).labels.bincount(minlength=12)
    assert (labels - 1000).abs().max() < 5 * 31
    assert stream.chance_level == 1 / 12


def test_data_are_a_function_of_the_seed_and_streams_do_not_meet():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, again, other = (ClassIncremental(seed=seed) for seed in (0, 0, 1))
    one.test(5)  # in another order
    for draw in (lambda s: s.split(1, 50), lambda s: s.test(50)):
        assert all(map(torch.equal, draw(one), draw(again)))
        assert not torch.equal(draw(one).features, draw(other).features)
    assert torch.equal(one.unlabelled(50), again.unlabelled(50))
    parts = [one.unlabelled(50), one.test(50).features]
    parts += [one.split(index, 50).features for index in range(5)]
    rows = {tuple(row) for part in parts for row in part.tolist()}
    assert len(rows) == 7 * 50
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_features_are_of_the_size_asked_for_and_of_one_scale():
    stream = ClassIncremental(features=40)
    unlabelled, (features, labels) = stream.unlabelled(2000), stream.test(2000)
    assert features.shape == unlabelled.shape == (2000, 40)
    assert features.dtype == unlabelled.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert features.std().item() == pytest.approx(unlabelled.std().item(), rel=0.1)
    assert features.abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 10, "splits": 3}, r"splits \(3\) must divide classes \(10\)"),
        ({"clusters": 0}, r"clusters \(0\) must be at least 1"),
        ({"spread": -0.1}, r"spread \(-0.1\) must not be negative"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ClassIncremental(**options)


def test_a_split_that_is_not_there_is_an_error(stream):
    with pytest.raises(ValueError, match=r"split \(5\) must be in \[0, 5\)"):
        stream.split(5, 10)
