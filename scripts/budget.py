"""Prints what a composed model costs: `python scripts/budget.py mixer=attention model=hybrid`.

Takes the overrides of train.py, and `task.seq_len=N` for the length at which costs are counted.
Nothing is trained and no weight is allocated.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from mneme.harness.cli import report_errors
from mneme.harness.config.build import build
from mneme.harness.config.check import blaming
from mneme.harness.config.compose import compose_checked
from mneme.harness.run.training import build_model
from mneme.models import Budget, budget


def composed_budget(overrides: list[str]) -> Budget:
    """The budget of the model that train.py would train with these overrides."""
    config = compose_checked(overrides).config
    with blaming("model"), torch.device("meta"):
        task = build(config["task"])
        return budget(build_model(config, task), task.seq_len)


def show(costs: Budget) -> None:
    """Prints the table."""
    table = Table(title=f"budget at {costs.seq_len:,} tokens", title_justify="left")
    table.add_column("cost")
    table.add_column("amount", justify="right")
    table.add_row("parameters", f"{costs.parameters:,}")
    table.add_row("active parameters (per token)", f"{costs.active_parameters:,}")
    table.add_row("state bytes (per sequence)", f"{costs.state_bytes:,}")
    table.add_row("FLOPs per token (forward)", f"{costs.flops_per_token:,.0f}")
    table.add_row("bytes read per decoded token", f"{costs.decode_bytes_per_token:,}")
    Console().print(table)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    with report_errors():
        show(composed_budget(sys.argv[1:]))
