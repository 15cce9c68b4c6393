"""Trains a model: `python train.py mixer=gated_deltanet task=mqar optimizer.lr=3e-3`.

Every group of configs/ is chosen with one word and every option is set by its dotted name; `-m`
with comma-separated values runs a sweep; `resume=<run directory>` continues a run that was stopped,
and `resume=auto run_dir=<directory>` starts the run there or, if it was stopped, continues it.
`python train.py --help` lists the groups.
"""

import os
import sys

from mneme.harness.run.signals import listen

if __name__ == "__main__":
    listen()  # before anything that takes time

# Before torch is imported. Gradients of large tables are new memory in every step, and on a CPU
# half of a sparse backward pass went into page faults: with huge pages it is up to three times as
# fast.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import hydra
from omegaconf import DictConfig

from mneme.harness.cli import report_errors
from mneme.harness.config.compose import (
    CONFIG_DIR,
    check_sweep,
    checked,
    claim_sweep,
    compose_checked,
    job_choices,
    stopped_sweep,
)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def job(config: DictConfig) -> None:
    """One run of a sweep."""
    from mneme.harness.run.jobs import start_job

    with report_errors():
        start_job(checked(config, job_choices()))


def main(arguments: list[str]) -> None:
    """Checks the whole command line, then imports what training takes, and trains."""
    resumed = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    others = [a for a in arguments if not a.startswith("resume=")]
    if resumed[-1:] == ["auto"]:
        composed = compose_checked(others)
        from mneme.harness.run.jobs import start_or_resume

        start_or_resume(composed)
    elif resumed and not others and (sweep := stopped_sweep(resumed[-1])):
        sys.argv[1:] = sweep
        job()
    elif resumed:
        from mneme.harness.run.jobs import resume_run

        resume_run(resumed[-1], others=others)
    elif any(a.startswith("-") for a in arguments):  # -m, --help, --cfg: Hydra's own business
        sys.argv[1:] = claim_sweep(check_sweep(arguments))
        job()
    else:
        composed = compose_checked(arguments)
        from mneme.harness.run.jobs import start_run

        start_run(composed)


if __name__ == "__main__":
    with report_errors():
        main(sys.argv[1:])
