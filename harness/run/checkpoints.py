"""Checkpoints that are whole or absent, and that say where they came from."""

import io
import json
import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer

from mneme.harness.config.check import Config
from mneme.harness.config.renames import renamed
from mneme.harness.run import signals
from mneme.harness.run.callbacks import RunCallback
from mneme.harness.run.run_directory import RunDirectory, RunError, rank, write_atomically
from mneme.harness.run.signals import Interrupted
from mneme.models import LanguageModel
from mneme.models.diagnosis import NonFiniteError
from mneme.storage.files import open_regular
from mneme.tasks.base import Task

FORMAT = 1
_KEY = "mneme"
_LISTED = 8  # weights that do not fit, in one message


class AtomicCheckpointIO(CheckpointIO):
    """Writes to a temporary file, syncs and renames; reads tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Replaces the file at `path` whole."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), buffer.getvalue())

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint of this project."""
        return read_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: _PATH) -> None:
        """Deletes the file."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(
    path: Path, map_location: Any = "cpu", *, mapped: bool = False
) -> dict[str, Any]:
    """Reads a checkpoint without executing anything that it holds.

    Args:
        path: of the file.
        map_location: the device of its tensors.
        mapped: leave tensors in the file until they are read; the file must then stay as it is.

    Raises:
        RunError: the file is missing, cut short, or not a checkpoint of this project.
    """
    try:
        with open_regular(path) as file:
            checkpoint = torch.load(
                path if mapped else file,
                map_location=map_location,
                weights_only=True,
                mmap=mapped,
            )
    except FileNotFoundError as error:
        others = sorted(p.name for p in path.parent.glob("*.ckpt"))
        hint = f"; there is {', '.join(others)}" if others else ""
        raise RunError(f"there is no checkpoint at {path}{hint}") from error
    except Exception as error:  # torch reports a broken file in as many ways as it can break
        reason = str(error).strip().split("\n")[0]
        raise RunError(f"{path} is truncated or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(_KEY), dict):
        raise RunError(f"{path} was not written by this project; nothing was loaded or overwritten")
    found = checkpoint[_KEY].get("format")
    if found != FORMAT:
        raise RunError(f"{path} has checkpoint format {found}; this version reads {FORMAT}")
    problems = list(_form(checkpoint))
    if problems:
        raise RunError(f"{path} is not a whole checkpoint: {'; '.join(problems)}")
    return dict(checkpoint)


def _form(checkpoint: dict[str, Any]) -> Iterator[str]:
    """What every reader of a checkpoint relies on and this one lacks."""
    header, step = checkpoint[_KEY], checkpoint.get("global_step")
    if not _is_json_object(header.get("config")):
        yield "it carries no config"
    if not isinstance(header.get("vocabulary"), str):
        yield "it does not say what its vocabulary is"
    if not isinstance(header.get("router"), str | None):
        yield "its router has no hash"
    if not is_count(step):
        yield f"its step is {step!r}"


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 0; `True` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_json_object(text: object) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def checkpoint_vocabulary(checkpoint: dict[str, Any]) -> str:
    """What the token ids meant to the model, as `Task.vocabulary` says it."""
    return str(checkpoint[_KEY]["vocabulary"])


def check_router(checkpoint: dict[str, Any], task: Task, model: LanguageModel) -> None:
    """Refuses routes by which what they lead to means something else.

    Args:
        checkpoint: as read.
        task: whose routes will be followed.
        model: of the checkpoint, or one that will take its weights.

    Raises:
        RunError: the checkpoint has a part that was trained by another router than the task's.
    """
    trained_by = checkpoint[_KEY].get("router")
    weights = model_weights(checkpoint)
    trained = [p for p in model.routed if any(name.startswith(f"{p}.") for name in weights)]
    if trained and task.leaves is not None and task.router != trained_by:
        raise RunError(
            f"routes of the task {task.name!r} are of {_router(task.router)}, and the {trained[0]} "
            f"was trained by {_router(trained_by)}: they would mean something else to it; a run "
            "keeps its router, which task.routing.folder=RUN/router takes"
        )


def _router(found: str | None) -> str:
    return "no router" if found is None else f"router {found[:12]}"


def checkpoint_config(checkpoint: dict[str, Any]) -> Config:
    """The resolved config that a checkpoint carries; check it before building from it."""
    return renamed(json.loads(checkpoint[_KEY]["config"]))


def check_same_run(checkpoint: dict[str, Any], config: Config, path: Path) -> None:
    """Refuses to continue a run from a checkpoint that another config wrote.

    Raises:
        RunError: naming the groups that differ.
    """
    if differ := differing_options(checkpoint_config(checkpoint), config):
        raise RunError(
            f"{path} was written by another run than config.yaml describes: they differ in "
            f"{', '.join(differ)}; nothing was loaded or overwritten"
        )


def differing_options(config: Config, other: Config) -> list[str]:
    """The groups and options in which two configs differ, but for where a run is and is logged."""
    keys = (config.keys() | other.keys()) - {"run_dir", "logger"}
    return sorted(key for key in keys if config.get(key) != other.get(key))


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint, by the names that the model gives them.

    Raises:
        RunError: the checkpoint has no weights, or something else in their place.
    """
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise RunError("the checkpoint has no weights (its state_dict holds no tensors)")
    named = {str(name): weight for name, weight in weights.items()}
    return {k.removeprefix("model."): v for k, v in named.items() if k.startswith("model.")}


