"""Evaluating a trained model on a task, at any length, with the state carried or not."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from harness.build import build
from harness.check import Config
from harness.checkpoints import load_weights
from harness.training import build_model
from layers import State, detach_state
from models import LanguageModel, budget
from tasks.base import Batch, EvalSplit, Task


class FitError(ValueError):
    """A task does not fit a model."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: what was asked, what came out, what it cost.

    Attributes:
        seq_len: tokens read at a time.
        carry: whether each block went on from the state of the one before.
        metrics: the task's metrics.
        state_bytes: state per sequence after `seq_len` tokens.
        tokens_per_second: of the forward pass, metrics included.
    """

    seq_len: int
    carry: bool
    metrics: dict[str, float]
    state_bytes: int
    tokens_per_second: float


def restore_model(config: Config, checkpoint: dict[str, Any]) -> LanguageModel:
    """The model of a checked config with the weights of a checkpoint, ready to evaluate."""
    model = build_model(config, build(config["task"]))
    load_weights(model, checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval()


def lengthened(task: Config, multiple: int) -> Config:
    """A task's config at a multiple of its length, with about as many tokens per batch.

    Raises:
        FitError: the task has no one length to multiply.
    """
    if multiple == 1:
        return task
    if "seq_len" not in task:
        raise FitError(f"this task mixes lengths; it cannot be read at {multiple} times its length")
    batch_size = max(1, task["batch_size"] // multiple)
    return {**task, "seq_len": task["seq_len"] * multiple, "batch_size": batch_size}


def check_fit(model: LanguageModel, task: Task) -> None:
    """Raises FitError, with the reason, if the model cannot read the task."""
    if task.vocab_size > model.vocab_size:
        raise FitError(
            f"the task {task.name!r} has {task.vocab_size} tokens, the model knows "
            f"{model.vocab_size}: it cannot read the others; evaluate a run trained on this "
            "vocabulary, or set the task's vocab_size"
        )


def evaluate(
    model: LanguageModel, task: Task, *, split: EvalSplit = "test", carry: bool = False
) -> Evaluation:
    """Scores a model on a task's fixed set.

    Args:
        model: in eval mode, on the device to use.
        task: prepared here.
        split: which set.
        carry: start each batch from the state in which the one before ended; only for a task whose
            batches continue each other, row by row.

    Raises:
        FitError: the task does not fit the model, or has nothing to carry over.
    """
    check_fit(model, task)
    if carry and not task.continues:
        raise FitError(f"the task {task.name!r} has independent examples: no state to carry")
    task.prepare_data()
    task.setup("test")
    metrics, state, tokens, seconds = task.metrics(), None, 0, 0.0
    for batch in task.eval_batches(split):
        started = time.perf_counter()
        state = _score(model, batch, metrics, state if carry else None)
        seconds += time.perf_counter() - started
        tokens += batch.inputs.numel()
    return Evaluation(
        seq_len=task.seq_len,
        carry=carry,
        metrics=metrics.compute(),
        state_bytes=budget(model, task.seq_len).state_bytes,
        tokens_per_second=tokens / seconds,
    )


@torch.inference_mode()
def _score(model: LanguageModel, batch: Batch, metrics: Any, state: State) -> State:
    """Counts one batch and returns the state after it."""
    device = next(model.parameters()).device
    logits, state, _ = model(batch.inputs.to(device), state)
    metrics.update(logits, Batch(batch.inputs, batch.targets.to(device), batch.slices))
    return detach_state(state)
