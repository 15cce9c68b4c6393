"""Starting a run from the weights of another, such as a base model that gets a memory bank."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mneme.harness.config.check import ConfigError
from mneme.harness.run.checkpoints import (
    check_router,
    checkpoint_vocabulary,
    misfits,
    model_weights,
    read_checkpoint,
)
from mneme.harness.run.run_directory import RunError, find_run
from mneme.models import LanguageModel
from mneme.tasks.base import Task


@dataclass(frozen=True)
class InitialWeights:
    """Where a model's first weights come from.

    Attributes:
        path: a checkpoint.
        step: the updates behind it.
    """

    path: Path
    step: int


def init_from(where: str, model: LanguageModel, task: Task) -> InitialWeights:
    """Gives a model the weights of another run.

    All of them must find their place, by name and shape, and all of the model's own must be among
    them; only those of parts that routes lead to, such as a bank, may be new, as these change no
    output then. So a model with a bank may start from one without.

    Args:
        where: a run directory, for its best checkpoint, or a checkpoint.
        model: which is changed.
        task: which it will be trained on; the other run must know the same vocabulary.

    Raises:
        ConfigError: there is no such run, or it does not fit. The model is as it was.
    """
    try:
        run, file = find_run(where)
        path = file or run.best
        checkpoint = read_checkpoint(path)
        check_router(checkpoint, task, model)
        weights = model_weights(checkpoint)
    except RunError as error:
        raise ConfigError([f"init_from: {error}"]) from error
    problems = [*_other_words(checkpoint, task), *misfits(weights, model, may_be_new=model.routed)]
    if problems:
        lines = "".join(f"\n    {problem}" for problem in problems)
        raise ConfigError([f"init_from: {path} does not fit this model:{lines}"])
    model.load_state_dict(weights, strict=False)
    return InitialWeights(path, int(checkpoint["global_step"]))


def freeze_all_but(model: LanguageModel, name: str) -> None:
    """Leaves only one part of a model to be trained, by its dotted name.

    All else has no gradient and is in evaluation mode, as norms and keys may follow what they read
    in training: it stays the same to the bit.
    """
    part = model.get_submodule(name)
    model.requires_grad_(False)
    part.requires_grad_(True)
    for child in model.children():
        child.eval()
    part.train()


def _other_words(checkpoint: dict[str, Any], task: Task) -> Iterator[str]:
    theirs = checkpoint_vocabulary(checkpoint)
    if theirs != task.vocabulary:
        yield (
            f"it was trained on the vocabulary {theirs[:12]!r}, and the task {task.name!r} has "
            f"{task.vocabulary[:12]!r}: token ids would mean something else"
        )
