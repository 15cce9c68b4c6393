"""SIGINT and SIGTERM at any moment: the documented status, message and exit code.

Programs run in forks of this process, which has imported all that they need: starting one afresh
takes seconds. A fork sends itself the signal when it calls a function for the n-th time.
"""

import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import pytest
import torch

from mneme.harness.cli import report_errors
from mneme.harness.evaluate import evaluation
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.run.jobs import resume_run
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory
from mneme.models import lightning_module, optim
from tests.harness.conftest import ROOT, TINY, environment

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])


def train(*arguments):
    """What `python train.py` does."""
    sys.argv = ["train.py", *arguments]
    import train  # which listens to signals from then on

    train.main(list(arguments))


def evaluate(*arguments):
    """What `python eval.py` does."""
    from mneme.harness.run.signals import listen

    listen()
    evaluate_command(arguments)


class Fork:
    """A program in a process of its own.

    Args:
        main: the program.
        *arguments: its own.
        prepare: called there first.
        output: a descriptor; where it prints.
    """

    def __init__(self, main, *arguments, prepare=lambda: None, output):
        self.id = os.fork()
        if self.id == 0:
            os._exit(_run(main, arguments, prepare, output))

    def ended(self, seconds=120):
        """The exit status."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(self.id, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.id, signal.SIGKILL)
        os.waitpid(self.id, 0)
        raise AssertionError(f"it still ran after {seconds} s")


def _run(main, arguments, prepare, output) -> int:
    try:
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(d, "w", closefd=False) for d in (1, 2))
        prepare()
        with report_errors():
            main(*arguments)
        return 0
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stderr.flush()


def at_call(owner, name, count, action):
    """Makes the n-th call of a function begin with an action; for `prepare`, in a fork."""

    def prepare():
        function, calls = getattr(owner, name), []

        def called(*arguments, **options):
            calls.append(1)
            if len(calls) == count:
                action()
            return function(*arguments, **options)

        for module in list(sys.modules.values()):  # also where it was imported by its name
            if getattr(module, name, None) is function:
                setattr(module, name, called)
        setattr(owner, name, called)

    return prepare


def ran(tmp_path, main, *arguments, prepare=lambda: None):
    """The exit status and the output of a program that runs in a folder."""

    def begin():
        os.chdir(tmp_path)
        prepare()

    with tempfile.TemporaryFile("w+") as output:
        status = Fork(main, *arguments, prepare=begin, output=output.fileno()).ended()
        output.seek(0)
        return status, output.read()


def struck(tmp_path, number, moment, main, *arguments):
    """The same of a program that is sent a signal at a moment."""
    prepare = at_call(*moment, lambda: os.kill(os.getpid(), number))
    return ran(tmp_path, main, *arguments, prepare=prepare)


MODULE = lightning_module.SequenceModule
MOMENTS = {  # where, function, call, steps that are saved
    "before the first step": (optim, "make_optimizer", 2, 0),
    "in a step": (optim, "clip_by_groups", 3, 3),
    "in a validation": (MODULE, "validation_step", 1, 4),
    "in the last step": (optim, "clip_by_groups", 6, 6),
    "in the validation after it": (MODULE, "validation_step", 3, 6),
    "while a checkpoint is written": (torch, "save", 2, 2),
}


@SIGNALS
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_ends_as_documented_and_goes_on(tmp_path, number, moment):
    *where, steps = MOMENTS[moment]
    run = RunDirectory(tmp_path / "run")
    options = [*TINY, "trainer.val_check_interval=4", f"run_dir={run.path}"]
    status, said = struck(tmp_path, number, where, train, *options)
    assert status == (130 if number == signal.SIGINT else 0), said
    saved = f"{steps} steps are saved. Continue with: python train.py resume={run.path}"
    assert said.splitlines()[-1] == f"stopped by {number.name}; {saved}"
    assert "Traceback" not in said
    assert run.read_summary()["status"] == "interrupted"
    assert run.read_summary()["error"] == f"stopped by {number.name}; {saved}"
    resume_run(str(run.path))
    assert run.read_summary()["status"] == "finished"
    rows = [row["step"] for row in read_metrics(run.metrics) if "train/loss" in row]
    assert rows == [1, 2, 3, 4, 5, 6]


@SIGNALS
@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_while_a_program_starts_one_line_ends_it(tmp_path, number, program):
    """A program of its own, which gets the signal when it imports torch."""
    (tmp_path / "torch.py").write_text(f"import os; os.kill(os.getpid(), {int(number)})")
    done = subprocess.run(
        [sys.executable, str(ROOT / program), "run=nowhere"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (130 if number == signal.SIGINT else 143)
    assert done.stderr.strip() == f"stopped by {number.name}"


@SIGNALS
def test_an_evaluation_ends_with_one_line_and_records_nothing(train_tiny, tmp_path, number):
    run, _ = train_tiny()
    moment = (evaluation, "_score", 2)
    status, said = struck(tmp_path, number, moment, evaluate, f"run={run.path}")
    assert status == (130 if number == signal.SIGINT else 143), said
    assert said.strip() == f"stopped by {number.name}"
    assert not run.evaluations.exists()


def test_ctrl_c_is_answered_in_a_long_operation_and_a_second_one_stops_it(tmp_path):
    run, output = RunDirectory(tmp_path / "run"), tmp_path / "output"
    begun = tmp_path / "begun"

    def one_long_operation():
        begun.touch()
        torch.linalg.matrix_power(torch.rand(2000, 2000), 2**50)

    with output.open("w") as file:
        prepare = at_call(optim, "clip_by_groups", 3, one_long_operation)
        fork = Fork(train, *TINY, f"run_dir={run.path}", prepare=prepare, output=file.fileno())
    wait_until(begun.exists)
    os.kill(fork.id, signal.SIGINT)
    wait_until(lambda: "stopping after this step; again to stop at once" in output.read_text(), 1)
    os.kill(fork.id, signal.SIGINT)
    assert fork.ended(seconds=1) == 130
    assert "stopped by SIGINT; 2 steps are saved. Continue with" in output.read_text()
    assert run.read_summary()["status"] == "interrupted"


def wait_until(happened, seconds=120):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def test_an_evaluation_shows_progress_on_a_terminal_only(train_tiny, tmp_path):
    run, _ = train_tiny()
    arguments = (f"run={run.path}", "lengths=[1]")
    ours, theirs = pty.openpty()
    fork = Fork(evaluate, *arguments, output=theirs)
    os.close(theirs)
    said = b""
    with open(ours, "rb", buffering=0) as terminal:
        while piece := _read(terminal):
            said += piece
    assert fork.ended() == 0
    assert "16 tokens: batch" in said.decode()
    status, said = ran(tmp_path, evaluate, *arguments)
    assert status == 0
    assert "tokens: batch" not in said


def _read(terminal):
    try:
        return terminal.read(4096)
    except OSError:  # nobody has the other end
        return b""
