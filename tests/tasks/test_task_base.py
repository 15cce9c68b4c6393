import itertools
from functools import partial
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from mneme.harness.run.data import TaskData
from mneme.tasks import MQAR, ForgettingMQAR, Needle
from mneme.tasks.base import STREAMS
from mneme.tasks.batch import IGNORE, deal


def equal(left, right):
    """Whether two batches are the same, slices included."""
    return (
        torch.equal(left.inputs, right.inputs)
        and torch.equal(left.targets, right.targets)
        and left.slices.keys() == right.slices.keys()
        and all(torch.equal(left.slices[name], right.slices[name]) for name in left.slices)
    )


def fake_trainer(global_step=0, accumulate=1, world_size=1, rank=0):
    return SimpleNamespace(
        global_step=global_step,
        accumulate_grad_batches=accumulate,
        world_size=world_size,
        global_rank=rank,
    )


@pytest.fixture(params=["mqar", "text"])
def task(request, make_text):
    if request.param == "text":
        return make_text(seed=3)
    return MQAR(batch_size=4, test_examples=10, test_pairs=[2, 8], seed=3)


@pytest.mark.parametrize("kind", [MQAR, ForgettingMQAR, Needle])
def test_a_recall_task_declares_the_slices_that_its_batches_have(kind):
    recall = kind(batch_size=2)
    assert recall.slice_values().keys() == recall.train_batch(0).slices.keys()


def test_train_batch_is_pure_and_leaves_global_random_state_alone(task):
    task.train_batch(0)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = task.train_batch(7)
    task.train_batch(3)
    assert equal(task.train_batch(7), first)
    assert not equal(task.train_batch(8), first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_iterating_the_loaders_leaves_global_random_state_alone(task):
    before = torch.get_rng_state()
    for loader in (task.train_dataloader(), task.val_dataloader(), task.test_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_eval_batches_are_fixed_and_can_be_iterated_again(task):
    batches = task.eval_batches("val")
    first, second = list(batches), list(batches)
    assert len(first) > 1
    assert all(itertools.starmap(equal, zip(first, second, strict=True)))
    assert not equal(first[0], next(iter(task.eval_batches("test"))))


def test_every_split_index_and_seed_has_its_own_stream():
    tasks = [MQAR(seed=seed) for seed in (0, 1, 2**32 - 1)]
    draws = [
        tuple(task.rng(split, index).integers(2**63, size=2))
        for task in tasks
        for split in STREAMS
        for index in range(50)
    ]
    assert len(set(draws)) == len(draws) == 3 * 3 * 50


@pytest.mark.parametrize("make", [MQAR, Needle])
def test_the_test_set_does_not_depend_on_the_batch_size(make):
    small, large = (make(batch_size=size, test_examples=50) for size in (7, 50))
    rows = [torch.cat([batch.inputs for batch in t.eval_batches("val")]) for t in (small, large)]
    assert torch.equal(*rows)
    assert len(rows[0]) == 50 * len(large.test_levels)


@pytest.mark.parametrize(
    "make",
    [MQAR, partial(Needle, value_length=7), partial(Needle, value_length=7, fixed_noise=True)],
)
def test_train_val_and_test_examples_are_disjoint(make):
    task = make(batch_size=64, test_examples=256)
    parts = {
        "train": [task.train_batch(index) for index in range(20)],
        "val": task.eval_batches("val"),
        "test": task.eval_batches("test"),
    }
    rows = {
        split: {tuple(row) for batch in batches for row in batch.inputs.tolist()}
        for split, batches in parts.items()
    }
    assert [len(found) for found in rows.values()] == [1280, 256, 256]
    for left, right in itertools.combinations(rows.values(), 2):
        assert not left & right


@pytest.mark.parametrize(
    ("trainer", "indices"),
    [
        (None, [0, 1, 2]),
        (fake_trainer(), [0, 1, 2]),
        (fake_trainer(global_step=5), [5, 6, 7]),
        (fake_trainer(global_step=5, accumulate=3), [15, 16, 17]),
        (fake_trainer(global_step=5, accumulate=3, world_size=4, rank=2), [62, 66, 70]),
    ],
)
def test_training_starts_where_the_trainer_stands(task, trainer, indices):
    task.trainer = trainer
    seen = itertools.islice(iter(task.train_dataloader()), 3)
    wanted = [task.train_batch(index) for index in indices]
    assert all(itertools.starmap(equal, zip(seen, wanted, strict=True)))


def test_a_loader_iterated_again_goes_on_from_the_present_step(task):
    task.trainer = fake_trainer()
    loader = task.train_dataloader()
    next(iter(loader))
    task.trainer.global_step = 9
    assert equal(next(iter(loader)), task.train_batch(9))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_get_equally_many_batches_and_score_each_once(task, world_size):
    whole = list(task.eval_batches("val"))
    shares = [list(deal(whole, rank, world_size)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {-(-len(whole) // world_size)}
    dealt = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert all(itertools.starmap(equal, zip(whole, dealt, strict=False)))
    assert all((batch.targets == IGNORE).all() for batch in dealt[len(whole) :])


def test_eval_loader_deals_by_rank(task):
    whole = list(task.eval_batches("test"))
    task.trainer = fake_trainer(world_size=2, rank=1)
    assert equal(list(task.test_dataloader())[1], whole[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        ({"seed": -1}, r"seed \(-1\) must be in \[0, 2\*\*32\)"),
        ({"vocab_size": 0}, r"vocab_size \(0\) must be at least 2"),
        ({"test_examples": 0}, r"test_examples \(0\) must be at least 1"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**options)


class Recorder(L.LightningModule):
    """Trains one number and remembers the data it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch.inputs)
        return self.weight * batch.inputs.float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(task, folder, steps, checkpoint=None):
    model = Recorder()
    trainer = L.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=TaskData(task), ckpt_path=checkpoint)
    return trainer, model.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_lightning_run_sees_the_same_data(tmp_path, stop):
    def task():
        return MQAR(batch_size=2, test_examples=2)

    _, whole = fit(task(), tmp_path, steps=6)
    trainer, before = fit(task(), tmp_path, steps=stop)
    checkpoint = tmp_path / "last.ckpt"
    trainer.save_checkpoint(checkpoint)
    _, after = fit(task(), tmp_path, steps=6, checkpoint=checkpoint)
    assert len(whole) == 12
    assert torch.equal(torch.stack(whole), torch.stack(before + after))
    wanted = [task().train_batch(index).inputs for index in range(12)]
    assert torch.equal(torch.stack(whole), torch.stack(wanted))
