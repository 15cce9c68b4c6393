"""What Lightning's Trainer accepts but a run of this project cannot be."""

from collections.abc import Iterator, Mapping
from typing import Any

# A run is measured in updates and batches: its data have no end, so there are no epochs.
_NO_EPOCHS = "data have no end, so there are no epochs; leave it out and set max_steps"
REFUSED_TRAINER_OPTIONS = {
    "max_epochs": _NO_EPOCHS,
    "min_epochs": _NO_EPOCHS,
    "min_steps": _NO_EPOCHS,
    "check_val_every_n_epoch": _NO_EPOCHS,
    "limit_train_batches": _NO_EPOCHS,
    "overfit_batches": _NO_EPOCHS,
    "fast_dev_run": "it leaves no run behind; set max_steps to a few instead",
    "profiler": "it would write outside of the run directory, or nowhere; profile the program "
    "from outside, for example by `py-spy record -- python train.py ...`",
    "max_time": "stop the run with SIGTERM instead, for example by `timeout 2h`; it saves itself",
}

# Options that count updates or batches, with Lightning's defaults where those serve.
LENGTHS: dict[str, int | None] = {
    "max_steps": None,
    "val_check_interval": None,
    "log_every_n_steps": 50,
    "accumulate_grad_batches": 1,
}

# Below these Lightning goes on, and does something else.
LEAST = {"gradient_clip_val": 0, "num_sanity_val_steps": -1}


def check_trainer(trainer: Any) -> Iterator[str]:
    """Yields the problems of a trainer's options."""
    if not isinstance(trainer, Mapping):
        return
    for key, reason in REFUSED_TRAINER_OPTIONS.items():
        if trainer.get(key) is not None:
            yield f"trainer.{key}: {reason}"
    if trainer.get("limit_val_batches", 1) == 0:
        yield "trainer.limit_val_batches: the best checkpoint needs a validation; give 1 or more"
    for key, least in LEAST.items():
        value = trainer.get(key)
        if isinstance(value, int | float) and value < least:
            yield f"trainer.{key}: expected {least} or more, got {value}"
    if trainer.get("gradient_clip_algorithm") not in (None, "norm"):
        yield "trainer.gradient_clip_algorithm: gradients are clipped by norm; leave it out"
    if str(trainer.get("precision")).startswith("16"):
        yield "trainer.precision: fp16 would need its overflows skipped; use bf16-mixed or 32-true"
    yield from _check_lengths(trainer)


def _check_lengths(trainer: Mapping[str, Any]) -> Iterator[str]:
    values = {key: trainer.get(key, default) for key, default in LENGTHS.items()}
    wrong = [k for k, v in values.items() if not isinstance(v, int) or v < 1]
    for key in wrong:
        yield f"trainer.{key}: expected a whole number, 1 or more, got {values[key]!r}"
    interval, pieces = values["val_check_interval"], values["accumulate_grad_batches"]
    if not wrong and interval % pieces:
        yield (
            f"trainer.val_check_interval ({interval}) counts batches and must be a multiple of "
            f"accumulate_grad_batches ({pieces}), so that a validation follows a whole update"
        )
