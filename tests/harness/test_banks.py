"""Runs with a memory bank: on a base model, alone, resumed, and written to files."""

import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from mneme.harness.config.build import build
from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate.evaluation import check_fit, evaluate, restore_model
from mneme.harness.run import init_from
from mneme.harness.run.checkpoints import Interrupted, model_weights, read_checkpoint
from mneme.harness.run.jobs import resume_run, start_run
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory, TaskMismatchError
from mneme.harness.run.training import prepare
from mneme.layers import BankOptions, HierarchicalFFN, ProductKeyMemory
from mneme.models import LanguageModel
from mneme.models.bank import model_hash, read_manifest, verify_bank
from mneme.models.bank.stored import StoredBank

RARE = (
    "task=rare_facts",
    "task.library.topics=4",
    "task.library.fields=2",
    "task.library.subjects=40",
    "task.library.objects=8",
    "task.library.given_names=8",
    "task.library.surnames=2",
    "task.routing.branching=2",
    "task.routing.depth=2",
    "task.routing.components=8",
    "task.batch_size=16",
    "mixer=attention",
    "mixer.heads=1",
    "model=facts",
    "model.d_model=16",
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "checkpoint_every=2",
)
BANK = ("ffn=bank", "ffn.bank.branching=2", "ffn.bank.hidden=[4,4]")
DROPOUT = "model.dropout=0.1"  # which a frozen base model does not have
ALONE = (*BANK, "train_only=bank", "optimizer.lr=0.1", "task.ask=[question,generic]")


def train(path, *overrides) -> RunDirectory:
    return start_run(compose_checked([*RARE, *overrides, f"run_dir={path}"]))[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> RunDirectory:
    """A base model without a bank, on the same task."""
    return train(tmp_path_factory.mktemp("runs") / "dense", DROPOUT)


@pytest.fixture(scope="module")
def banked(dense, tmp_path_factory) -> RunDirectory:
    """A bank alone, trained on the frozen base model."""
    path = tmp_path_factory.mktemp("runs") / "banked"
    return train(path, *ALONE, f"init_from={dense.path}", DROPOUT)


def restored(run: RunDirectory, file=None) -> LanguageModel:
    return restore_model(run.read_config(), read_checkpoint(file or run.last))


# On a base model


def test_a_run_starts_as_its_base_model_to_the_bit(dense):
    composed = compose_checked([*RARE, *BANK, f"init_from={dense.path}"])
    prepared = prepare(composed.config)
    old, new = restored(dense, dense.best), prepared.model.eval()
    batch = prepared.task.train_batch(0)
    assert len(batch.route.unique()) > 1
    with torch.inference_mode():
        state = new.init_state(len(batch.inputs), batch.route)
        assert torch.equal(new(batch.inputs, state).y, old(batch.inputs).y)


def test_a_frozen_base_model_keeps_every_bit_and_the_bank_learns(dense, banked):
    before = model_weights(read_checkpoint(dense.best))
    after = model_weights(read_checkpoint(banked.last))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    new = {name for name in after if name not in before}
    assert new == {"bank.generic", "bank.level1", "bank.level2"}
    first = prepare(banked.read_config()).model.state_dict()
    assert not any(torch.equal(after[name], first[name]) for name in new)
    (optimizer,) = read_checkpoint(banked.last)["optimizer_states"]
    assert len(optimizer["state"]) == len(new), "what is frozen has no state"


def test_the_summary_says_whose_weights_there_were_and_which_were_trained(dense, banked):
    summary = banked.read_summary()
    assert summary["init_from"] == {
        "checkpoint": str(dense.best),
        "step": read_checkpoint(dense.best)["global_step"],
    }
    assert summary["train_only"] == "bank"
    assert not {"init_from", "train_only"} & set(dense.read_summary())


def test_frozen_parts_do_not_follow_what_they_read():
    """BatchNorm of queries would, in training mode."""
    memory = partial(ProductKeyMemory, heads=1, top_k=2, sub_keys=4, query_norm="batch")
    blocks = partial(HierarchicalFFN, bank=BankOptions(2, (4,)))
    model = LanguageModel(8, vocab_size=5, n_layers=1, pattern=[[memory, blocks]], dropout=0.5)
    init_from.freeze_all_but(model, "bank")
    before = model_hash(model)
    state = model.init_state(3, torch.tensor([0, 1, 1]))
    model(torch.zeros(3, 4, dtype=torch.long), state).y.sum().backward()
    assert model_hash(model) == before
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "bank.generic", "bank.level1",
    ]  # fmt: skip
    assert model.bank.training, "it still draws the generic block"


@pytest.mark.parametrize("name", ["blocks.0", "norm"])
def test_any_part_of_a_model_can_be_trained_alone(dense, name):
    """In training mode it alone, so that the dropout of others does not act."""
    config = compose_checked([*RARE, DROPOUT, f"train_only={name}"]).config
    model = prepare(config).model
    inside = {n for n, _ in model.named_parameters() if n.startswith(f"{name}.")}
    assert inside == {n for n, p in model.named_parameters() if p.requires_grad}
    assert model.get_submodule(name).training
    assert not model.dropout.training


