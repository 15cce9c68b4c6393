"""The memory bank of a run in files, for `scripts/serve_bank.py` and edits."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from mneme.harness.run.callbacks import RunCallback
from mneme.harness.run.console import say
from mneme.harness.run.data import TaskData
from mneme.harness.run.run_directory import RunDirectory
from mneme.layers import MemoryBank
from mneme.layers.bank.memory_bank import BANK
from mneme.layers.protocol import require_at_least
from mneme.models import LanguageModel, SequenceModule
from mneme.models.bank import model_hash, write_bank


class SaveBank(RunCallback):
    """Writes the bank of a run when training ends, and on the way if asked.

    It has the weights of the moment, as `last.ckpt` does, and the hash of the base model that they
    were trained with. So the two belong together when a run has ended. Where the base model is
    trained too, they do so on the way only after steps at which both were written.

    A model without a bank is left alone.

    Args:
        every: updates between two writes; None writes at the end only.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, *, every: int | None = None) -> None:
        require_at_least(1, every=1 if every is None else every)
        self.every, self.saved_step = every, -1

    def check(self, model: LanguageModel) -> None:
        """Refuses writes on the way where there is nothing to write."""
        if self.every is not None and BANK not in model.routed:
            raise ValueError("no layer of this model reads a memory bank; one with ffn=bank does")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds what to write, and where."""
        assert isinstance(pl_module, SequenceModule)
        data: TaskData = trainer.datamodule  # type: ignore[attr-defined]
        self.run, self.task = RunDirectory(Path(trainer.default_root_dir)), data.task
        self.model, self.bank = pl_module.model, pl_module.model.routed.get(BANK)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the final blocks, also those of a run that was stopped after its last step."""
        self.save(trainer)

    def end_of_step(self, trainer: Trainer) -> None:
        """Saves when it is time."""
        if self.every is not None and trainer.global_step % self.every == 0:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes the bank, once per step and by one process; says so when it is on disk."""
        step = trainer.global_step
        if self.bank is None or not trainer.is_global_zero or step == self.saved_step:
            return
        assert isinstance(self.bank, MemoryBank), "it is being trained"
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
