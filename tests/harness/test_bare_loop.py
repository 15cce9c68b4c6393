"""A run against the same training written out by hand, and what best and last checkpoints hold."""

import math
import subprocess

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.run import provenance, stopwatch
from mneme.harness.run.checkpoints import load_weights, read_checkpoint
from mneme.harness.run.jobs import resume_run, start_run
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory
from mneme.harness.run.training import prepare, train
from mneme.models import SequenceModule
from tests.harness.conftest import TINY

STEPS, LR, CLIP, DECAY = 8, 0.02, 0.3, 0.5
LOOP = (
    "ffn=moe",  # has losses of its own
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=4",
    f"trainer.gradient_clip_val={CLIP}",
    "trainer.accumulate_grad_batches=1",
    f"optimizer.lr={LR}",
    f"optimizer.weight_decay={DECAY}",
    "optimizer.betas=[0.9,0.95]",
    "schedule=cosine",
    "schedule.warmup=0.25",
    "schedule.floor=0.1",
)


def learning_rate(step):
    """Two steps of linear warm-up, then half a cosine down to a tenth."""
    if step < 2:
        return LR * (step + 1) / 2
    return LR * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))))


def test_a_run_is_this_loop(train_tiny):
    prepared = prepare(compose_checked([*TINY, *LOOP]).config)
    model, task = prepared.model.train(), prepared.task
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
    )
    losses, norms = [], []
    for step in range(STEPS):
        inputs, targets = task.train_batch(step)[:2]
        logits, _, aux = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        losses.append(loss.item())
        extra = [value for name, value in aux.items() if "/loss_" in name]
        assert extra
        assert all(value > 0 for value in extra)
        optimizer.zero_grad()
        (loss + sum(extra)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    assert min(norms) > CLIP, "clipping has to matter here"

    run, _ = train_tiny(*LOOP)
    rows = [row for row in read_metrics(run.metrics) if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    assert [row["train/grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
    assert [row["train/lr"] for row in rows] == pytest.approx(
        [learning_rate(step) for step in range(STEPS)]
    )
    trained = prepare(compose_checked([*TINY, *LOOP]).config).model
    load_weights(trained, read_checkpoint(run.last))
    for (name, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), name


def test_dropout_differs_between_batches_and_seeds_and_repeats_with_the_seed(
    train_tiny, monkeypatch
):
    masks = []
    dropout = torch.nn.Dropout.forward

    def seen(self, x):
        y = dropout(self, x)
        if self.training and x.requires_grad:
            masks.append(tuple((y == 0).flatten()[:64].tolist()))
        return y

    monkeypatch.setattr(torch.nn.Dropout, "forward", seen)
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        masks.clear()
        train_tiny("model.dropout=0.5", f"seed={seed}", name=name)
        found[name] = list(masks)
    assert len(set(found["a"])) == len(found["a"]), "two calls dropped the same elements"
    assert found["a"] == found["b"]
    assert not set(found["a"]) & set(found["c"])


TEXT = (
    "task=text",
    "mixer=sliding_window",
    "mixer.heads=1",
    "mixer.window=4",
    "model.n_layers=1",
    "model.d_model=16",
    "ffn=none",
    "logger=csv",
    "task.seq_len=32",
    "task.batch_size=4",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "checkpoint_every=2",
    "schedule=constant",
)


@pytest.fixture
def restless(tmp_path):
    """Overrides of a run on text whose validation gets worse again, as its rate is far too high."""
    (tmp_path / "text").mkdir()
    for name in "abcdefghij":
        (tmp_path / "text" / f"{name}.txt").write_text(
            f"{name} says so, and {name} is right. " * 40
        )
    source = (
        f"task.source={{_target_: mneme.tasks.LocalFiles, paths: ['{tmp_path / 'text'}/*.txt']}}"
    )
    return [*TEXT, source, f"task.cache_dir={tmp_path / 'cache'}", "optimizer.lr=0.3"]


def validations(run):
    return {
        row["step"]: row["val/bits_per_byte"]
        for row in read_metrics(run.metrics)
        if "val/bits_per_byte" in row
    }


class CrashAfter(Callback):
    """A crash after an update."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("the machine went away")


def test_best_is_the_lowest_bits_per_byte_and_last_is_the_last(restless, tmp_path):
    run, _ = start_run(compose_checked([*restless, f"run_dir={tmp_path / 'run'}"]))
    found = validations(run)
    best = min(found, key=found.get)
    assert best != max(found), "the last validation is to be worse than another"
    assert read_checkpoint(run.best)["global_step"] == best
    assert read_checkpoint(run.last)["global_step"] == max(found)
    for name, step in (("best", best), ("last", max(found))):
        asked = [f"run={run.path}", f"checkpoint={name}", "split=val", "lengths=[1]"]
        (result,) = evaluate_command([*asked, "carry=[false]"])
        assert result.metrics["bits_per_byte"] == pytest.approx(found[step], rel=1e-5)


def test_a_resumed_run_remembers_its_best_and_its_tokens(restless, tmp_path):
    whole, summary = start_run(compose_checked([*restless, f"run_dir={tmp_path / 'whole'}"]))
    found = validations(whole)
    best = min(found, key=found.get)
    stop = best + 3  # after the save that follows it, before the next validation
    assert any(step > stop for step in found)
    composed = compose_checked([*restless, f"run_dir={tmp_path / 'stopped'}"])
    run = RunDirectory(tmp_path / "stopped")
    run.path.mkdir()
    run.write_config(composed.config)
    with pytest.raises(RuntimeError, match="went away"):
        train(prepare(composed.config), run, callbacks=[CrashAfter(stop)])
    assert read_checkpoint(run.best)["global_step"] == best
    resume_run(str(run.path))
    assert validations(run) == found
    assert read_checkpoint(run.best)["global_step"] == best
    assert run.read_summary()["tokens"] == summary["tokens"] == 6 * 4 * 32


@pytest.mark.parametrize("steps", [6, 7])  # the last validation ends training, or follows it
def test_validation_is_no_training_time(train_tiny, monkeypatch, steps):
    added = {"training": 0, "validation": 0}  # on a clock that only steps move
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: sum(added.values()))
    for kind, seconds in (("training", 1), ("validation", 1000)):
        step = getattr(SequenceModule, f"{kind}_step")

        def timed(self, *inputs, step=step, kind=kind, seconds=seconds):
            added[kind] += seconds
            return step(self, *inputs)

        monkeypatch.setattr(SequenceModule, f"{kind}_step", timed)
    _, summary = train_tiny(f"trainer.max_steps={steps}")
    assert added["validation"]
    assert added["training"] == steps
    assert summary["tokens_per_second"] == summary["tokens"] / added["training"]


def test_uncommitted_changes_are_named_with_the_commit(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == head
    (tmp_path / "file").write_text("two")
    assert provenance.commit() == f"{head}+changes"
    git("checkout", "file")
    (tmp_path / "new").write_text("three")
    assert provenance.commit() == f"{head}+changes"
