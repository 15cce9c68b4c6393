"""metrics.csv: what was logged, row by row."""

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from mneme.harness.run.run_directory import RunError, write_atomically
from mneme.storage.files import read_regular

STEP = "step"


class MetricsFile(Logger):
    """metrics.csv: a row whenever something is logged, a column per metric, empty where unknown.

    Rows are appended and flushed one by one, so a killed run keeps all it logged. A metric seen for
    the first time adds a column: the file is then replaced whole.

    Args:
        path: the file; rows already there are kept up to `resume_step`.
        resume_step: the number of updates behind the checkpoint that training goes on from.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path = path
        kept = [row for row in read_metrics(path) if row[STEP] <= resume_step]
        self.columns = list(dict.fromkeys([STEP, *(key for row in kept for key in row)]))
        self._rewrite(kept)

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "metrics"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a row."""
        row = {STEP: step or 0, **metrics}
        if new := [key for key in row if key not in self.columns]:
            rows = read_metrics(self.path)
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            self._writer(file).writerow(row)

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """The run directory holds the config already."""

    @rank_zero_only
    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        text = io.StringIO(newline="")
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())

    def _writer(self, file: Any) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self.columns, lineterminator="\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, each with the metrics it holds; a row cut short is left out.

    Raises:
        RunError: the file cannot be read, or its rows are not of numbers.
    """
    try:
        text = read_regular(path).decode()
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole))
        rows = [{k: float(v) for k, v in row.items() if v} for row in reader]
        return [{**row, STEP: int(row[STEP])} for row in rows]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise RunError(f"{path} is damaged ({error}); mend its rows, or start a new run") from error


def last_validation(path: Path, step: int) -> dict[str, float]:
    """The metrics of the validation after `step` updates; empty if there was none."""
    rows = [row for row in read_metrics(path) if row[STEP] == step]
    found = [{k: v for k, v in row.items() if k.startswith("val/")} for row in rows]
    return next((row for row in reversed(found) if row), {})
