"""What a run's options and task ask of its model."""

import os
from collections.abc import Iterator

import torch

from mneme.harness.config.build import build
from mneme.harness.config.check import Config, ConfigError
from mneme.harness.config.schema import Options
from mneme.layers import RoutedPart
from mneme.models import LanguageModel
from mneme.tasks.base import Task


def check_size(config: Config, task: Task) -> None:
    """Refuses what no memory of this machine holds, before any of it is allocated.

    A model counts with its weights alone, and a batch with one vector for each token: what passes
    may still be too much.

    Raises:
        ConfigError: naming what is too large.
    """
    room, width = _memory(), config["model"]["d_model"]
    problems = []
    if torch.get_default_device().type != "meta" and (needed := _weight_bytes(config, task)) > room:
        problems.append(f"model: its weights take {_gib(needed)}, and there are {_gib(room)}")
    if (needed := 4 * task.batch_size * task.seq_len * width) > room:
        problems.append(
            f"task: a batch of {task.batch_size:,} x {task.seq_len:,} tokens of width {width:,} "
            f"takes {_gib(needed)}, and there are {_gib(room)}"
        )
    if problems:
        raise ConfigError(problems)


def _weight_bytes(config: Config, task: Task) -> int:
    """Of a model, from one of at most two rounds of its pattern, as more repeat the second."""
    options = config["model"]
    round_, layers = max(1, len(options["pattern"])), options["n_layers"]

    def held(n_layers: int) -> int:
        with torch.device("meta"):
            model = build({**options, "n_layers": n_layers}, vocab_size=task.vocab_size)
        return sum(p.nbytes for p in model.parameters())

    if layers <= 2 * round_:
        return held(layers)
    once, twice = held(round_), held(2 * round_)
    return once + (twice - once) * (layers - round_) // round_


def _memory() -> int:
    """Bytes of the device that models are trained on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def check_model(model: LanguageModel, task: Task, options: Options) -> None:
    """Checks that a model has what the options and the task's routes are about.

    Raises:
        ConfigError: with every problem found.
    """
    problems = [*_train_only(model, options.train_only), *_routes(model, task)]
    if problems:
        raise ConfigError(problems)


def _train_only(model: LanguageModel, name: str | None) -> Iterator[str]:
    """A part of the model that is not there, or has nothing to train."""
    if name is None:
        return
    parts = {
        part for part, module in model.named_modules() if any(True for _ in module.parameters())
    }
    if name not in parts - {""}:
        own = sorted(part for part in parts if part and "." not in part)
        yield f"train_only: the model has no part {name!r} to train (parts: {', '.join(own)})"


def _routes(model: LanguageModel, task: Task) -> Iterator[str]:
    """Routes that do not end at the leaves of what they lead to."""
    for name, part in other_leaves(model, task):
        yield (
            f"task: routes of {task.name!r} lead to {task.leaves} leaves, and the model's {name} "
            f"has {part.tree}; set task.routing.branching and task.routing.depth, or those of the "
            f"{name}"
        )


def other_leaves(model: LanguageModel, task: Task) -> Iterator[tuple[str, RoutedPart]]:
    """The parts of a model, by name, that routes of a task do not fit."""
    for name, part in model.routed.items():
        if task.leaves not in (None, part.leaves):
            yield name, part
