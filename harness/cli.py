"""How the command-line programs end: one message and an exit status, not a traceback."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException

from harness.check import ConfigError
from harness.evaluation import FitError
from harness.run_directory import RunError
from harness.signals import Interrupted, interruptible
from models.diagnosis import NonFiniteError

USER_ERRORS = (ConfigError, FitError, RunError)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turns what a user can cause into one message on stderr and an exit status.

    2: a mistake in the command or the files it names. 1: training failed. 130: Ctrl-C. 141: whoever
    read the output, such as `head`, had seen enough (1 in the middle of a table that rich draws). A
    run that SIGTERM stopped has saved itself and exits with 0; whatever else it stops, with 143.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        with interruptible(), _flushed():
            yield
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(141)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(stop.exit_status)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except NonFiniteError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(1)
    except (*USER_ERRORS, HydraException) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


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
