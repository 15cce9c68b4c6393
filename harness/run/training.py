"""One training run, from a checked config to a summary.

What is called in one step, from top to bottom (`SequenceModule` is in `mneme.models`):

    on_train_batch_start         SequenceModule reseeds
    training_step, backward      SequenceModule
    on_before_optimizer_step     SequenceModule averages rows over processes
    clipping                     SequenceModule clips, and writes the row of the update
    optimizer, schedule
    on_train_batch_end           end_of_step below, unless half accumulated or a validation follows
    validation, where one follows:
      on_validation_start        Stopwatch pauses
      each batch                 callbacks of the config (LogUsage) around validation_step
      on_validation_epoch_end    callbacks of the config, then SequenceModule writes the row
      on_validation_end          Stopwatch goes on; Checkpoints keeps best.ckpt; then end_of_step
    end_of_step                  Checkpoints (last.ckpt), callbacks of the config in their order
                                 (SaveBank), StopOnSignal last, as it ends the run
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger

from mneme.harness.config.build import build
from mneme.harness.config.check import Config, blaming
from mneme.harness.config.model_rules import check_model, check_size
from mneme.harness.config.schema import run_options
from mneme.harness.loggers import Dashboard
from mneme.harness.run.callbacks import RunCallback
from mneme.harness.run.checkpoints import (
    AtomicCheckpointIO,
    Checkpoints,
    StopOnSignal,
)
from mneme.harness.run.console import RunProgressBar, label, quiet_libraries, say
from mneme.harness.run.data import TaskData
from mneme.harness.run.init_from import InitialWeights, freeze_all_but, init_from
from mneme.harness.run.metrics_file import MetricsFile, last_validation
from mneme.harness.run.precision import run_precision
from mneme.harness.run.provenance import config_hash, provenance
from mneme.harness.run.run_directory import RunDirectory
from mneme.harness.run.signals import Interrupted, interruptible
from mneme.harness.run.stopwatch import Stopwatch
from mneme.models import Budget, LanguageModel, SequenceModule, budget
from mneme.models.lightning_module import OptimizerFactory
from mneme.models.optim import make_optimizer
from mneme.tasks.base import Task


@dataclass(frozen=True)
class Prepared:
    """What a config describes, built but not trained.

    Attributes:
        config: the checked config.
        task: with its data prepared.
        model: at its initialization.
        budget: what the model costs at the task's length.
        initial: whose weights the model starts with, if it does.
    """

    config: Config
    task: Task
    model: LanguageModel
    budget: Budget
    initial: InitialWeights | None = None


def prepare(config: Config, *, resumed: bool = False) -> Prepared:
    """Builds the task and the model of a checked config; writes nothing but the task's cache.

    Args:
        config: the checked config.
        resumed: weights will come from the run's own checkpoint, so that no other run is read.

    Raises:
        ConfigError: values that do not go together, such as heads that do not divide the width,
            a callback for tables that the model lacks, or `init_from` a model that does not fit.
    """
    options = run_options(config)
    with blaming("task"):
        task: Task = build(config["task"])
        task.prepare_data()
    with blaming("model"):
        model = build_model(config, task)
        costs = budget(model, task.seq_len)
    check_model(model, task, options)
    initial = None
    if options.init_from is not None and not resumed:
        initial = init_from(options.init_from, model, task)
    if options.train_only is not None:
        freeze_all_but(model, options.train_only)
    for name, callback in _callbacks(config).items():
        with blaming(f"callbacks.{name}"):
            callback.check(model)
    with blaming("optimizer"):
        make_optimizer(model, optimizer_factory(config))
    with blaming("schedule"):
        build(config["schedule"])
    with blaming("logger"):
        build(config.get("logger"))
    with blaming("trainer", TypeError, ImportError):
        trainer = build(config["trainer"], logger=False, enable_checkpointing=False)
    with blaming("task"):
        task.trainer = trainer
        task.setup("fit")  # which compares what it counts with what the trainer will draw
    task.trainer = None
    return Prepared(config, task, model, costs, initial)


def build_model(config: Config, task: Task) -> LanguageModel:
    """The model of a config, with the vocabulary of its task, the run's seed and its precision."""
    check_size(config, task)
    torch.manual_seed(run_options(config).seed)
    model: LanguageModel = build(config["model"], vocab_size=task.vocab_size)
    run_precision(config).convert_module(model)
    return model


