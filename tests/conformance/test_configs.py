"""Everything shipped is exercised: every config file builds and takes a step."""

import pytest

from mneme.harness.config.compose import CONFIG_DIR, compose_checked
from mneme.harness.run.jobs import start_run
from mneme.harness.run.metrics_file import read_metrics

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
SMALL_NEEDLE = ("task.seq_len=32", "task.batch_size=2", "task.test_examples=2")
SMALL_MAD = ("task.seq_len=32", "task.train_examples=4", "task.batch_size=2",
             "task.test_examples=2")  # fmt: skip
SMALL_TRACKING = ("task.min_length=2", "task.max_length=4", "task.test_length=[4]",
                  "task.batch_size=2", "task.test_examples=2")  # fmt: skip
SMALL_FACTS = ("task.subjects=20", "task.objects=8", "task.batch_size=8")
SMALL_RARE = (
    "task.library.subjects=32",
    "task.library.topics=4",
    "task.library.objects=8",
    "task.library.given_names=8",
    "task.library.surnames=2",
    "task.routing.components=16",
    "task.batch_size=8",
)
SMALL_TASK = {
    "facts": SMALL_FACTS,
    "facts_two_phases": (
        *SMALL_FACTS,
        "trainer.accumulate_grad_batches=2",
        "trainer.val_check_interval=2",
        "task.counted_batches=2",
        "task.second_phase_after=1",
    ),
    "mqar": SMALL_MQAR,
    "mqar_paper": SMALL_MQAR,
    "mqar_hard": SMALL_MQAR,
    "mqar_forgetting": SMALL_MQAR,
    "mqar_mix": (),
    "needle_mix": (),
    "needle": SMALL_NEEDLE,
    "needle_number": SMALL_NEEDLE,
    "mad_recall": SMALL_MAD,
    "mad_noisy_recall": SMALL_MAD,
    "mad_fuzzy_recall": SMALL_MAD,
    "mad_copying": (*SMALL_MAD, "task.copied=4"),
    "mad_memorization": SMALL_MAD,
    "induction": ("task.length=16", "task.test_length=[8]", "task.test_examples=2"),
    "phone_book": ("task.entries=4", "task.test_entries=4", "task.batch_size=2"),
    "mqar_compositional": ("task.batch_size=2", "task.test_examples=2"),
    "mqar_twice": ("task.task.batch_size=2", "task.task.test_examples=2"),
    "set_disjointness": ("task.sizes=[[2,3]]", "task.test_sizes=[[2,3]]", "task.batch_size=2"),
    "set_disjointness_twice": ("task.task.batch_size=2", "task.task.test_examples=2"),
    "phone_book_turns": ("task.entries=6", "task.test_entries=6", "task.batch_size=2"),
    "copying": ("task.length=4", "task.test_length=4", "task.batch_size=2"),
    "list_ops": ("task.batch_size=2", "task.test_examples=2"),
    "digits": ("task.batch_size=2",),
    "path_star": ("task.batch_size=2", "task.test_examples=2"),
    "path_star_in_weights": ("task.batch_size=2", "task.test_examples=2"),
    "parity": SMALL_TRACKING,
    "modular_arithmetic": SMALL_TRACKING,
    "group_words": SMALL_TRACKING,
    "rare_facts": SMALL_RARE,
    "text": ("task.seq_len=32", "task.batch_size=2"),
    "text_sentencepiece": ("task.seq_len=32", "task.batch_size=2"),
}
# Of the groups whose files choose a task; the others are tried on MQAR.
SMALL_OF = {
    "task": SMALL_TASK,
    "experiment": {"demo": SMALL_MQAR, "facts": SMALL_FACTS, "rare_facts": SMALL_RARE},
    "callbacks": {
        "save_bank": (*SMALL_MQAR, "ffn=bank"),
        "usage": (*SMALL_MQAR, "ffn=pkm", "ffn.sub_keys=8", "ffn.top_k=4"),
    },
}


GROUPS = (
    "mixer",
    "ffn",
    "model",
    "task",
    "optimizer",
    "schedule",
    "trainer",
    "callbacks",
    "logger",
    "experiment",
)


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


CASES = [(group, name) for group in GROUPS for name in files(group)]


@pytest.mark.parametrize(("group", "name"), CASES, ids=str)
def test_every_config_takes_a_step(tmp_path, group, name, text_cache, monkeypatch):
    monkeypatch.setenv("MNEME_CACHE", str(text_cache))
    small_task = SMALL_OF[group][name] if group in SMALL_OF else SMALL_MQAR
    composed = compose_checked([*SMALL, *small_task, f"{group}={name}", f"run_dir={tmp_path}"])
    run, summary = start_run(composed)
    losses = [row["train/loss"] for row in read_metrics(run.metrics) if "train/loss" in row]
    assert summary["status"] == "finished"
    assert len(losses) == 1
    assert losses[0] > 0


@pytest.mark.parametrize("group", [path.name for path in CONFIG_DIR.iterdir() if path.is_dir()])
def test_no_group_escapes_these_tests(group):
    assert group in GROUPS
    assert files(group)


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda p: str(p.stem))
def test_every_file_says_what_it_is(path):
    lines = path.read_text().splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert first.startswith("# ")
