"""Evaluation at any length, with the state carried or not, and plain words where it cannot be."""

import json
import os
from functools import partial

import pytest
from lightning.pytorch.plugins.precision import Precision

from mneme.harness.config.build import build
from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate.eval_command import _number, evaluate_command
from mneme.harness.evaluate.evaluation import evaluate, lengthened, restore_model
from mneme.harness.run.checkpoints import read_checkpoint
from mneme.harness.run.jobs import start_run
from mneme.harness.run.run_directory import TaskMismatchError
from mneme.harness.run.training import build_model


def test_a_run_is_evaluated_at_its_length_and_longer(train_tiny, capsys):
    run, _ = train_tiny()
    results = evaluate_command([f"run={run.path}"])
    assert [r.seq_len for r in results] == [16, 64, 256]
    assert all(0 <= r.metrics["accuracy"] <= 1 for r in results)
    rows = [json.loads(line) for line in run.evaluations.read_text().splitlines()]
    assert [row["seq_len"] for row in rows] == [16, 64, 256]
    assert rows[0]["commit"]
    assert "accuracy/pairs=2" in capsys.readouterr().out


def test_a_length_that_is_given_is_the_only_one(train_tiny):
    run, _ = train_tiny()
    (result,) = evaluate_command([f"run={run.path}", "task.seq_len=32"])
    assert result.seq_len == 32
    one, two = evaluate_command([f"run={run.path}", "task.seq_len=32", "lengths=[1,2]"])
    assert (one.seq_len, two.seq_len) == (32, 64)


def test_the_last_weights_give_the_summarys_metrics(train_tiny):
    run, summary = train_tiny()
    (result,) = evaluate_command([f"run={run.last}", "split=val", "lengths=[1]"])
    assert result.metrics["loss"] == pytest.approx(summary["metrics"]["val/loss"], rel=1e-5)


def test_another_task_is_chosen_by_name(train_tiny):
    run, _ = train_tiny()
    (result,) = evaluate_command(
        [f"run={run.path}", "task=mqar", "task.vocab_size=32", "task.seq_len=128",
         "task.pairs=4", "task.test_pairs=[4]", "task.test_examples=4"]
    )  # fmt: skip
    assert "accuracy/pairs=4" in result.metrics


def test_a_task_with_other_tokens_is_refused_plainly(train_tiny):
    run, _ = train_tiny()
    with pytest.raises(TaskMismatchError, match="has 8192 tokens, the model knows 32"):
        evaluate_command([f"run={run.path}", "task=mqar_paper"])


def test_independent_examples_have_no_state_to_carry(train_tiny):
    run, _ = train_tiny()
    with pytest.raises(TaskMismatchError, match="independent examples: no state to carry"):
        evaluate_command([f"run={run.path}", "carry=[true]"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: needs a value of type str"),
        (["run=x", "lenghts=[1]"], "lenghts: there is no such option; did you mean 'lengths'?"),
        (["run=x", "split=train"], "split: expected one of 'val', 'test', got 'train'"),
        (["run=x", "carry=maybe"], "carry: expected"),
        (["run=x", "carry=[]"], "carry: expected [false]"),
        (["run=x", "lengths=[0]"], "lengths: expected multiples of 1 or more"),
        (["run=x", "lengths=[1,x]"], "lengths: expected"),
        (["run=a,b"], "several values are for a sweep"),
    ],
)
def test_mistakes_in_the_command(arguments, message):
    with pytest.raises(ConfigError) as caught:
        evaluate_command(arguments)
    assert message in str(caught.value)


def test_mistakes_in_the_task(train_tiny):
    run, _ = train_tiny()
    with pytest.raises(ConfigError, match="did you mean 'seq_len'"):
        evaluate_command([f"run={run.path}", "task.seq_lenn=32"])
    with pytest.raises(ConfigError, match=r"4 \* 9 = 36 > 32"):
        evaluate_command([f"run={run.path}", "task.seq_len=32", "task.test_pairs=[9]"])


