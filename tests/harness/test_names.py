"""What is named by the time is nobody else's."""

import json
import os
from functools import partial

from mneme.harness.config.compose import claim_sweep
from mneme.harness.run.run_directory import claim_by_time
from tests.harness.conftest import TINY
from tests.harness.test_signals import Fork, train


def test_sweeps_that_start_together_lose_no_job(tmp_path):
    with (tmp_path / "output").open("w") as output:
        started = [
            Fork(
                train, "-m", *TINY, f"seed={seed}",
                prepare=partial(os.chdir, tmp_path), output=output.fileno(),
            )
            for seed in (1, 2)
        ]  # of one second, more often than not  # fmt: skip
        statuses = [fork.ended(280) for fork in started]
    assert statuses == [0, 0], (tmp_path / "output").read_text()
    found = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/0/summary.json")]
    assert sorted(summary["seed"] for summary in found) == [1, 2]


def test_names_of_one_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [claim_by_time("sweep") for _ in range(20)]
    assert len(set(made)) == 20
    assert all(path.is_dir() for path in made)


def test_a_sweep_that_names_its_directory_or_only_shows_something_claims_none(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for arguments in (["-m", "hydra.sweep.dir=mine"], ["-m", "++hydra.sweep.dir=mine"], ["--help"]):
        assert claim_sweep(arguments) == arguments
    assert list(tmp_path.iterdir()) == []
