"""Starting, sweeping and resuming runs from the command line."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from mneme.harness.config.check import Config, ConfigError, blaming
from mneme.harness.config.compose import Composed
from mneme.harness.config.schema import check_config, run_options
from mneme.harness.run.checkpoints import (
    check_router,
    check_same_run,
    differing_options,
    read_checkpoint,
)
from mneme.harness.run.console import baseline_line, say
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.resume_check import resume_problems
from mneme.harness.run.run_directory import (
    RunDirectory,
    RunError,
    find_run,
    new_run_directory,
    refuse_occupied,
)
from mneme.harness.run.run_lock import alone
from mneme.harness.run.training import Prepared, prepare, train


def start_run(composed: Composed, **facts: Any) -> tuple[RunDirectory, dict[str, Any]]:
    """Trains a checked config in a run directory of its own, and says where that is.

    Args:
        composed: without a `run_dir`, the directory is named by time, task and mixer.
        **facts: what else the summary is to hold.

    Returns:
        The run directory and the summary.

    Raises:
        ConfigError: the model cannot be built, or `run_dir` already holds a run.
    """
    options = run_options(composed.config)
    refuse_occupied(options.run_dir)
    prepared = prepare(composed.config)
    run = new_run_directory(options.run_dir, composed.choices, options.seed)
    with alone(run.path):
        refuse_occupied(str(run.path))  # once more, now that no other process can take it
        started = datetime.now(UTC).isoformat(timespec="seconds")
        run.write_summary(choices=dict(composed.choices), started=started, **facts)
        run.write_config(composed.config)  # from here on it has begun
        return run, _train(prepared, run)


def start_or_resume(composed: Composed, **facts: Any) -> tuple[RunDirectory, dict[str, Any]]:
    """Trains the run of a checked config from wherever it stands in its `run_dir`.

    A run that was stopped goes on, and one that has finished is left as it is: after any
    interruption the same call continues. Jobs of sweeps, rows of reproductions and the demo are
    trained by it.

    Args:
        composed: with a `run_dir`.
        **facts: what else the summary of a run that has not begun is to hold.

    Returns:
        The run directory and the summary.

    Raises:
        ConfigError: there is no `run_dir`, or it holds a run of other options.
        RunError: as `resume_run`.
    """
    where = run_options(composed.config).run_dir
    if where is None:
        raise ConfigError(["run_dir: name the directory of the run, for resume=auto to go on in"])
    run = RunDirectory(Path(where))
    with blaming("run_dir"):  # a name may be too long
        begun = run.config.exists()
    if not begun:
        return start_run(composed, **facts)
    if differ := differing_options(run.read_config(), composed.config):
        raise ConfigError(
            [
                f"run_dir: {where} already holds a run of other options: they differ in "
                f"{', '.join(differ)}; choose another directory"
            ]
        )
    if run.read_summary().get("status") == "finished":
        say(f"the run in {where} has finished before")
        return run, run.read_summary()
    return run, resume_run(where)


def start_job(composed: Composed) -> None:
    """Trains one job of a sweep; it may fail without hiding the others."""
    hydra = HydraConfig.get()
    run = RunDirectory(Path(hydra.runtime.output_dir))
    overrides = [override.lstrip("+") for override in hydra.overrides.task]
    own = replace(composed, config={**composed.config, "run_dir": str(run.path)})
    try:
        start_or_resume(own, overrides=overrides)
    except Exception as error:
        print(f"job {' '.join(overrides)} failed: {error}", file=sys.stderr)
        if not run.config.exists():  # once it has begun, training records its end itself
            reason = f"{type(error).__name__}: {error}"
            run.write_summary(status="failed", overrides=overrides, error=reason)


def resume_run(where: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """Continues the run in a directory as if it had never stopped.

    Args:
        where: the run directory, or its last checkpoint.
        others: what else was typed, which is refused.

    Returns:
        The summary.

    Raises:
        RunError: there is no run, another process trains it, it has finished, or its checkpoint
            cannot be used. Nothing was overwritten then.
        ConfigError: its config does not fit this version of the project.
    """
    if others:
        raise RunError(
            f"resume continues a run exactly as it was; leave out {' '.join(others)}, "
            "or start a new run with those options"
        )
    run, checkpoint = find_run(where)
    if checkpoint not in (None, run.last):
        raise RunError(f"a run resumes from its last checkpoint; give its directory: {run.path}")
    config = run.read_config()
    check_config(config)
    with alone(run.path):
        step = _resume_step(run, config)
        if run.read_summary().get("status") == "finished":
            raise RunError(f"the run in {run.path} has finished, after {step} steps")
        prepared = prepare(config, resumed=bool(step))
        if step:
            _check_resumable(run.last, prepared)
        return _train(prepared, run, step)


def _check_resumable(path: Path, prepared: Prepared) -> None:
    checkpoint = read_checkpoint(path, mapped=True)
    check_router(checkpoint, prepared.task, prepared.model)
    problems = resume_problems(checkpoint, prepared.config, prepared.model, prepared.task)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise RunError(
            f"{path} is not what this run saved; nothing was loaded or overwritten.{lines}\n"
            "Put the checkpoint back, or start a new run with init_from=CHECKPOINT, which takes "
            "weights alone"
        )


def _resume_step(run: RunDirectory, config: Config) -> int:
    """Updates behind the last checkpoint; 0 for a run that was stopped before its first."""
    if run.last.exists():
        checkpoint = read_checkpoint(run.last)
        check_same_run(checkpoint, config, run.last)
        step, end = int(checkpoint["global_step"]), config["trainer"]["max_steps"]
        if step > end:
            raise RunError(f"{run.last} is of step {step}, and the run has {end} steps")
        return step
    if read_metrics(run.metrics):
        raise RunError(
            f"{run.path} has metrics but no {run.last.name}; resuming would begin again and drop "
            "them: put the checkpoint back, or start a new run"
        )
    return 0


class SweepReport(Callback):
    """Prints one line per job when a sweep ends; a failed job makes the sweep's exit status 1."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Reads the jobs' summaries, wherever they ran."""
        directories = sorted(Path(config.hydra.sweep.dir).glob("*/summary.json"), key=_job_number)
        rows = [(path.parent, json.loads(path.read_text())) for path in directories]
        overrides = [row.get("overrides", []) for _, row in rows]
        print("\nsweep:")
        for directory, row in rows:
            varied = [o for o in row.get("overrides", []) if not all(o in job for job in overrides)]
            print(f"  {directory}  {' '.join(varied)}  {_outcome(row)}")
        if any(row.get("status") != "finished" for _, row in rows):
            sys.exit(1)


def _job_number(path: Path) -> tuple[int, str]:
    name = path.parent.name
    return (int(name) if name.isdigit() else sys.maxsize, name)


def _outcome(row: Mapping[str, Any]) -> str:
    if row.get("status") != "finished":
        return f"{row.get('status')}: {' '.join(str(row.get('error')).split())}"
    main = ("val/accuracy", "val/bits_per_byte", "val/loss")
    known = {key: row["metrics"].get(key) for key in main}
    return "  ".join(f"{key}={value:.4f}" for key, value in known.items() if value is not None)


def _train(prepared: Prepared, run: RunDirectory, resume_step: int = 0) -> dict[str, Any]:
    """Trains, and says what came of it and where it is."""
    summary = train(prepared, run, resume_step=resume_step)
    say(_outcome(summary))
    say(baseline_line(prepared.task, "val"))
    say(f"run directory: {run.path}")
    return summary
