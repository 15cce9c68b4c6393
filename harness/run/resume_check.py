"""What a checkpoint must hold for training to go on from it as if it had never stopped.

Lightning and torch take what they find: without states an optimizer starts afresh, without progress
the data do, and neither says so.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from mneme.harness.config.check import Config
from mneme.harness.run.checkpoints import (
    Checkpoints,
    checkpoint_vocabulary,
    is_count,
    kind,
    misfits,
    model_weights,
)
from mneme.harness.run.training import optimizer_factory
from mneme.models import LanguageModel
from mneme.models.lightning_module import OptimizerFactory
from mneme.models.optim import make_optimizer, with_tables
from mneme.tasks.base import Task

_LISTED = 8  # problems in one message
_SIZES = (2, 3, 5, 7, 11)  # of a trial parameter's axes: no two alike, so that axes can be told


def resume_problems(
    checkpoint: dict[str, Any], config: Config, model: LanguageModel, task: Task
) -> list[str]:
    """What keeps training from going on from a checkpoint; one line each, none if nothing does.

    Args:
        checkpoint: as read, of the run's own config.
        config: of the run.
        model: built from it; its parameters are not changed.
        task: built from it and prepared.
    """
    step, pieces = checkpoint["global_step"], config["trainer"].get("accumulate_grad_batches", 1)
    found = [
        *_vocabulary(checkpoint, task),
        *misfits(model_weights(checkpoint), model),
        *_optimizer(checkpoint.get("optimizer_states"), model, config, step),
        *_schedule(checkpoint.get("lr_schedulers"), step),
        *_loops(checkpoint.get("loops"), step, pieces),
        *_callbacks(checkpoint.get("callbacks")),
    ]
    if not is_count(checkpoint.get("tokens")):
        found.append(f"tokens: expected how many were read, got {checkpoint.get('tokens')!r}")
    if len(found) > _LISTED:
        return [*found[:_LISTED], f"and {len(found) - _LISTED} more"]
    return found


def _vocabulary(checkpoint: dict[str, Any], task: Task) -> Iterator[str]:
    theirs = checkpoint_vocabulary(checkpoint)
    if theirs != task.vocabulary:
        yield (
            f"vocabulary: it was trained on {theirs[:12]!r}, and the task {task.name!r} now has "
            f"{task.vocabulary[:12]!r}; are its data still the same?"
        )


def _optimizer(states: Any, model: LanguageModel, config: Config, step: int) -> Iterator[str]:
    """Compares with what this optimizer keeps after a step, whichever it is."""
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        yield "optimizer_states: expected those of one optimizer"
        return
    make = optimizer_factory(config)
    groups = make_optimizer(model, make).param_groups
    theirs = states[0].get("param_groups")
    state = states[0].get("state")
    if not isinstance(theirs, list) or not isinstance(state, dict):
        yield "optimizer_states: expected a state and parameter groups"
        return
    sizes = [len(g["params"]) if _is_group(g) else -1 for g in theirs]
    if sizes != [len(group["params"]) for group in groups]:
        yield f"optimizer_states: groups of {sizes} parameters are not those of this model"
        return
    numbers = [number for group in theirs for number in group["params"]]
    if strangers := state.keys() - set(numbers):
        yield f"optimizer_states: {len(strangers)} states belong to no parameter"
    parameters = [(p, group) for group in groups for p in group["params"]]
    kept = {(id(g), p.ndim): _kept(g, p.ndim, make) for p, g in parameters}
    if step and not state and any(kept.values()):
        yield "optimizer_states: the state of every parameter is missing"
    for number, (parameter, group) in zip(numbers, parameters, strict=True):
        if number in state:
            expected = kept[id(group), parameter.ndim]
            yield from _state(state[number], expected, parameter, step, number)


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list)


def _kept(group: Mapping[str, Any], axes: int, make: OptimizerFactory) -> dict[str, Any]:
    """What an optimizer keeps after one step of a small parameter with so many axes."""
    parameter = nn.Parameter(torch.zeros(_SIZES[:axes]))
    parameter.grad = torch.zeros_like(parameter)
    trial = with_tables(make([{**group, "params": [parameter]}]))
    trial.step()
    return dict(trial.state[parameter])


def _state(
    found: Any, expected: Mapping[str, Any], parameter: Tensor, step: int, number: Any
) -> Iterator[str]:
    where = f"optimizer_states: parameter {number}"
    if not isinstance(found, dict) or found.keys() != expected.keys():
        yield f"{where} has not the entries {', '.join(expected)}"
        return
    for name, pattern in expected.items():
        value = found[name]
        if not isinstance(pattern, Tensor):
            if type(value) is not type(pattern):
                yield f"{where}: {name} is {value!r}"
            continue
        shape = [_as_in(parameter, size) for size in pattern.shape]
        if not isinstance(value, Tensor):
            yield f"{where}: {name} is no tensor"
        elif list(value.shape) != shape or kind(value) != kind(pattern):
            yield f"{where}: {name} is {list(value.shape)}, {kind(value)}; it has to be {shape}"
    if "step" in expected and not _within(found["step"], step):
        yield f"{where} was updated {found['step']!r} times in {step} steps"


def _as_in(parameter: Tensor, size: int) -> int:
    """The size of a parameter's axis that has `size` in a trial; other sizes do not change."""
    return parameter.shape[_SIZES.index(size)] if size in _SIZES[: parameter.ndim] else size


def _within(updates: Any, step: int) -> bool:
    value = float(updates) if isinstance(updates, int | Tensor) else math.nan
    return 1 <= value <= step


def _schedule(states: Any, step: int) -> Iterator[str]:
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        yield "lr_schedulers: expected the state of one schedule"
    elif states[0].get("last_epoch") != step:
        yield f"lr_schedulers: it stands at {states[0].get('last_epoch')!r}, not at step {step}"


def _loops(found: Any, step: int, pieces: int) -> Iterator[str]:
    """Progress as Lightning counts it; the trainer's step and the data's place come from it."""
    fresh = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    expected = fresh.fit_loop.state_dict()
    fit: Any = found.get("fit_loop") if isinstance(found, dict) else None
    different = _difference(fit, expected, "fit_loop")
    if different is not None:
        yield f"loops: {different} is missing or damaged"
        return
    updates = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    batches = fit["epoch_loop.batch_progress"]["total"]["processed"]
    if updates["total"]["completed"] != step or batches != step * pieces:
        yield (
            f"loops: they count {updates['total']['completed']} updates and {batches} batches, "
            f"not {step} and {step * pieces}"
        )


def _difference(found: Any, expected: Any, where: str) -> str | None:
    """Where the structure differs first; counts may have any value from 0."""
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return where
        inner = (_difference(found.get(k), v, f"{where}.{k}") for k, v in expected.items())
        return next(filter(None, inner), None)
    if isinstance(expected, bool):
        return None if isinstance(found, bool) else where
    return None if is_count(found) else where


def _callbacks(found: Any) -> Iterator[str]:
    own = found.get(Checkpoints.__qualname__) if isinstance(found, dict) else None
    best = own.get("best", math.nan) if isinstance(own, dict) else math.nan
    if best is not None and not (isinstance(best, float) and math.isfinite(best)):
        yield "callbacks: the best value so far is missing"
