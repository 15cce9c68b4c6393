"""Everything shipped is exercised: every config file builds and takes a step."""

import pytest

from harness.compose import CONFIG_DIR, compose_checked
from harness.jobs import start_run
from harness.loggers import read_metrics

SMALL = (
    "logger=csv",
    "model.d_model=16",
    "trainer.accelerator=cpu",
    "trainer.max_steps=1",
    "trainer.val_check_interval=1",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
)
SMALL_MQAR = ("task.seq_len=16", "task.pairs=2", "task.test_pairs=[2]", "task.batch_size=2")
SMALL_TASK = {
    "mqar": SMALL_MQAR,
    "mqar_paper": SMALL_MQAR,
    "mqar_hard": SMALL_MQAR,
    "mqar_mix": (),
    "text": ("task.seq_len=32", "task.batch_size=2"),
    "text_sentencepiece": ("task.seq_len=32", "task.batch_size=2"),
}


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def take_a_step(tmp_path, *overrides: str) -> None:
    composed = compose_checked([*SMALL, f"run_dir={tmp_path / 'run'}", *overrides])
    run, summary = start_run(composed)
    assert summary["status"] == "finished"
    losses = [row["train/loss"] for row in read_metrics(run.metrics) if "train/loss" in row]
    assert len(losses) == 1
    assert losses[0] > 0


@pytest.mark.parametrize("mixer", files("mixer"))
def test_every_mixer_takes_a_step(tmp_path, mixer):
    take_a_step(tmp_path, f"mixer={mixer}", *SMALL_MQAR)


@pytest.mark.parametrize("ffn", files("ffn"))
def test_every_feed_forward_takes_a_step(tmp_path, ffn):
    take_a_step(tmp_path, f"ffn={ffn}", *SMALL_MQAR)


@pytest.mark.parametrize("model", files("model"))
def test_every_model_takes_a_step(tmp_path, model):
    take_a_step(tmp_path, f"model={model}", *SMALL_MQAR)


@pytest.mark.parametrize("task", files("task"))
def test_every_task_takes_a_step(tmp_path, task, text_cache, monkeypatch):
    monkeypatch.setenv("MNEME_CACHE", str(text_cache))
    take_a_step(tmp_path, f"task={task}", "model=recall", *SMALL_TASK[task])


@pytest.mark.parametrize("schedule", files("schedule"))
@pytest.mark.parametrize("optimizer", files("optimizer"))
def test_every_optimizer_and_schedule_takes_a_step(tmp_path, optimizer, schedule):
    take_a_step(tmp_path, f"optimizer={optimizer}", f"schedule={schedule}", *SMALL_MQAR)


@pytest.mark.parametrize("logger", files("logger"))
def test_every_logger_takes_a_step(tmp_path, logger):
    take_a_step(tmp_path, f"logger={logger}", *SMALL_MQAR)


@pytest.mark.parametrize("trainer", files("trainer"))
def test_every_trainer_takes_a_step(tmp_path, trainer):
    take_a_step(tmp_path, f"trainer={trainer}", *SMALL_MQAR)


@pytest.mark.parametrize("experiment", files("experiment"))
def test_every_experiment_takes_a_step(tmp_path, experiment):
    take_a_step(tmp_path, f"experiment={experiment}", *SMALL_MQAR)


@pytest.mark.parametrize("group", [path.name for path in CONFIG_DIR.iterdir() if path.is_dir()])
def test_no_group_escapes_these_tests(group):
    tested = {"mixer", "ffn", "model", "task", "schedule", "optimizer", "logger", "trainer"}
    assert group in tested | {"experiment"}
    assert files(group)


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda p: str(p.stem))
def test_every_file_says_what_it_is(path):
    lines = path.read_text().splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert first.startswith("# ")
