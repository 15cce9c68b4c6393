"""Which classes a config may name: this project's, torch's parts, Lightning's trainer.

A config may come with a run or a checkpoint from elsewhere, so nothing that it can name writes to a
path of its own or calls a server: of loggers only the dashboards of this project, which write into
the run directory, and no callbacks and profilers of Lightning's.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

ALLOWED = (
    "mneme.layers",
    "mneme.ops.test_time",
    "mneme.models",
    "mneme.tasks",
    "mneme.harness.loggers.TensorBoard",
    "mneme.harness.loggers.Wandb",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer",
    "lightning.pytorch.strategies.DDPStrategy",
    "lightning.pytorch.strategies.ddp.DDPStrategy",
)
_BEFORE_THE_NAME = ("layers.", "ops.", "models.", "tasks.", "harness.")  # how old runs say it


class TargetError(ValueError):
    """A config names something that it may not name, or that does not exist."""


def resolve_target(name: object) -> type:
    """The class that a `_target_` names.

    The class must be named and also be defined under an allowed package, so that no config and no
    checkpoint can reach anything else through a module's imports. Runs of before this project had
    a name of its own say `layers.DeltaNet` for `mneme.layers.DeltaNet`, and are understood.

    Raises:
        TargetError: the name is outside the allow-list, or is not a class there.
    """
    if isinstance(name, str) and name.startswith(_BEFORE_THE_NAME):
        name = f"mneme.{name}"
    if not isinstance(name, str) or not _allowed(name):
        raise TargetError(
            f"{name!r} may not be built from a config; allowed are classes of {', '.join(ALLOWED)}"
        )
    found = _find(name)
    if not inspect.isclass(found):
        raise TargetError(f"{name} is not a class{suggest(name, _siblings(name))}")
    if not _allowed(f"{found.__module__}.{found.__qualname__}"):
        raise TargetError(
            f"{name} is {found.__module__}.{found.__qualname__}, which is not allowed"
        )
    return found


def _allowed(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED)


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except (ModuleNotFoundError, ValueError):  # of a name without a module
        return None


def _siblings(name: str) -> list[str]:
    module = name.rpartition(".")[0]
    try:
        members = vars(importlib.import_module(module))
    except (ModuleNotFoundError, ValueError):
        return []
    return [f"{module}.{key}" for key, value in members.items() if inspect.isclass(value)]


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or nothing."""
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.5)
    return f"; did you mean {by_lower_case[near[0]]!r}?" if near else ""
