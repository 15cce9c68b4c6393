"""A run directory from elsewhere is trained on only if it is whole, and can only be read from."""

import os
import shutil

import pytest
import torch

from mneme.harness.config.build import TargetError, build, resolve_target
from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.config.schema import check_config
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.run.checkpoints import read_checkpoint
from mneme.harness.run.jobs import resume_run
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.resume_check import resume_problems
from mneme.harness.run.run_directory import RunDirectory, RunError, find_run
from mneme.harness.run.training import prepare
from mneme.models.bank import read_manifest
from mneme.routers import Router, RouterError
from mneme.storage.files import StorageError
from mneme.tasks.facts.words import Words
from tests.harness.conftest import TINY

ACCUMULATING = ("trainer.accumulate_grad_batches=2", "trainer.val_check_interval=6")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three of its six steps, never changed."""
    from mneme.harness.run.jobs import start_run

    path = tmp_path_factory.mktemp("trained") / "run"
    run, _ = start_run(compose_checked([*TINY, *ACCUMULATING, f"run_dir={path}"]))
    run.write_summary(status="interrupted")
    return run


@pytest.fixture
def copied(trained, tmp_path) -> RunDirectory:
    return RunDirectory(shutil.copytree(trained.path, tmp_path / "copy"))


def contents(run: RunDirectory) -> dict[str, bytes]:
    files = (path for path in run.path.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in files}


def first_state(checkpoint):
    return checkpoint["optimizer_states"][0]["state"][0]


def set_steps(checkpoint, step):
    checkpoint["global_step"] = step


DAMAGES = {
    "no weights": lambda c: c.pop("state_dict"),
    "a weight missing": lambda c: c["state_dict"].pop("model.norm.weight"),
    "complex weights": lambda c: c["state_dict"].update(
        {"model.norm.weight": c["state_dict"]["model.norm.weight"].to(torch.complex64)}
    ),
    "whole-numbered weights": lambda c: c["state_dict"].update(
        {"model.norm.weight": c["state_dict"]["model.norm.weight"].long()}
    ),
    "weights of another shape": lambda c: c["state_dict"].update(
        {"model.norm.weight": torch.ones(1)}
    ),
    "no optimizer": lambda c: c.pop("optimizer_states"),
    "no optimizer state": lambda c: c.update(optimizer_states=[]),
    "an empty optimizer state": lambda c: c["optimizer_states"][0].update(state={}),
    "no moments": lambda c: first_state(c).pop("exp_avg"),
    "moments of another shape": lambda c: first_state(c).update(exp_avg=torch.zeros(1)),
    "complex moments": lambda c: first_state(c).update(
        exp_avg=first_state(c)["exp_avg"].to(torch.complex64)
    ),
    "negative updates": lambda c: first_state(c).update(step=torch.tensor(-3.0)),
    "fewer groups": lambda c: c["optimizer_states"][0]["param_groups"].pop(),
    "no schedule": lambda c: c.pop("lr_schedulers"),
    "an empty schedule": lambda c: c.update(lr_schedulers=[]),
    "a schedule elsewhere": lambda c: c["lr_schedulers"][0].update(last_epoch=0),
    "no loops": lambda c: c.pop("loops"),
    "a loop without progress": lambda c: c["loops"]["fit_loop"].pop("epoch_loop.batch_progress"),
    "no callbacks": lambda c: c.pop("callbacks"),
    "no best value": lambda c: c["callbacks"].clear(),
    "no count of tokens": lambda c: c.pop("tokens"),
    "no vocabulary": lambda c: c["mneme"].pop("vocabulary"),
    "another vocabulary": lambda c: c["mneme"].update(vocabulary="abc"),
    "no config": lambda c: c["mneme"].pop("config"),
    "no format": lambda c: c["mneme"].pop("format"),
    "no step": lambda c: c.pop("global_step"),
    "a negative step": lambda c: set_steps(c, -1),
    "a step beyond the end": lambda c: set_steps(c, 10**12),
    "a fractional step": lambda c: set_steps(c, 2.5),
    "a step that the loops do not know": lambda c: set_steps(c, 4),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_lacks_what_a_resume_needs_is_refused_and_all_is_kept(copied, damage):
    checkpoint = read_checkpoint(copied.last)
    DAMAGES[damage](checkpoint)
    torch.save(checkpoint, copied.last)
    before = contents(copied)
    with pytest.raises(RunError, match=r"last\.ckpt|checkpoint"):
        resume_run(str(copied.path))
    assert contents(copied) == before


@pytest.mark.parametrize(
    ("optimizer", "ffn"),
    [("adamw", "none"), ("adamw", "pkm"), ("SGD", "pkm"), ("Adafactor", "none"), ("NAdam", "none")],
)
def test_every_checkpoint_that_a_run_saves_is_accepted(train_tiny, monkeypatch, optimizer, ffn):
    """Whatever the optimizer keeps, after a step and after a validation, at the start and end."""
    options = [f"ffn={ffn}", *ACCUMULATING]
    if optimizer != "adamw":
        options += ["~optimizer.betas", f"optimizer._target_=torch.optim.{optimizer}"]
        options += ["~optimizer.fused"] if optimizer != "SGD" else []
    if ffn == "pkm":
        options += ["ffn.sub_keys=16", "ffn.heads=1", "ffn.top_k=2"]
    checked = []

    def check(trainer, path, **_):
        original(trainer, path)
        checkpoint = read_checkpoint(path)
        prepared = prepare(config)
        checked.append(checkpoint["global_step"])
        assert resume_problems(checkpoint, config, prepared.model, prepared.task) == []

    from lightning.pytorch import Trainer

    config = compose_checked([*TINY, *options]).config
    original = Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", check)
    train_tiny(*options)
    assert set(checked) == {0, 2, 3, 4, 6}


def replace_by_fifo(path) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "summary.json", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
     "evaluations.jsonl", "tokenizer.model", "words.txt", "router/router.json",
     "bank/manifest.json"],
)  # fmt: skip
def test_a_fifo_in_the_place_of_a_file_is_refused_at_once(copied, name):
    path = copied.path / name
    replace_by_fifo(path)
    reads = {
        "summary.json": copied.read_summary,
        "metrics.csv": lambda: read_metrics(path),
        "checkpoints/best.ckpt": lambda: evaluate_command([f"run={copied.path}"]),
        "evaluations.jsonl": lambda: copied.add_evaluations(["{}\n"]),
        "tokenizer.model": lambda: find_run(path),
        "words.txt": lambda: Words.load(copied.path),
        "router/router.json": lambda: Router.load(path.parent),
        "bank/manifest.json": lambda: read_manifest(path.parent),
    }
    refused = (RunError, StorageError, RouterError, ValueError)
    with pytest.raises(refused, match=r"regular file|is no file|no run at"):
        reads.get(name, lambda: resume_run(str(copied.path)))()


def test_a_device_in_the_place_of_a_file_is_refused_at_once(copied):
    copied.last.unlink()
    copied.last.symlink_to("/dev/zero")
    with pytest.raises(RunError, match=r"last\.ckpt.*not a regular file"):
        resume_run(str(copied.path))


ELSEWHERE = {
    "lightning.pytorch.loggers.CSVLogger": {"save_dir": "PLACE"},
    "lightning.pytorch.loggers.TensorBoardLogger": {"save_dir": "PLACE"},
    "lightning.pytorch.loggers.WandbLogger": {"save_dir": "PLACE", "host": "http://localhost:9"},
    "lightning.pytorch.loggers.MLFlowLogger": {"tracking_uri": "http://localhost:9"},
    "mneme.harness.loggers.MetricsFile": {"path": "PLACE/metrics.csv"},
    "lightning.pytorch.profilers.SimpleProfiler": {"dirpath": "PLACE", "filename": "x"},
    "lightning.pytorch.callbacks.ModelCheckpoint": {"dirpath": "PLACE"},
    "lightning.pytorch.strategies.DeepSpeedStrategy": {"nvme_path": "PLACE"},
}
PLACES = [
    "logger",
    "trainer.profiler",
    "trainer.strategy",
    "model.final_norm",
    "task.pairs",
    "callbacks.more",
]


@pytest.mark.parametrize("target", ELSEWHERE)
@pytest.mark.parametrize("place", PLACES)
def test_no_config_names_what_writes_elsewhere_or_calls_a_server(
    copied, tmp_path, monkeypatch, target, place
):
    monkeypatch.chdir(tmp_path)
    config = copied.read_config()
    options = {k: v.replace("PLACE", str(tmp_path / "x")) for k, v in ELSEWHERE[target].items()}
    *path, last = place.split(".")
    node = config
    for key in path:
        node = node[key]
    node[last] = {"_target_": target, **options}
    copied.write_config(config)
    before = contents(copied)
    with pytest.raises(ConfigError):
        resume_run(str(copied.path))
    with pytest.raises(TargetError):
        resolve_target(target)
    assert contents(copied) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize("profiler", ["simple", "pytorch"])
def test_a_profiler_of_lightning_is_refused(profiler):
    with pytest.raises(ConfigError, match=r"trainer\.profiler: it would write outside"):
        compose_checked([*TINY, f"trainer.profiler={profiler}"])


def test_dashboards_of_this_project_can_be_named():
    for name in ("Wandb", "TensorBoard"):
        build({"_target_": f"mneme.harness.loggers.{name}"})
    check_config(compose_checked([*TINY, "logger=tensorboard"]).config)
