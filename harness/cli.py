"""How the command-line programs end: one message and an exit status, not a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException

from harness.check import ConfigError
from harness.checkpoints import Interrupted
from harness.evaluation import FitError
from harness.run_directory import RunError
from models.diagnosis import NonFiniteError

USER_ERRORS = (ConfigError, FitError, RunError)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turns what a user can cause into one message on stderr and an exit status.

    2: a mistake in the command or the files it names. 1: training failed. 130: Ctrl-C. A run that
    SIGTERM stopped has saved itself and exits with 0.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        yield
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
