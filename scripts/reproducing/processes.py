"""Trains what a grid still lacks: several runs of train.py at a time, stopped together."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.reporting.columns import number
from scripts.reporting.runs import read_run
from scripts.reproducing.grid import Grid, Job
from scripts.reproducing.reproduction import ReproductionError

ROOT = Path(__file__).resolve().parents[2]
_POLL = 0.1  # seconds; a start of train.py takes some forty times as long
_SHOWN = 12  # last lines of the log of a run that failed


@dataclass(frozen=True)
class Ended:
    """A run that has ended in some way.

    Attributes:
        job: which.
        status: the exit status of train.py.
        seconds: that this start of it took.
        said: the lines that it printed.
    """

    job: Job
    status: int
    seconds: float
    said: Sequence[str]


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    since: float
    offset: int  # in the log, which an earlier start may have begun

    def ended(self, status: int) -> Ended:
        said = self.job.log.read_bytes()[self.offset :].decode(errors="replace")
        return Ended(self.job, status, time.monotonic() - self.since, said.splitlines())


class Stopped(Exception):
    """The program was asked to stop, and so were its runs.

    Attributes:
        exit_status: of the program, as after a run that was stopped: 0 for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 130 if number == signal.SIGINT else 0


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


def run_all(waiting: deque[Job], slots: int, end: Callable[[Ended], None]) -> None:
    """Runs jobs until none waits and none runs.

    Args:
        waiting: the next first; `end` may add some.
        slots: how many at a time.
        end: called for each that has ended.

    Raises:
        Stopped: by SIGINT or SIGTERM, after the runs have saved themselves.
        ReproductionError: a run that another process trains.
    """
    threads = max(1, _cores() // slots)
    running: list[_Running] = []
    with _signals() as received:
        try:
            while waiting or running:
                while waiting and len(running) < slots and not received:
                    running.append(_start(waiting.popleft(), threads))
                if received:
                    break
                time.sleep(_POLL)
                for one in list(running):
                    if (status := one.process.poll()) is not None:
                        running.remove(one)
                        end(one.ended(status))
        finally:
            _stop(running, received)
    if received:
        raise Stopped(received[0])


def start_process(command: Sequence[str], log: int, threads: int) -> subprocess.Popen[bytes]:
    """Starts a program of its own, in a session of its own: Ctrl-C is passed on once, by us."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )


def _start(job: Job, threads: int) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        try:  # held by whoever has the log open: by train.py, even if this program is killed
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ReproductionError(f"another process trains {job.path}; let it end") from error
        log.write(f"$ train.py {shlex.join(job.arguments)}\n".encode())
        log.flush()
        offset, since = log.tell(), time.monotonic()
        command = [sys.executable, str(ROOT / "train.py"), *job.arguments]
        return _Running(job, start_process(command, log.fileno(), threads), since, offset)


def _stop(running: Sequence[_Running], received: Sequence[int]) -> None:
    """Asks runs to save and end, and waits; every further Ctrl-C is passed on."""
    passed_on = 0
    while any(one.process.poll() is None for one in running):
        if passed_on < max(1, len(received)):
            for one in running:
                one.process.send_signal(signal.SIGINT)
            passed_on += 1
        time.sleep(_POLL)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs so far, instead of what they would do."""
    received: list[int] = []

    def receive(number: int, frame: types.FrameType | None) -> None:
        received.append(number)

    previous = {n: signal.signal(n, receive) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
