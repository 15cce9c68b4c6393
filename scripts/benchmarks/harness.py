"""What Lightning and the harness add to a training step, against the same step in a bare loop."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from mneme.harness.config.compose import compose_checked
from mneme.harness.run.run_directory import RunDirectory
from mneme.harness.run.training import Prepared, prepare, train
from mneme.models.optim import parameter_groups
from mneme.tasks.base import IGNORE
from scripts.benchmarks import measure

# A step of about 50 ms on two cores; validation and checkpoints, which a bare loop lacks, are off.
RUN = ("experiment=demo", "mixer=gated_deltanet", "trainer.val_check_interval=1000000")
WARM_UP = 10  # steps left out of each round


def bare_loop(prepared: Prepared, steps: int) -> list[float]:
    """Seconds of each step of a loop that does what the run's training step does, and no more."""
    task, model = prepared.task, prepared.model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2, weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    times = []
    for index in range(steps):
        start = time.perf_counter()
        batch = task.train_batch(index)
        logits = model(batch.inputs, keep_state=False).y
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


class StepTimes(Callback):
    """Seconds from the end of one training batch to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Reads the clock."""
        self.ends.append(time.perf_counter())


def whole_run(prepared: Prepared, steps: int) -> list[float]:
    """Seconds of each step of a real run: progress bar, metrics file, signals, everything."""
    clock = StepTimes()
    with tempfile.TemporaryDirectory() as directory:
        train(prepared, RunDirectory(Path(directory)), callbacks=[clock])
    differences = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    return differences[WARM_UP - 1 :]


def prepared_run(steps: int) -> Prepared:
    """A freshly initialized model and its task."""
    lengths = (f"trainer.max_steps={steps}", f"checkpoint_every={10 * steps}")
    return prepare(compose_checked([*RUN, *lengths]).config)


def run(arguments: Sequence[str]) -> None:
    """Parse the benchmark's own options, measure, print, and write rows with `--json`."""
    options = measure.parser("harness", __doc__, "one round").parse_args(arguments)
    rounds, steps = (1 if options.quick else 6), 60
    kinds: dict[str, Callable[[Prepared, int], list[float]]] = {
        "bare loop": bare_loop,
        "whole run": whole_run,
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(rounds):
        for kind in sorted(kinds, reverse=index % 2 == 1):  # neither always follows the other
            times[kind] += kinds[kind](prepared_run(steps), steps)
    medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    rows = [
        {
            "kind": kind,
            "milliseconds": 1e3 * median,
            "relative": median / medians["bare loop"],
            "spread": measure.spread(times[kind]),
        }
        for kind, median in medians.items()
    ]
    measure.print_provenance()
    print(f"median step of {rounds} rounds of {steps - WARM_UP} steps, taken in turn:")
    print(measure.table([_text(row) for row in rows]))
    if options.json:
        measure.save(options.json, rows, {})


def _text(row: dict[str, Any]) -> dict[str, str]:
    return {
        "": row["kind"],
        "ms/step": f"{row['milliseconds']:.1f}",
        "relative": f"{row['relative']:.3f}x",
        "spread": f"{row['spread']:.0%}",
    }
