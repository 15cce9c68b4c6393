"""What a run does beside training: callbacks, of which a config chooses some (group `callbacks`).

The order in which they are called is drawn in `mneme.harness.run.training`.
"""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mneme.layers import Usage, UsageMeter, metering, reads_tables, with_shared_tables
from mneme.models import LanguageModel, SequenceModule
from mneme.tasks.base import IGNORE

NO_TABLE = "no layer of this model reads a table; one with ffn=pkm does"


def validates_after(trainer: Trainer, batches: int) -> bool:
    """Whether a validation follows the first `batches` batches of training."""
    assert isinstance(trainer.val_check_batch, int), (
        "the trainer's config gives a number of batches"
    )
    return batches % trainer.val_check_batch == 0


class RunCallback(Callback):
    """A callback that is told when an update is complete, and that can refuse a model.

    The directory of the run is `trainer.default_root_dir`.
    """

    def check(self, model: LanguageModel) -> None:
        """Looks at the model before anything is written.

        Raises:
            ValueError: the model has nothing for this callback, which was asked for.
        """

    def end_of_step(self, trainer: Trainer) -> None:
        """An update is complete: after its validation, where it has one."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An update ends here unless it is half accumulated or a validation follows."""
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        validating = validates_after(trainer, batch_idx + 1)
        if not accumulating and not validating:
            self.end_of_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation that followed an update is over."""
        if not trainer.sanity_checking:
            self.end_of_step(trainer)


class LogUsage(RunCallback):
    """Logs at each validation how evenly layers use the rows of their tables."""

    def __init__(self) -> None:
        self.meter = UsageMeter()
        self._listening = ExitStack()

    def check(self, model: LanguageModel) -> None:
        """Refuses a model without tables."""
        if not reads_tables(model):
            raise ValueError(NO_TABLE)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting afresh."""
        self.meter = UsageMeter()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listens, but counts no batch that `mneme.tasks.batch.deal` repeats unscored."""
        self.meter.counting = bool((batch.targets != IGNORE).any())
        self._listening.enter_context(metering(self.meter))

    def on_validation_batch_end(self, *_: object) -> None:
        """Listens no more."""
        self._listening.close()

    def on_exception(self, *_: object) -> None:
        """Listens no more."""
        self._listening.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the counts of all ranks, for the row of this validation."""
        assert isinstance(pl_module, SequenceModule)
        used = self.meter.by_layer(pl_module.model)
        for layer, usage in used.items():
            sums = torch.cat([usage.totals.flatten(), torch.tensor([float(usage.tokens)])])
            sums = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum").cpu()
            used[layer] = Usage(sums[:-1].view_as(usage.totals), int(sums[-1]))
        for place, usage in with_shared_tables(pl_module.model, used).items():
            for name, value in usage.metrics().items():
                pl_module.figures[f"usage/{place}/{name}"] = value
