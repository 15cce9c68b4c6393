"""Trains a model: `python train.py mixer=gated_deltanet task=mqar optimizer.lr=3e-3`.

Every group of configs/ is chosen with one word and every option is set by its dotted name; `-m`
with comma-separated values runs a sweep; `resume=<run directory>` continues a run that was stopped.
`python train.py --help` lists the groups.
"""

import sys

import hydra
from omegaconf import DictConfig

from harness.cli import report_errors
from harness.compose import check_command_line, checked, job_choices
from harness.jobs import resume_run, start_job


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def job(config: DictConfig) -> None:
    """One training run; a sweep calls it once per combination of values."""
    with report_errors():
        composed = checked(config, job_choices())
        start_job(composed.config, composed.choices)


def main(arguments: list[str]) -> None:
    """Checks the whole command line, then trains."""
    resumed = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if resumed:
        resume_run(resumed[-1], others=[a for a in arguments if not a.startswith("resume=")])
        return
    sys.argv[1:] = check_command_line(arguments)
    job()


if __name__ == "__main__":
    with report_errors():
        main(sys.argv[1:])
