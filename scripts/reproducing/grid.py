"""The runs of a reproduction: where each is, what is typed for it, which value its row takes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mneme.harness.config.check import Config, ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.run.run_directory import RunDirectory
from scripts.reporting.entries import compared, differing, named
from scripts.reporting.runs import Run, read_run
from scripts.reproducing.reproduction import Reproduction, ReproductionError, folder


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        label: of its row.
        value: of the option that is swept; None if none is.
        seed: of the run.
        path: its run directory.
        overrides: what it is composed from.
    """

    label: str
    value: str | None
    seed: int
    path: Path
    overrides: Sequence[str]

    @property
    def log(self) -> Path:
        """What train.py printed, beside the run directory."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def exists(self) -> bool:
        """Whether it was begun."""
        return self.run_directory.config.exists()

    @property
    def finished(self) -> bool:
        """Whether it took all its steps."""
        return self.run_directory.read_summary().get("status") == "finished"

    @property
    def run_directory(self) -> RunDirectory:
        """Its files."""
        return RunDirectory(self.path)

    @property
    def arguments(self) -> list[str]:
        """Of train.py: starts the run, or goes on where it stopped."""
        return ["resume=auto", *self.overrides]


@dataclass(frozen=True)
class Grid:
    """All runs that a reproduction may take.

    Attributes:
        reproduction: the contents of the file.
        place: a folder with one folder per row.
    """

    reproduction: Reproduction
    place: Path

    def first(self, label: str) -> list[Job]:
        """The runs of a row that wait for nothing: the sweep, or every seed without one."""
        seeds, values = self.reproduction.seeds, self.reproduction.values
        if not values:
            return [self._job(label, None, seed) for seed in seeds]
        return [self._job(label, value, seeds[0]) for value in values]

    def others(self, label: str) -> list[Job]:
        """The runs that follow once the sweep is decided; none if none of its runs has a result."""
        best = self.best(label)
        if best is None or best.value is None:
            return []
        return [self._job(label, best.value, seed) for seed in self.reproduction.seeds[1:]]

    def best(self, label: str) -> Job | None:
        """Of the first runs of a row the one with the best validation; of equal ones the first."""
        results = [(job, read_run(job.path)) for job in self.first(label) if job.exists]
        having = [(job, run) for job, run in results if run.finished and run.best]
        return max(having, key=lambda pair: _goodness(pair[1]), default=(None,))[0]

    def reported(self, label: str) -> list[Job]:
        """The runs for the table: every seed at the best value."""
        best = self.best(label)
        if best is None:
            return []
        return self.first(label) if best.value is None else [best, *self.others(label)]

    def check(self, labels: Collection[str]) -> None:
        """Composes the config of every row and value, before anything is trained.

        Args:
            labels: the rows to train; of others, only runs that are there already are checked.

        Raises:
            ConfigError: with every problem of the options.
            ReproductionError: a run that is there already was made from other options.
        """
        problems = []
        for label in self.reproduction.rows:
            for job in self.first(label):
                there = self._there(job)
                if there or label in labels:
                    try:
                        self._compare(compose_checked(job.overrides).config, there)
                    except ConfigError as error:
                        problems += [f"rows: {label}: {problem}" for problem in error.problems]
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))

    def _there(self, job: Job) -> list[Job]:
        """Of the runs that differ from a job in no more than the seed, those that were begun."""
        twins = [self._job(job.label, job.value, seed) for seed in self.reproduction.seeds]
        return [twin for twin in twins if twin.exists]

    def _compare(self, config: Config, there: Sequence[Job]) -> None:
        """Refuses runs of earlier contents of the file."""
        wanted = named(compared(config))
        for job in there:
            made = named(compared(job.run_directory.read_config()))
            if differ := differing([wanted, made]):
                raise ReproductionError(
                    f"{job.path} was made from other options: it differs in {', '.join(differ)}; "
                    "move it away, or choose another folder with --runs"
                )

    def _job(self, label: str, value: str | None, seed: int) -> Job:
        swept = [] if value is None else [f"{self.reproduction.option}={value}"]
        name = folder("_".join([*swept, f"seed{seed}"]))
        path = self.place / folder(label) / name
        own = [f"label={_quoted(label)}", f"seed={seed}", f"run_dir={_quoted(str(path))}"]
        row = self.reproduction.rows[label]
        overrides = [*self.reproduction.options, *row, *swept, *own]
        return Job(label, value, seed, path, overrides)


def _goodness(run: Run) -> float:
    assert run.task is not None, "a run with a validation has a task"
    sign = {"min": -1, "max": 1}[run.task.monitor_mode]
    return sign * run.best_value


def _quoted(text: str) -> str:
    """As Hydra reads it back whatever it holds."""
    return "'" + text.replace("'", "\\'") + "'"
