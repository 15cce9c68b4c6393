"""What `eval.py` does with its command line."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.plugins.precision import Precision
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from mneme.harness.config.build import TARGET, build, resolve_target, signature_of
from mneme.harness.config.check import Config, ConfigError, blaming
from mneme.harness.config.compose import CONFIG_DIR, compose_group, parse_overrides, program_options
from mneme.harness.config.model_rules import check_size
from mneme.harness.config.schema import check_config
from mneme.harness.evaluate.evaluation import (
    Evaluation,
    check_fit,
    evaluate,
    lengthened,
    restore_model,
)
from mneme.harness.evaluate.telemetry import (
    CORRELATED,
    Trace,
    check_surprise,
    in_words,
    record_trace,
    write_telemetry,
)
from mneme.harness.evaluate.usage_page import print_usage, write_usage
from mneme.harness.run.callbacks import NO_TABLE
from mneme.harness.run.checkpoints import (
    check_router,
    checkpoint_config,
    checkpoint_vocabulary,
    read_checkpoint,
)
from mneme.harness.run.console import EvalProgress, baseline_line
from mneme.harness.run.precision import run_precision
from mneme.harness.run.provenance import provenance
from mneme.harness.run.run_directory import (
    RunDirectory,
    RunError,
    TaskMismatchError,
    find_run,
    finite,
)
from mneme.layers import Usage, metering, reads_tables, with_shared_tables
from mneme.models import LanguageModel
from mneme.tasks.base import Task


@dataclass(frozen=True)
class EvalOptions:
    """The options of eval.py; configs/eval.yaml explains them and holds the defaults."""

    run: str
    checkpoint: Literal["best", "last"]
    split: Literal["val", "test"]
    lengths: list[int] | None
    carry: list[bool] | None
    usage: bool
    telemetry: int

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise ConfigError([f"lengths: expected multiples of 1 or more, got {self.lengths}"])
        if self.carry is not None and not self.carry:
            raise ConfigError(["carry: expected [false], [true] or [false,true], got []"])
        if self.telemetry < 0:
            raise ConfigError([f"telemetry: expected 0 tokens or more, got {self.telemetry}"])


def evaluate_command(arguments: Sequence[str]) -> list[Evaluation]:
    """Evaluates a run as the command line says, prints a table and adds rows to the run.

    Raises:
        ConfigError: a mistake in the command line.
        RunError: no usable run there.
        TaskMismatchError: the task does not fit the model, or the model has nothing to report.
    """
    own, task_overrides = _split(arguments)
    options = program_options("eval", EvalOptions, own)
    run, file = find_run(options.run)
    file = file or (run.best if options.checkpoint == "best" else run.last)
    checkpoint = read_checkpoint(file)
    config = checkpoint_config(checkpoint)
    check_config(config)
    task = _with_vocabulary_of(run, _task_config(config, task_overrides))
    given_length = "task.seq_len" in parse_overrides(task_overrides)
    tasks = _tasks(config, task, options.lengths or _default_lengths(task, given_length))
    model, precision = restore_model(config, checkpoint), run_precision(config)
    check_fit(checkpoint_vocabulary(checkpoint), model, tasks[0])
    check_router(checkpoint, tasks[0], model)
    if options.telemetry:
        _check_telemetry(run, model, precision)
    if options.usage:
        _check_usage(run, model)
    cases = [(built, carry) for built in tasks for carry in _carries(options.carry, built)]
    score = partial(evaluate, model, precision=precision, split=options.split)
    with EvalProgress() as progress:
        results = [
            score(built, carry=carry, after_batch=progress.begin(f"{built.seq_len:,} tokens"))
            for built, carry in cases
        ]
    if run.config.exists():
        _record(run, file, options, task, results)
    print_evaluations(results, f"{file} on {task[TARGET]} ({options.split})")
    print(baseline_line(tasks[0], options.split))
    title = f"{run.name}, {file.name} on {tasks[0].name} ({options.split})"
    if options.usage:
        with metering() as meter:  # in a pass of its own: recorded speeds are without a meter
            score(cases[0][0], carry=cases[0][1])
        _report_usage(with_shared_tables(model, meter.by_layer(model)), run, title)
    if options.telemetry:
        trace = record_trace(
            model, tasks[0], precision=precision, split=options.split, count=options.telemetry
        )
        _report(trace, write_telemetry(run.telemetry, trace, tasks[0], title))
    return results


def print_evaluations(results: Sequence[Evaluation], title: str) -> None:
    """A table with a column per length and way of carrying the state, a row per metric."""
    table = Table(title=title, title_justify="left")
    table.add_column("block of tokens")
    for result in results:
        table.add_column(f"{result.seq_len:,}", justify="right")
    if any(result.carry for result in results):
        table.add_row("state", *("carried" if result.carry else "fresh" for result in results))
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        table.add_row(name, *(_number(result.metrics.get(name)) for result in results))
    table.add_row("state bytes", *(f"{result.state_bytes:,}" for result in results))
    table.add_row("tokens/s", *(f"{result.tokens_per_second:,.0f}" for result in results))
    Console().print(table)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == int(value) and value > 1 else f"{value:.4f}"


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of eval.py itself, and those of the task."""
    of_task = [a for a in arguments if a.split("=")[0].split(".")[0].lstrip("+") == "task"]
    return [a for a in arguments if a not in of_task], of_task


