"""What a run's options and task ask of its model."""

import os
from collections.abc import Iterator

import torch

from mneme.harness.config.build import build
from mneme.harness.config.check import Config, ConfigError
from mneme.harness.config.schema import Options
from mneme.layers import reads_tables
from mneme.models import LanguageModel
from mneme.tasks.base import Task

NO_TABLE = "usage: no layer of this model reads a table; one with ffn=pkm does"


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
