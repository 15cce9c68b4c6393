"""One run, in its variants."""

import json
from dataclasses import replace

import pytest
import torch

from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.run.jobs import start_run
from mneme.harness.run.metrics_file import read_metrics
from mneme.models.diagnosis import NonFiniteError
from tests.harness.conftest import TINY


def test_summary_holds_what_a_table_needs(train_tiny):
    run, summary = train_tiny()
    assert json.loads(run.summary.read_text()) == summary
    assert {"command", "commit", "hardware", "versions", "config_hash", "seed", "task"} <= set(
        summary
    )
    assert {"parameters", "active_parameters", "state_bytes", "flops_per_token"} <= set(
        summary["budget"]
    )
    assert 0 <= summary["metrics"]["val/accuracy"] <= 1
    assert summary["choices"]["mixer"] == "gated_deltanet"


def test_equal_seeds_give_equal_losses_and_others_do_not(train_tiny):
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run, _ = train_tiny(f"seed={seed}", "model.dropout=0.2", name=name)
        losses.append(
            [row["train/loss"] for row in read_metrics(run.metrics) if "train/loss" in row]
        )
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_accumulated_batches_make_one_update_and_one_row(train_tiny):
    options = ("trainer.accumulate_grad_batches=3", "trainer.val_check_interval=9")
    run, summary = train_tiny(*options)
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]
    assert summary["tokens"] == 6 * 3 * 4 * 16


def test_tokens_of_a_mixture_are_those_that_were_read(tmp_path):
    part = {"_target_": "mneme.tasks.MQAR", "vocab_size": 32, "batch_size": 2, "test_examples": 2}
    composed = compose_checked([*(o for o in TINY if o[:5] != "task."), "task=mqar_mix"])
    task = {
        "_target_": "mneme.tasks.RecallMixture",
        "train": [{**part, "seq_len": 8, "pairs": 2}],
        "test": [{**part, "seq_len": 64, "pairs": 2}],
    }
    config = {**composed.config, "task": task, "run_dir": str(tmp_path / "run")}
    _, summary = start_run(replace(composed, config=config))
    assert summary["tokens"] == 6 * 2 * 8


def test_no_clipping_is_not_clipping_to_nothing(train_tiny):
    runs = [train_tiny(f"trainer.gradient_clip_val={v}", name=str(v))[0] for v in (0, 1000)]
    losses = [[r.get("train/loss") for r in read_metrics(run.metrics)] for run in runs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=-1", "optimizer: Invalid learning rate"),
        ("schedule.floor=5", "schedule: floor is a share of the peak"),
        ("mixer.heads=0", "model: heads must be 1 or more, got 0"),
        ("mixer.chunk_size=48", "model: chunk_size is 48; it must be a power of two"),
        ("mixer.expand_v=0.01", "model: value_size_of_a_head must be 1 or more"),
        ("checkpoint_every=0", r"checkpoint_every \(0\) must be 1 or more"),
    ],
)
def test_values_out_of_range_stop_the_run_before_it_has_a_directory(
    train_tiny, tmp_path, override, message
):
    with pytest.raises(ConfigError, match=message):
        train_tiny(override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override",
    [
        "trainer.precision=bf16-mixed",
        "model.checkpoint_blocks=true",
        "schedule=wsd",
        "schedule=constant",
        "trainer.max_steps=7",
        "mixer=sliding_window",
    ],
)
def test_variants_train(train_tiny, override):
    _, summary = train_tiny(override)
    assert summary["status"] == "finished"
    assert "val/accuracy" in summary["metrics"]


def test_recomputing_blocks_changes_no_loss(train_tiny):
    rows = []
    for name, option in (("kept", "false"), ("recomputed", "true")):
        run, _ = train_tiny(f"model.checkpoint_blocks={option}", "model.dropout=0.1", name=name)
        rows.append(read_metrics(run.metrics))
    assert rows[0] == rows[1]


def test_values_that_do_not_go_together_are_a_config_error(train_tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"model: heads \(3\) must divide d_model \(16\)"):
        train_tiny("mixer.heads=3")
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_a_trainer_that_lightning_refuses_is_a_config_error(train_tiny):
    with pytest.raises(ConfigError, match=r"trainer: .*accelerator"):
        train_tiny("trainer.accelerator=abacus")


def test_a_loss_that_is_no_number_stops_the_run(train_tiny, tmp_path, monkeypatch):
    from mneme.layers import GatedDeltaNet

    original, calls = GatedDeltaNet.forward, []

    def fails_at_the_fourth_step(self, x, state=None):
        output = original(self, x, state)
        calls.append(torch.is_grad_enabled())
        return output._replace(y=output.y * torch.nan) if sum(calls) > 3 else output

    monkeypatch.setattr(GatedDeltaNet, "forward", fails_at_the_fourth_step)
    with pytest.raises(NonFiniteError) as caught:
        train_tiny()
    message = str(caught.value)
    assert "the loss is nan at step 3" in message
    assert "blocks.1.parts.0.parts.0" in message
    assert (
        f"last good checkpoint: step 2: {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}" in message
    )


def test_a_gradient_that_is_no_number_stops_the_run_before_the_step(train_tiny, monkeypatch):
    from mneme.layers import GatedDeltaNet

    original = GatedDeltaNet.forward

    def poisons_the_gradient(self, x, state=None):
        output = original(self, x, state)
        if output.y.requires_grad:
            output.y.register_hook(lambda gradient: gradient * torch.inf)
        return output

    monkeypatch.setattr(GatedDeltaNet, "forward", poisons_the_gradient)
    with pytest.raises(NonFiniteError, match=r"the gradient is not finite at step 0.*out_proj"):
        train_tiny()