def train(
    prepared: Prepared,
    run: RunDirectory,
    *,
    resume_step: int = 0,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Trains in a run directory: from the start, or from the checkpoint after `resume_step` steps.

    Args:
        prepared: what to train.
        run: where to write.
        resume_step: updates behind the last checkpoint, which training goes on from; 0 to start.
        callbacks: more callbacks for Lightning's trainer.

    Returns:
        The summary, as in summary.json.

    Raises:
        Interrupted: the run was asked to stop, and has saved itself.
        NonFiniteError: a loss or a gradient is no longer a number.
    """
    checkpoints = Checkpoints(
        run,
        prepared.config,
        task=prepared.task,
        every=run_options(prepared.config).checkpoint_every,
        resume_step=resume_step,
    )
    stop = StopOnSignal(checkpoints)
    try:
        with interruptible(stop.record):
            return _train(prepared, run, resume_step, [*callbacks, checkpoints, stop])
    except Interrupted as interruption:
        raise stop.record(interruption.number) from None
    except BaseException as error:
        run.write_summary(status="failed", error=str(error))
        raise


def _train(
    prepared: Prepared, run: RunDirectory, resume_step: int, callbacks: Sequence[Callback]
) -> dict[str, Any]:
    config, task, model = prepared.config, prepared.task, prepared.model
    quiet_libraries()
    seed_everything(run_options(config).seed, verbose=False)
    _record_start(prepared, run, resume_step)
    module = _module(config, model, task)
    if run_options(config).compile:
        model.compile()
    with _loggers(config, run, resume_step) as loggers:
        trainer = _trainer(prepared, run, loggers, callbacks)
        data = TaskData(task)
        trainer.fit(module, datamodule=data, ckpt_path=run.last if resume_step else None)
        unvalidated = not last_validation(run.metrics, trainer.global_step)
        if trainer.strategy.broadcast(unvalidated):  # all processes must agree
            trainer.validate(module, datamodule=data, verbose=False)
    done = trainer.global_step == trainer.max_steps
    status = "finished" if done else "interrupted"
    return run.write_summary(status=status, error=None, **_results(run, trainer, module, task))


def _record_start(prepared: Prepared, run: RunDirectory, resume_step: int) -> None:
    """Writes what is known before training; a resumed run keeps what its start recorded."""
    if resume_step:
        resumed = [*run.read_summary().get("resumed", []), {"step": resume_step, **provenance()}]
        run.write_summary(status="running", resumed=resumed)
        return
    prepared.task.save_tokenizer(run.path)
    run.write_summary(
        status="running",
        **_start(prepared),
        seed=run_options(prepared.config).seed,
        config_hash=config_hash(prepared.config),
        budget=prepared.budget.as_dict(),
        monitor=prepared.task.monitor,
        **provenance(),
    )


def _start(prepared: Prepared) -> dict[str, Any]:
    """For the summary: whose weights were there before, and which were trained; often nothing."""
    initial, only = prepared.initial, run_options(prepared.config).train_only
    facts: dict[str, Any] = {} if only is None else {"train_only": only}
    if initial is not None:
        facts["init_from"] = {"checkpoint": str(initial.path), "step": initial.step}
    return facts


@contextmanager
def _loggers(config: Config, run: RunDirectory, resume_step: int) -> Iterator[list[Logger]]:
    """metrics.csv and, where one is chosen, a dashboard that is closed whatever happens."""
    loggers: list[Logger] = [MetricsFile(run.metrics, resume_step)]
    dashboard: Dashboard | None = build(config.get("logger"))
    if dashboard is None:
        yield loggers
        return
    say(dashboard.hint(run))
    try:
        yield [*loggers, dashboard.make(run, config)]
    finally:
        dashboard.close()


def _module(config: Config, model: LanguageModel, task: Task) -> SequenceModule:
    return SequenceModule(
        model,
        optimizer=optimizer_factory(config),
        schedule=build(config["schedule"]),
        metrics=task.metrics,
        log_every=config["trainer"].get("log_every_n_steps", 50),
        seed=run_options(config).seed,
    )


def _callbacks(config: Config) -> dict[str, RunCallback]:
    """Those that the config chooses, by name; null leaves one out."""
    callbacks = {}
    for name, node in (config.get("callbacks") or {}).items():
        if node is not None:
            with blaming(f"callbacks.{name}"):
                callbacks[name] = build(node)
    return callbacks


def optimizer_factory(config: Config) -> OptimizerFactory:
    """Makes the optimizer of a checked config from parameter groups."""
    return lambda groups: build(config["optimizer"], params=groups)


def _trainer(
    prepared: Prepared,
    run: RunDirectory,
    loggers: list[Logger],
    own_callbacks: Sequence[Callback],
) -> Trainer:
    """Lightning's trainer with the run's callbacks, in the order that this module draws."""
    config = prepared.config
    *before, stop = own_callbacks
    callbacks = [Stopwatch(), *before, *_callbacks(config).values(), stop]
    if config["trainer"].get("enable_progress_bar", True):
        callbacks.append(RunProgressBar(label(run.name)))
    with blaming("trainer"):
        trainer: Trainer = build(
            config["trainer"],
            callbacks=callbacks,
            default_root_dir=run.path.absolute(),
            enable_checkpointing=False,
            logger=loggers,
            plugins=[AtomicCheckpointIO()],
        )
    # Lightning's handler of SIGTERM would stop at other places and without a checkpoint.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _results(
    run: RunDirectory, trainer: Trainer, module: SequenceModule, task: Task
) -> dict[str, Any]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    watch = next(c for c in callbacks if isinstance(c, Stopwatch))
    results = {
        "steps": trainer.global_step,
        "tokens": module.tokens,
        "metrics": last_validation(run.metrics, trainer.global_step),
        "task": task.facts(),
    }
    if watch.seconds:  # a run that was resumed after its last step has none
        trained = module.tokens - watch.first_token
        results["tokens_per_second"] = round(trained / watch.seconds)
    return results