def _task_config(config: Config, overrides: Sequence[str]) -> Config:
    """The task to evaluate on: the run's or another, with the options given."""
    if any(o.startswith("task=") for o in overrides):
        return compose_group("task", [*overrides, f"seed={config['seed']}"])
    changed = OmegaConf.create(config)
    for key, value in parse_overrides(overrides).items():
        OmegaConf.update(changed, key, value)
    plain = OmegaConf.to_container(changed)
    assert isinstance(plain, dict)
    check_config({str(key): value for key, value in plain.items()})
    task: Config = plain["task"]
    return task


def _tasks(config: Config, of: Config, lengths: Sequence[int]) -> list[Task]:
    """A task at several lengths, prepared for the model of a run's config."""
    with blaming("task"):
        tasks: list[Task] = [build(lengthened(of, multiple)) for multiple in lengths]
        for task in tasks:
            check_size(config, task)
            task.prepare_data()
    return tasks


def _with_vocabulary_of(run: RunDirectory, task: Config) -> Config:
    """The task with the tokenizer that the run kept, whatever text it is given."""
    tokenizer = task.get("tokenizer")
    if not isinstance(tokenizer, dict) or not run.tokenizer.exists():
        return task
    if "model_file" not in signature_of(resolve_target(tokenizer[TARGET])).types:
        return task
    return {**task, "tokenizer": {"model_file": str(run.tokenizer), **tokenizer}}


def _default_lengths(task: Config, given_length: bool) -> list[int]:
    return [1] if given_length or "seq_len" not in task else [1, 4, 16]


def _carries(given: list[bool] | None, task: Task) -> list[bool]:
    if given is not None:
        return given
    return [False, True] if task.continues else [False]


def _require_run(run: RunDirectory, option: str) -> None:
    """Raises RunError where there is no run directory to write to."""
    if not run.config.exists():
        raise RunError(f"{option}: {run.path} is no run directory to write to; give one as run=")


def _check_usage(run: RunDirectory, model: LanguageModel) -> None:
    """Raises RunError or TaskMismatchError where there would be nothing to write, or nowhere."""
    _require_run(run, "usage")
    if not reads_tables(model):
        raise TaskMismatchError(f"usage: {NO_TABLE}")


def _report_usage(usage: Mapping[str, Usage], run: RunDirectory, title: str) -> None:
    """Prints and writes how evenly tables are used."""
    print_usage(usage)
    print("\n".join(map(str, write_usage(run.usage, usage, title))))


def _check_telemetry(run: RunDirectory, model: LanguageModel, precision: Precision) -> None:
    """Raises RunError or TaskMismatchError where there would be nothing to write, or nowhere."""
    _require_run(run, "telemetry")
    files = sorted((CONFIG_DIR / "mixer").glob("*.yaml"))
    check_surprise(model, precision, [file.stem for file in files if _learns_at_test_time(file)])


def _learns_at_test_time(mixer: Path) -> bool:
    """Whether a mixer's file, or one that it is based on, names a TestTimeMemory."""
    config = OmegaConf.load(mixer)
    assert isinstance(config, DictConfig)
    bases = [
        base if isinstance(base, str) else next(iter(base.values()))
        for base in config.pop("defaults", [])
    ]
    files = [mixer.with_stem(base) for base in bases if base != "_self_"]
    named = "mneme.layers.TestTimeMemory" in OmegaConf.to_yaml(config)
    return named or any(_learns_at_test_time(file) for file in files if file.exists())


def _report(trace: Trace, files: Sequence[Path]) -> None:
    """Prints how surprise goes with the loss, and where to look."""
    print(f"telemetry of {len(trace.ids):,} tokens; {CORRELATED}:")
    for layer, correlations in trace.correlations().items():
        print(f"  {layer}: {in_words(correlations)}")
    print("\n".join(map(str, files)))


def _record(
    run: RunDirectory, file: Path, options: EvalOptions, task: Config, results: Sequence[Evaluation]
) -> None:
    """Appends a row per result to the run's evaluations.jsonl; null for what is not finite."""
    facts: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": file.name,
        "split": options.split,
        "task": task,
        **provenance(),
    }
    rows = [json.dumps(finite(facts | asdict(result))) + "\n" for result in results]
    run.add_evaluations(rows)