@pytest.fixture
def text_run(train_tiny, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for i in range(60):
        (files / f"{i}.txt").write_text(f"line {i} of a small text\n" * 200)
    composed = compose_checked([
        "task=text", "model.d_model=16", "model.n_layers=1", "mixer.heads=1", "logger=csv",
        f"task.source={{_target_: mneme.tasks.LocalFiles, paths: ['{files}/*.txt']}}",
        f"task.cache_dir={tmp_path / 'cache'}",
        "task.seq_len=32", "task.batch_size=4", "trainer.max_steps=10", "task.eval_tokens=3000",
        "trainer.enable_progress_bar=false", f"run_dir={tmp_path / 'text'}",
    ])  # fmt: skip
    return start_run(composed)


def test_text_is_scored_in_bits_per_byte_with_the_state_carried_and_not(text_run):
    run, summary = text_run
    assert summary["metrics"]["val/bits_per_byte"] < 8.1
    assert 0 < summary["task"]["val_gzip_bits_per_byte"] < 8
    assert 0 < summary["task"]["val_xz_bits_per_byte"] < 8
    results = evaluate_command([f"run={run.path}", "split=val"])
    assert [(r.seq_len, r.carry) for r in results] == [
        (32, False), (32, True), (128, False), (128, True), (512, False), (512, True)
    ]  # fmt: skip
    scored = {r.metrics["bytes"] for r in results}
    assert len(scored) == 1, "every row scores the same bytes"


def test_state_bytes_are_those_of_the_state_that_was_carried(text_run):
    run, _ = text_run
    config = run.read_config()
    attention = {"_target_": "mneme.layers.SoftmaxAttention", "heads": 1}
    config["model"]["pattern"] = [[attention]]
    task = build(config["task"])
    model = build_model(config, task).eval()
    score = partial(evaluate, model, task, precision=Precision(), split="val")
    fresh, carried = score(carry=False), score(carry=True)
    assert fresh.state_bytes == 4 * 2 * 16 * 32 + 8
    assert carried.state_bytes > 10 * fresh.state_bytes


def test_text_that_was_split_into_other_tokens_is_not_read(text_run, tmp_path):
    run, _ = text_run
    other = tmp_path / "files" / "*.txt"
    source = f"task.source={{_target_: mneme.tasks.LocalFiles, paths: ['{other}']}}"
    small = ["task=text_sentencepiece", "task.tokenizer.vocab_size=512", source]
    with pytest.raises(TaskMismatchError, match="has 512 tokens, the model knows 257"):
        evaluate_command([f"run={run.path}", *small, "task.seq_len=16", "task.batch_size=2"])


def test_a_model_of_text_is_not_evaluated_on_symbols(text_run):
    run, _ = text_run
    with pytest.raises(
        TaskMismatchError, match="has the vocabulary 'symbols', the model was trained on"
    ):
        evaluate_command([f"run={run.path}", "task=mqar"])


def test_a_learnt_vocabulary_goes_with_the_run_to_other_text(tmp_path):
    texts = {"a": "the cat sat on the mat, line {}\n", "b": "other words altogether: {}!\n"}
    for folder, line in texts.items():
        (tmp_path / folder).mkdir()
        for i in range(60):
            (tmp_path / folder / f"{i}.txt").write_text(line.format(i) * 100)

    def source(folder: str) -> str:
        paths = f"['{tmp_path / folder}/*.txt']"
        return f"task.source={{_target_: mneme.tasks.LocalFiles, paths: {paths}}}"

    composed = compose_checked([
        "task=text_sentencepiece", source("a"), "task.tokenizer.vocab_size=512", "logger=csv",
        f"task.cache_dir={tmp_path / 'cache'}", "model.d_model=16", "model.n_layers=1",
        "mixer.heads=1", "task.seq_len=16", "task.batch_size=2", "trainer.max_steps=2",
        "trainer.enable_progress_bar=false", f"run_dir={tmp_path / 'run'}", "task.eval_tokens=300",
    ])  # fmt: skip
    run, _ = start_run(composed)
    (result,) = evaluate_command(
        [f"run={run.path}", source("b"), "lengths=[1]", "carry=[false]", "split=val"]
    )
    bytes_per_token = result.metrics["bytes"] / result.metrics["tokens"]
    assert bytes_per_token < 2.5, "pieces learnt on other text do not fit this one"
    run.tokenizer.unlink()
    with pytest.raises(TaskMismatchError, match="it would read something else"):
        evaluate_command([f"run={run.path}", source("b"), "lengths=[1]"])


def test_a_carried_state_makes_the_block_length_irrelevant(text_run):
    run, _ = text_run
    config = run.read_config()
    model = restore_model(config, read_checkpoint(run.last))
    task = {**config["task"], "batch_size": 2}
    carried = [
        evaluate(
            model,
            build({**task, "seq_len": length}),
            precision=Precision(),
            split="val",
            carry=True,
        )
        for length in (16, 100)
    ]
    assert carried[0].metrics["loss"] == pytest.approx(carried[1].metrics["loss"], rel=1e-5)
    short = build({**task, "seq_len": 16})
    fresh = evaluate(model, short, precision=Precision(), split="val")
    assert fresh.metrics["loss"] != pytest.approx(carried[0].metrics["loss"], rel=1e-4)


def test_only_batches_of_examples_shrink_as_sequences_grow():
    """The rows of a text's batch are lanes, whose number decides how far a state is carried."""
    text = {"_target_": "mneme.tasks.Text", "seq_len": 16, "batch_size": 8}
    assert lengthened(text, 4) == {**text, "seq_len": 64}
    recall = {"_target_": "mneme.tasks.MQAR", "seq_len": 16, "batch_size": 8}
    assert lengthened(recall, 4) == {**recall, "seq_len": 64, "batch_size": 2}
    assert lengthened(recall, 16) == {**recall, "seq_len": 256, "batch_size": 1}
    without = {"_target_": "mneme.tasks.MQAR", "seq_len": 16}
    assert lengthened(without, 4) == {**without, "seq_len": 64}
    assert lengthened(recall, 1) == recall


def test_without_a_run_the_newest_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="run: needs a value"):
        evaluate_command([])
    for place, age in (("runs/older", 20), ("runs/a_sweep/3", 10), ("runs/oldest", 30)):
        summary = tmp_path / place / "summary.json"
        summary.parent.mkdir(parents=True)
        summary.write_text("{}")
        os.utime(summary, (1e9 - age, 1e9 - age))
    with pytest.raises(ConfigError, match=r"The newest is run=runs/a_sweep/3$"):
        evaluate_command(["split=val"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, ""), (2.0, "2"), (12345.0, "12,345"), (1.0, "1.0000"), (0.5, "0.5000"), (2.25,
    "2.2500"),
     (float("nan"), "nan"), (float("inf"), "inf")],
)  # fmt: skip
def test_counts_are_shown_whole_and_shares_with_four_digits(value, shown):
    assert _number(value) == shown
