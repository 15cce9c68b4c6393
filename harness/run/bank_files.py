"""The memory bank of a run in files, for `scripts/serve_bank.py` and edits."""

from lightning.pytorch import Trainer

from mneme.harness.run.checkpoints import EndOfStep
from mneme.harness.run.console import say
from mneme.harness.run.run_directory import RunDirectory
from mneme.layers import MemoryBank
from mneme.models import LanguageModel
from mneme.models.bank import model_hash, write_bank
from mneme.tasks.base import Task


class SaveBank(EndOfStep):
    """Writes the bank of a run when training ends, and on the way if asked.

    It has the weights of the moment, as `last.ckpt` does, and the hash of the base model that they
    were trained with. So the two belong together when a run has ended. Where the base model is
    trained too, they do so on the way only after steps at which both were written.

    Args:
        run: its `bank` folder is written to.
        model: has a bank in memory.
        task: its router chooses the blocks.
        every: updates between two writes; None writes at the end only.
    """

    def __init__(
        self, run: RunDirectory, model: LanguageModel, task: Task, *, every: int | None
    ) -> None:
        assert isinstance(model.bank, MemoryBank), "it is being trained"
        self.run, self.model, self.bank, self.task = run, model, model.bank, task
        self.every, self.saved_step = every, -1

    def end_of_step(self, trainer: Trainer) -> None:
        """Saves when it is time."""
        if self.every is not None and trainer.global_step % self.every == 0:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes the bank, once per step and by one process; says so when it is on disk."""
        step = trainer.global_step
        if not trainer.is_global_zero or step == self.saved_step:
            return
        write_bank(
            self.run.bank,
            self.bank.shape,
            self.bank.records,
            dtype="float32",
            router=self.task.router,
            base_model=model_hash(self.model),
            facts={"step": step, "run": self.run.name},
        )
        self.saved_step = step
        say(f"saved the bank of step {step}", flush=True)
