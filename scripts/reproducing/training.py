"""Trains what a grid still lacks, row by row, and says how each run went."""

import sys
from collections import deque
from collections.abc import Sequence

from scripts.reporting.columns import number
from scripts.reporting.runs import read_run
from scripts.reproducing.grid import Grid, Job
from scripts.reproducing.processes import Ended, run_all

_SHOWN = 12  # last lines of the log of a run that failed


def train(grid: Grid, labels: Sequence[str], slots: int) -> list[Job]:
    """Trains the rows of these labels and returns the runs that failed.

    Raises:
        Stopped: by a signal.
        ReproductionError: a run that another process trains.
    """
    training = _Training(grid, labels)
    print(f"{training.left} runs to train, in {grid.place}", flush=True)
    run_all(training.waiting, slots, training.end)
    return training.failed


class _Training:
    """Which runs wait, and for which rows the sweep is not decided.

    Args:
        grid: of all runs.
        labels: of the rows to train.
    """

    def __init__(self, grid: Grid, labels: Sequence[str]) -> None:
        self.grid = grid
        self.waiting: deque[Job] = deque()
        self.undecided: dict[str, int] = {}
        self.running_or_waiting = 0
        self.failed: list[Job] = []
        for label in labels:
            first = [job for job in grid.first(label) if not job.finished]
            self._add(first or self._others(label))
            if first and grid.reproduction.sweep:
                self.undecided[label] = len(first)

    @property
    def left(self) -> int:
        """Runs that have not ended, with those of which only the number is known."""
        later = len(self.grid.reproduction.seeds) - 1
        return self.running_or_waiting + later * len(self.undecided)

    def end(self, ended: Ended) -> None:
        """Takes note of a run; the one that decides a sweep lets the other seeds of its row go."""
        job = ended.job
        self.running_or_waiting -= 1
        if not job.finished:
            self.failed.append(job)
        if job.label in self.undecided:
            self.undecided[job.label] -= 1
            if not self.undecided[job.label]:
                del self.undecided[job.label]
                self._add(self._others(job.label), at_once=True)
        self._say(ended)

    def _others(self, label: str) -> list[Job]:
        return [job for job in self.grid.others(label) if not job.finished]

    def _add(self, jobs: Sequence[Job], *, at_once: bool = False) -> None:
        if at_once:
            self.waiting.extendleft(reversed(jobs))
        else:
            self.waiting.extend(jobs)
        self.running_or_waiting += len(jobs)

    def _say(self, ended: Ended) -> None:
        job = ended.job
        took = f"{ended.seconds:.0f} s  ({self.left} left)"
        if job.finished:
            print(f"{self._name(job)}  {_metric(job)}  {took}", flush=True)
            return
        failed = f"{self._name(job)}  failed with exit status {ended.status}  {took}"
        last = [f"    {line}" for line in ended.said[-_SHOWN:]]
        print(failed, f"  {job.log} ends:", *last, sep="\n", file=sys.stderr, flush=True)

    def _name(self, job: Job) -> str:
        swept = [] if job.value is None else [f"{self.grid.reproduction.option}={job.value}"]
        return "  ".join([job.label, *swept, f"seed {job.seed}"])


def _metric(job: Job) -> str:
    """The best validation, by which sweeps are decided."""
    run = read_run(job.path)
    if not run.best:
        return "no validation that is a number"
    return f"{run.monitor} {number(run.best_value)}"
