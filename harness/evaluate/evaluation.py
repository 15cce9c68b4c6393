"""Evaluating a trained model on a task, at any length, with the state carried or not."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision

from mneme.harness.config.build import TARGET, build, resolve_target
from mneme.harness.config.check import Config
from mneme.harness.config.model_rules import other_leaves
from mneme.harness.run.checkpoints import load_weights
from mneme.harness.run.run_directory import TaskMismatchError
from mneme.harness.run.training import build_model
from mneme.layers import State, detach_state, state_tensors
from mneme.models import LanguageModel
from mneme.models.lightning_module import state_before
from mneme.tasks.base import Batch, EvalSplit, Task
from mneme.tasks.metrics import Metrics


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its conditions, its results, its cost.

    Attributes:
        seq_len: tokens read at a time.
        carry: whether each block went on from the state of the one before.
        metrics: the task's metrics.
        state_bytes: the largest state carried per sequence: after `seq_len` tokens, or, where it
            was carried on, after the last block.
        tokens_per_second: of the forward pass, metrics included.
    """

    seq_len: int
    carry: bool
    metrics: dict[str, float]
    state_bytes: int
    tokens_per_second: float


def restore_model(config: Config, checkpoint: dict[str, Any]) -> LanguageModel:
    """The model of a checked config with the weights of a checkpoint, ready to evaluate.

    Weights have the types of the run; compute with them in `run_precision`.
    """
    model = build_model(config, build(config["task"]))
    load_weights(model, checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval()


def lengthened(task: Config, multiple: int) -> Config:
    """A task's config at a multiple of its length.

    A batch then holds about as many tokens, except where batches continue each other: there its
    rows are lanes of one text, and fewer of them would carry a state further.

    Raises:
        TaskMismatchError: the task has no one length to multiply.
    """
    if multiple == 1:
        return task
    if "seq_len" not in task:
        raise TaskMismatchError(
            f"this task mixes lengths; it cannot be read at {multiple} times its length"
        )
    longer = {**task, "seq_len": task["seq_len"] * multiple}
    cls = resolve_target(task[TARGET])
    assert issubclass(cls, Task)
    if "batch_size" in task and not cls.continues:
        longer["batch_size"] = max(1, task["batch_size"] // multiple)
    return longer


def check_fit(trained_on: str, model: LanguageModel, task: Task) -> None:
    """Raises TaskMismatchError, with the reason, if the model cannot read the task.

    Args:
        trained_on: the vocabulary of the task that the model was trained on.
        model: the trained model.
        task: prepared.
    """
    if task.vocab_size > model.vocab_size:
        raise TaskMismatchError(
            f"the task {task.name!r} has {task.vocab_size} tokens, the model knows "
            f"{model.vocab_size}: it cannot read the others; evaluate a run trained on this "
            "vocabulary, or set the task's vocab_size"
        )
    if task.vocabulary != trained_on:
        raise TaskMismatchError(
            f"the task {task.name!r} has the vocabulary {task.vocabulary[:12]!r}, the model was "
            f"trained on {trained_on[:12]!r}: it would read something else than is there"
        )
    for name, part in other_leaves(model, task):
        raise TaskMismatchError(
            f"routes of the task {task.name!r} lead to {task.leaves} leaves, and the {name} of the "
            f"model has {part.leaves}: the routes are of another tree"
        )


def evaluate(
    model: LanguageModel,
    task: Task,
    *,
    precision: Precision,
    split: EvalSplit = "test",
    carry: bool = False,
    after_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Scores a model on a task's fixed set.

    Args:
        model: in eval mode, on the device to use.
        task: one that fits the model; prepared here.
        precision: the run's, `run_precision`.
        split: which set.
        carry: start each batch from the state in which the one before ended; only for a task whose
            batches continue each other, row by row.
        after_batch: called with the number of batches that are scored.

    Raises:
        TaskMismatchError: there is no state to carry over.
    """
    if carry and not task.continues:
        raise TaskMismatchError(
            f"the task {task.name!r} has independent examples: no state to carry"
        )
    task.prepare_data()
    metrics, state, tokens, seconds, held = task.metrics(), None, 0, 0.0, 0
    for number, batch in enumerate(task.eval_batches(split), start=1):
        started = time.perf_counter()
        with precision.forward_context():
            state = _score(model, batch, metrics, state if carry else None)
        seconds += time.perf_counter() - started
        tokens += batch.inputs.numel()
        held = max(
            held, sum(t.numel() * t.element_size() // max(1, len(t)) for t in state_tensors(state))
        )
        if after_batch is not None:
            after_batch(number)
    return Evaluation(
        seq_len=task.seq_len,
        carry=carry,
        metrics=metrics.compute(),
        state_bytes=held,
        tokens_per_second=tokens / seconds,
    )


@torch.inference_mode()
def _score(model: LanguageModel, batch: Batch, metrics: Metrics, state: State) -> State:
    """Counts one batch and returns the state after it; a fresh one reads the batch's routes."""
    device = next(model.parameters()).device
    state = state_before(model, batch) if state is None else state
    logits, state, _ = model(batch.inputs.to(device), state)
    metrics.update(logits, Batch(batch.inputs, batch.targets.to(device), batch.slices))
    return detach_state(state)
