"""Whatever computes with a run's model does so in the precision that the run was trained in."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from mneme.harness.config.build import build
from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.evaluate.evaluation import restore_model
from mneme.harness.run.checkpoints import model_weights, read_checkpoint
from mneme.harness.run.jobs import start_run
from mneme.harness.run.run_directory import RunDirectory
from mneme.harness.run.training import build_model
from mneme.models import LanguageModel
from scripts import delete_blocks, demo, serve_bank, store_tables
from tests.harness.conftest import TINY
from tests.harness.test_banks import BANK, train

# Lightning's name to the types of weights and of logits; "bf16" is its older name of a mixed one.
TYPES = {
    "bf16": (torch.float32, torch.bfloat16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "64-true": (torch.float64, torch.float64),
}
TELLING = ("mixer=titans_lmm", "ffn=pkm", "ffn.sub_keys=4", "ffn.heads=2", "ffn.top_k=3")
TOLD = ("telemetry=20", "usage=true", "lengths=[1]")


@pytest.fixture(scope="module", params=TYPES)
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def run(precision, tmp_path_factory) -> RunDirectory:
    """Of a model with a memory that learns at test time and a table."""
    path = tmp_path_factory.mktemp("run") / "run"
    own = [*TELLING, "trainer.max_steps=3", f"trainer.precision={precision}", f"run_dir={path}"]
    return start_run(compose_checked([*TINY, *own]))[0]


@pytest.fixture(scope="module")
def banked(precision, tmp_path_factory) -> RunDirectory:
    return train(tmp_path_factory.mktemp("run") / "bank", *BANK, f"trainer.precision={precision}")


@contextmanager
def logits():
    """All that language models say meanwhile."""
    said = []

    def hear(module, inputs, output):
        if isinstance(module, LanguageModel) and not output.y.is_meta:
            said.append(output.y.detach())

    handle = register_module_forward_hook(hear)
    try:
        yield said
    finally:
        handle.remove()


def test_all_programs_compute_in_the_precision_of_the_run(run, banked, precision, capsys):
    weights, answers = TYPES[precision]
    small = [*TINY, "mixer.heads=1", "trainer.max_steps=3", "logger=csv"]
    demonstrated = f"run_dir={run.path.parent / 'demo'}"
    programs = {
        "eval": lambda: evaluate_command([f"run={run.path}", *TOLD]),
        "tables": lambda: store_tables.measure(run.last, split="val", cache_bytes=2**20),
        "stored": lambda: store_tables.measure(
            store_tables.export(run, run.last, 8), split="val", cache_bytes=2**20
        ),
        "serve": lambda: serve_bank.run([str(banked.path), "the", "--route=0", "--read=pread"]),
        "delete": lambda: delete_blocks.run([str(banked.path), "--leaves=1"]),
        "demo": lambda: demo.train_and_test(
            "gated_deltanet", [*small, f"trainer.precision={precision}", demonstrated]
        ),
    }
    for name, program in programs.items():
        with logits() as said:
            program()
        assert {y.dtype for y in said} == {answers}, name
        if answers == torch.float64:  # numbers that no other precision has
            assert any((y.float().double() != y).any() for y in said), name
    model = restore_model(run.read_config(), read_checkpoint(run.last))
    assert {p.dtype for p in model.parameters()} == {weights}


def test_evaluation_repeats_the_validation_of_the_run(run, banked, precision):
    """To the digits that the run itself has written."""
    for directory in (run, banked):
        expected = directory.read_summary()["metrics"]["val/loss"]
        (result,) = evaluate_command([f"run={directory.last}", "split=val", "lengths=[1]"])
        assert result.metrics["loss"] == pytest.approx(expected, rel=1e-12), directory


@pytest.mark.parametrize("precision", ["64-true"], indirect=True)
def test_the_loss_of_a_run_in_double_precision_is_that_of_plain_torch(run):
    config, checkpoint = run.read_config(), read_checkpoint(run.last)
    task = build(config["task"])
    model = build_model({**config, "trainer": {}}, task).double().eval()
    model.load_state_dict(model_weights(checkpoint))
    nats, count = 0.0, 0
    for batch in task.eval_batches("val"):
        with torch.no_grad():
            answers = model(batch.inputs).y.flatten(0, 1)
        nats += F.cross_entropy(answers, batch.targets.flatten(), reduction="sum").item()
        count += int((batch.targets != -100).sum())
    (result,) = evaluate_command([f"run={run.last}", "split=val", "lengths=[1]"])
    assert math.isclose(result.metrics["loss"], nats / count, rel_tol=1e-14)


def test_state_bytes_of_the_budget_are_those_of_the_state(run):
    (result,) = evaluate_command([f"run={run.last}", "split=val", "lengths=[1]"])
    assert result.state_bytes == run.read_summary()["budget"]["state_bytes"]
