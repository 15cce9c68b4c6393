"""How programs end: one message and an exit status, not a traceback."""

import argparse
import math
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mneme.harness.config.check import ConfigError, refused
from mneme.harness.run.run_directory import RunError, TaskMismatchError
from mneme.harness.run.signals import Interrupted, interruptible
from mneme.models.diagnosis import NonFiniteError
from mneme.routers import RouterError
from mneme.storage.files import StorageError

USER_ERRORS = (
    ConfigError,
    TaskMismatchError,
    RunError,
    RouterError,
    StorageError,
    HydraException,
    OmegaConfBaseException,
)

TRACEBACK = "MNEME_TRACEBACK"
"""The environment variable that has programs show where an error came from."""

_ROOT = Path(__file__).resolve().parent.parent
# How torch says that memory is not there: on a CPU with no class of its own.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


@contextmanager
def report_errors() -> Iterator[None]:
    """Turns errors into one message on stderr and an exit status.

    2: a mistake in the command or the files it names. 1: training failed, the system refused a
    file or memory, or the program has a fault, which the message then says. 130: Ctrl-C. 141:
    whoever read the output, such as `head`, had seen enough (1 in the middle of a table that rich
    draws). A run that SIGTERM stopped has saved itself and exits with 0; whatever else it stops,
    with 143.

    With MNEME_TRACEBACK=1 in the environment the traceback is shown before the message.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        with interruptible(), _flushed():
            yield
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(stop.exit_status)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            sys.exit(141)
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            traceback.print_exc()
        print(message(error), file=sys.stderr)
        sys.exit(2 if isinstance(error, USER_ERRORS) else 1)


def message(error: Exception) -> str:
    """What is wrong, where, and what to do instead; of an error that nobody foresaw, that too."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    if isinstance(error, NonFiniteError):
        return f"\n{error}"  # a progress bar may stand on the line
    if _lacks_memory(error):
        return (
            f"not enough memory ({_one_line(error)}); make the model, the batch or the length "
            "smaller"
        )
    if isinstance(error, OSError):
        return refused(error)
    return (
        f"{type(error).__name__}{_place(error)}: {_one_line(error)}; this is a fault of the "
        f"program, not of what you typed: please report it with what {TRACEBACK}=1 shows"
    )


def _lacks_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)


def _place(error: Exception) -> str:
    """Where in this project it happened."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames]
    own = [
        (file.relative_to(_ROOT), frame.lineno)
        for file, frame in zip(files, frames, strict=True)
        if file.is_relative_to(_ROOT) and ".venv" not in file.parts
    ]
    if not own:
        return ""
    return " in {}, line {}".format(*own[-1])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"


def whole_number(least: int) -> Callable[[str], int]:
    """For `argparse`: a whole number, this or more."""

    def parse(word: str) -> int:
        try:
            if (number := int(word)) >= least:
                return number
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, got {word!r}")

    return parse


def number(least: float) -> Callable[[str], float]:
    """For `argparse`: a finite number, this or more."""

    def parse(word: str) -> float:
        try:
            if math.isfinite(value := float(word)) and value >= least:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected a number, {least:g} or more, got {word!r}")

    return parse


@contextmanager
def _flushed() -> Iterator[None]:
    """Writes out what was printed, also before `sys.exit`, while errors are still reported."""
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def _output_is_closed() -> bool:
    """Whether it is the program's own output that nobody reads any more."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError):  # there is none, or it is no file
        return False
    output = select.poll()
    output.register(descriptor, 0)  # errors are reported whatever is asked for
    return any(event & select.POLLERR for _, event in output.poll(0))