def load_weights(model: torch.nn.Module, checkpoint: dict[str, Any]) -> None:
    """Copies the model's weights out of a checkpoint.

    Raises:
        RunError: they are not those of this model.
    """
    weights = model_weights(checkpoint)
    if problems := list(misfits(weights, model)):
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise RunError(f"the checkpoint's weights are not those of its config's model:{lines}")
    model.load_state_dict(weights)


def misfits(
    weights: Mapping[str, torch.Tensor], model: torch.nn.Module, may_be_new: Iterable[str] = ()
) -> Iterator[str]:
    """A line for each weight that a model cannot take as it is, up to a number of them.

    A complex weight would lose its imaginary part, and a fraction be cut off, without a word.

    Args:
        weights: by name.
        model: which would take them.
        may_be_new: parts of the model whose weights need not be there.
    """
    new = tuple(f"{part}." for part in may_be_new)
    own = model.state_dict()
    lines = []
    for name in weights.keys() | own.keys():
        here, there = own.get(name), weights.get(name)
        if here is None and there is not None:
            lines.append(f"{name} {_shape(there)} has no place in this model")
        elif there is None and here is not None:
            if not name.startswith(new):
                lines.append(f"{name} {_shape(here)} of this model is not there")
        elif here is not None and there is not None and here.shape != there.shape:
            lines.append(f"{name} is {_shape(there)} there and {_shape(here)} in this model")
        elif here is not None and there is not None and kind(here) != kind(there):
            lines.append(f"{name} has {kind(there)} there and {kind(here)} in this model")
    yield from sorted(lines)[:_LISTED]
    if len(lines) > _LISTED:
        yield f"and {len(lines) - _LISTED} more weights that do not fit"


def kind(tensor: torch.Tensor) -> str:
    """What sort of elements a tensor holds: those of one sort convert without a loss of kind."""
    if tensor.is_complex():
        return "complex numbers"
    return "real numbers" if tensor.is_floating_point() else f"numbers of type {tensor.dtype}"


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


class Checkpoints(RunCallback):
    """Keeps `last.ckpt` and `best.ckpt`, each replaced whole.

    Args:
        run: where they go.
        config: the resolved config, kept in each checkpoint.
        task: its `monitor` is the validation metric that `best.ckpt` has the best value of.
        every: updates between two writes of `last.ckpt`; it is also written at the end.
        resume_step: updates behind the `last.ckpt` that is there; 0 for a new run.
    """

    def __init__(
        self, run: RunDirectory, config: Config, *, task: Task, every: int, resume_step: int = 0
    ) -> None:
        self.run, self.every, self.monitor = run, every, task.monitor
        self.sign = {"min": -1.0, "max": 1.0}[task.monitor_mode]
        self.header = {
            "format": FORMAT,
            "config": json.dumps(config),
            "vocabulary": task.vocabulary,
            "router": task.router,
        }
        self.best: float | None = None
        self.saved_step = resume_step or -1

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best value so far."""
        self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Marks the checkpoint as this project's and adds the config."""
        checkpoint[_KEY] = self.header

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Says what there is to go back to when the run stops on a number that is none."""
        if isinstance(exception, NonFiniteError):
            good = f"step {self.saved_step}: {self.run.last}" if self.run.last.exists() else "none"
            exception.args = (f"{exception}; last good checkpoint: {good}",)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the best before the newest, which carries the best value."""
        value = trainer.callback_metrics.get(f"val/{self.monitor}")
        if value is not None and not trainer.sanity_checking:
            better = self.best is None or self.sign * (float(value) - self.best) > 0
            if better and value.isfinite():
                self.best = float(value)
                trainer.save_checkpoint(self.run.best)
        super().on_validation_end(trainer, pl_module)

    def end_of_step(self, trainer: Trainer) -> None:
        """Saves when it is time."""
        if trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final weights."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes `last.ckpt`, once per step."""
        if trainer.global_step != self.saved_step:
            trainer.save_checkpoint(self.run.last)
            self.saved_step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has what it was resumed from; a new one can always go back to its start."""
        if trainer.global_step == 0:
            self.save(trainer)
        self.saved_step = trainer.global_step


class StopOnSignal(RunCallback):
    """On SIGTERM or Ctrl-C finishes the step, with its validation, saves and stops.

    Before the first step and after the last there is nothing to finish, and a signal stops the run
    where it is.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remembers whose processes are to be stopped."""
        self.trainer = trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there are steps to finish."""
        signals.defer(lambda: "validation" if trainer.validating else "step")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All steps are saved."""
        signals.undefer(obey=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The run ends anyway."""
        signals.undefer(obey=False)

    def end_of_step(self, trainer: Trainer) -> None:
        """Stops here if any of the processes was asked to."""
        number = signals.received()
        if trainer.strategy.reduce_boolean_decision(number is not None, all=False):
            self.checkpoints.save(trainer)
            signals.note(signal.SIGTERM)
            raise Interrupted(number or signal.SIGTERM)

    def record(self, number: int) -> Interrupted:
        """Writes down that the run was stopped, and stops the processes that train with this one.

        Returns:
            What to end the program with: it says what is saved and how to go on.
        """
        signals.note(number)
        run, step = self.checkpoints.run, max(self.checkpoints.saved_step, 0)
        stop = Interrupted(number, step, run.path)
        if rank() != 0:
            stop.exit_status = 0  # with another, Lightning would kill the first process
            return stop
        run.write_summary(status="interrupted", error=str(stop))
        launcher = None if self.trainer is None else self.trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGTERM)
        return stop