def test_a_run_that_was_stopped_goes_on_without_its_base_model(
    dense, banked, tmp_path, monkeypatch, capsys
):
    copy = shutil.copytree(dense.path, tmp_path / "copy")
    stopped = RunDirectory(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr("mneme.harness.run.checkpoints.StopOnSignal.end_of_step", stop_at_the_fourth)
        with pytest.raises(Interrupted):
            train(stopped.path, *ALONE, DROPOUT, f"init_from={copy}", "callbacks.save_bank.every=4")
    assert read_manifest(stopped.bank).facts["step"] == 4
    shutil.rmtree(copy)
    resume_run(str(stopped.path))
    assert read_metrics(stopped.metrics) == read_metrics(banked.metrics)
    ours, theirs = (model_weights(read_checkpoint(run.last)) for run in (stopped, banked))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert stopped.read_summary()["init_from"]["checkpoint"].startswith(str(copy))
    assert read_manifest(stopped.bank).facts["step"] == 6
    said = [line for line in capsys.readouterr().out.splitlines() if "bank" in line]
    assert [line for line in said if line.startswith("saved")] == [
        "saved the bank of step 4",
        "saved the bank of step 6",
    ]


def stop_at_the_fourth(callback, trainer):
    if trainer.global_step == 4:
        callback.checkpoints.save(trainer)
        raise Interrupted(15, 4, callback.checkpoints.run.path)


def test_a_base_model_with_a_bank_is_taken_whole(banked):
    config = compose_checked([*RARE, *BANK, f"init_from={banked.last}"]).config
    model = prepare(config).model
    assert all(
        torch.equal(model.state_dict()[name], weight)
        for name, weight in model_weights(read_checkpoint(banked.last)).items()
    )


def test_weights_that_do_not_fit_are_named(dense, tmp_path):
    options = [f"init_from={dense.path}", "ffn.expand=2", "model.tie_embeddings=false"]
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "run", *options)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        f"init_from: {dense.best} does not fit this model:",
        "blocks.1.parts.1.parts.0.in_proj.weight is [96, 16] there and [64, 16] in this model",
        "blocks.1.parts.1.parts.0.out_proj.weight is [16, 48] there and [16, 32] in this model",
        "head.weight [229, 16] of this model is not there",
    ]
    assert not (tmp_path / "run").exists()


def test_many_weights_that_do_not_fit_are_counted(dense, tmp_path):
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "run", f"init_from={dense.path}", "model.d_model=8")
    weights = len(model_weights(read_checkpoint(dense.best)))
    assert str(caught.value).endswith(f"and {weights - 8} more weights that do not fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["init_from=nowhere"], "init_from: there is no run at nowhere"),
        (["init_from={dense}", "task.seed=7"], "it was trained on the vocabulary"),
        (["init_from={dense}", "ffn=none"], r"in_proj\.weight \[96, 16\] has no place in this"),
        (["train_only=bank"], r"the model has no part 'bank' .*\(parts: blocks, embedding, norm\)"),
        (["train_only=dropout"], "train_only: the model has no part 'dropout' to train"),
        (["callbacks.save_bank.every=3"], "save_bank: no layer of this model reads a memory bank"),
        (["callbacks.save_bank.every=0", *BANK], "save_bank: every must be 1 or more, got 0"),
        (["save_bank_every=3"], "save_bank_every: this option is callbacks.save_bank.every now"),
        (["ffn=bank"], "lead to 4 leaves, and the model's bank has 64, 4 children at each of 3"),
    ],
)
def test_options_that_cannot_be_followed_stop_the_run(dense, tmp_path, options, message):
    given = [option.format(dense=dense.path) for option in options]
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()


# Routes


def test_training_and_validation_read_the_blocks_of_routes(banked):
    """The last validation of the run, again; and the generic block answers otherwise."""
    metrics = banked.read_summary()["metrics"]
    task, model = build(banked.read_config()["task"]), restored(banked)
    again = evaluate(model, task, precision=Precision(), split="val").metrics
    assert {f"val/{name}": value for name, value in again.items()} == pytest.approx(metrics)
    assert again["loss/arm=question"] != again["loss/arm=generic"]
    table = read_checkpoint(banked.last)["optimizer_states"][0]["state"]
    touched = [state["exp_avg_sq"].ne(0).any(1) for state in table.values() if "sum" not in state]
    assert all(rows.all() for rows in touched), "every route occurs in six batches"


def test_a_bank_is_not_read_by_routes_of_another_tree(banked):
    config = {**banked.read_config()["task"], "routing": None}
    task = build(config)
    with pytest.raises(
        TaskMismatchError, match="lead to 64 leaves, and the bank of the model has 4"
    ):
        check_fit(task.vocabulary, restored(banked), task)


# In files


def test_a_finished_run_leaves_its_bank(banked):
    assert verify_bank(banked.bank) == []
    model, config = restored(banked), banked.read_config()
    task = build(config["task"])
    manifest = read_manifest(banked.bank, router=task.router, base_model=model_hash(model))
    assert manifest.facts == {"step": 6, "run": "banked"}
    batch = task.train_batch(0)
    with torch.inference_mode():
        expected = model(batch.inputs, model.init_state(16, batch.route)).y
        model.use_part("bank", StoredBank(banked.bank))
        assert torch.equal(model(batch.inputs, model.init_state(16, batch.route)).y, expected)


def test_a_run_without_a_bank_leaves_none(dense):
    assert not dense.bank.exists()


def test_a_bank_is_not_saved_by_a_run_without_the_callback(tmp_path):
    run = train(tmp_path / "run", *BANK, "callbacks.save_bank=null", "trainer.max_steps=3")
    assert not run.bank.exists()
