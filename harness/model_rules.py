"""What a run's options and task ask of its model."""

from collections.abc import Iterator

from harness.check import ConfigError
from harness.schema import Options
from layers import reads_tables
from models import LanguageModel
from tasks.base import Task

NO_TABLE = "usage: no layer of this model reads a table; one with ffn=pkm does"


def check_model(model: LanguageModel, task: Task, chosen: Options) -> None:
    """Checks that a model has what it is asked for.

    Raises:
        ConfigError: with every problem found.
    """
    problems = [*_missing(model, chosen), *_other_leaves(model, task)]
    if problems:
        raise ConfigError(problems)


def _missing(model: LanguageModel, chosen: Options) -> Iterator[str]:
    """Options about what the model does not have."""
    if chosen.usage and not reads_tables(model):
        yield NO_TABLE
    for option in ("train_only", "save_bank_every"):
        if getattr(chosen, option) is not None and model.bank is None:
            yield f"{option}: no layer of this model reads a memory bank; one with ffn=bank does"


def _other_leaves(model: LanguageModel, task: Task) -> Iterator[str]:
    """Routes that are not the leaves of the model's bank."""
    if model.bank is None or task.leaves in (None, model.bank.shape.leaves):
        return
    shape = model.bank.shape
    yield (
        f"task: routes of {task.name!r} lead to {task.leaves} leaves, and the model's bank has "
        f"{shape.leaves}, {shape.branching} children at each of {shape.depth} levels; set "
        "task.routing.branching and task.routing.depth, or ffn.bank.branching and, a number for "
        "each level, ffn.bank.hidden"
    )
