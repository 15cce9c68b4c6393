"""Training and validation of a language model on a task, for Lightning's Trainer."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from mneme.layers import State, is_loss
from mneme.models.diagnosis import NonFiniteError, first_nonfinite, nonfinite_gradients
from mneme.models.language_model import LanguageModel
from mneme.models.optim import (
    MAIN,
    average_rows,
    clip_by_groups,
    leave_out_of_ddp,
    make_optimizer,
    start_equal,
)
from mneme.models.schedules import Schedule
from mneme.tasks.base import IGNORE, Batch
from mneme.tasks.batch import NO_ROUTE
from mneme.tasks.metrics import Metrics

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class SequenceModule(LightningModule):
    """Cross-entropy at the scored positions, plus the losses that layers report.

    Randomness is a function of (seed, step, rank): every training batch reseeds, so that a resumed
    run needs no saved random state to repeat what it would have drawn.

    Args:
        model: the model to train.
        optimizer: makes the optimizer from parameter groups.
        schedule: multiplier of the learning rate by step.
        metrics: makes an empty accumulator of the task's metrics.
        log_every: updates between two logged rows.
        seed: of dropout and whatever else draws in training.

    Attributes:
        figures: what callbacks add to the row of the validation that they have followed.

    Raises:
        NonFiniteError: in training, when a loss or a gradient stops being finite.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        metrics: Callable[[], Metrics],
        log_every: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.metrics_factory = metrics
        self.log_every = log_every
        self.seed = seed
        self.metrics = metrics()
        self.figures: dict[str, float] = {}
        self._pending: list[dict[str, Tensor]] = []  # losses since the last update
        self.latest_loss: Tensor | None = None  # for a progress bar
        self.tokens = 0  # read in training, by all processes, since the run began
        leave_out_of_ddp(self)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over parameter groups, with the schedule applied after every update."""
        optimizer = make_optimizer(self.model, self.optimizer_factory)
        total = self.trainer.max_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule(step, total)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Sees to it that all processes start from the same tables."""
        start_equal(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Makes this batch's randomness its own."""
        _reseed(self.device, _mix(self.seed, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        self.tokens += batch.inputs.numel() * self.trainer.world_size
        state = state_before(self.model, batch)
        logits, _, aux = self.model(batch.inputs, state, keep_state=False)
        task_loss = mean_loss(logits, batch.targets)
        loss = task_loss + sum(value for name, value in aux.items() if is_loss(name))
        if not loss.isfinite():
            raise NonFiniteError(
                f"the loss is {loss.item()} at step {self.global_step}; the first module with a "
                f"non-finite output: {first_nonfinite(self.model, batch.inputs, state)}"
            )
        self.latest_loss = task_loss.detach()
        self._pending.append(
            {"loss": task_loss.detach(), **{n: v.detach() for n, v in aux.items()}}
        )
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Exchanges the gradients of tables between processes, which DDP leaves to us."""
        average_rows(self.model)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each group by its norm, and refuses to step on a gradient that is not finite."""
        limit = gradient_clip_val or float("inf")  # 0 means no clipping, as it does to Lightning
        norms = clip_by_groups(self.model, limit)
        if not all(norm.isfinite() for norm in norms.values()):
            names = ", ".join(nonfinite_gradients(self.model)) or "none; their norm overflows"
            raise NonFiniteError(
                f"the gradient is not finite at step {self.global_step}, though the loss is; "
                f"parameters with non-finite gradients: {names}"
            )
        self._log_update(norms, optimizer.param_groups[0]["lr"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the count of tokens."""
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the count of tokens."""
        self.tokens = checkpoint["tokens"]

    def on_validation_epoch_start(self) -> None:
        """Starts counting afresh."""
        self.metrics = self.metrics_factory()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts one batch."""
        logits = self.model(batch.inputs, state_before(self.model, batch), keep_state=False).y
        self.metrics.update(logits, batch)

    def on_validation_epoch_end(self) -> None:
        """Adds the counts of all ranks and logs the metrics."""
        counts = self.metrics.state().to(self.device)
        self.metrics.load_sum(self.trainer.strategy.reduce(counts, reduce_op="sum"))
        values = {f"val/{name}": value for name, value in self.metrics.compute().items()}
        self.log_dict(values, logger=False, rank_zero_only=True)
        self._write(values | self.figures, self.global_step)
        self.figures = {}

    def _log_update(self, norms: dict[str | None, Tensor], lr: float) -> None:
        """Writes the row of the update that is about to be made, numbered from 1.

        It is on disk before any checkpoint that holds the update, so a run that is killed and
        resumed has every row once. Losses are means over what the update accumulated.
        """
        pending, self._pending = self._pending, []
        if (self.global_step + 1) % self.log_every:
            return
        means = {name: torch.stack([p[name] for p in pending]).mean() for name in pending[0]}
        reduced = {
            f"train/{name}": float(self.trainer.strategy.reduce(value, reduce_op="mean"))
            for name, value in means.items()
        }
        clipped = {
            "train/grad_norm" if group is MAIN else f"train/grad_norm/{group}": float(norm)
            for group, norm in norms.items()
        }
        row = {**reduced, **clipped, "train/lr": lr}
        self._write(row, self.global_step + 1)

    def _write(self, row: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(row, step)


def state_before(model: LanguageModel, batch: Batch) -> State:
    """The start of each sequence, with what its route leads to; None where the model has no routes.

    In training, a model that can follow routes is given `NO_ROUTE` by a task that has none: what it
    fetches then has a part in the loss, as processes that average gradients expect of all
    parameters.
    """
    if not model.routed or (batch.route is None and not model.training):
        return None
    device, count = next(model.parameters()).device, len(batch.inputs)
    route = torch.full((count,), NO_ROUTE) if batch.route is None else batch.route
    return model.init_state(count, route.to(device))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of the scored positions in nats; 0 where none is scored.

    Args:
        logits: `[B, T, V]`.
        targets: `[B, T]`, `IGNORE` where unscored.
    """
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    return torch.where((targets != IGNORE).any(), loss, 0.0)  # a mean over nothing is not a number


def _reseed(device: torch.device, seed: int) -> None:
    """Seeds the generators that training on a device draws from.

    `torch.manual_seed` would also queue a call, with a stack trace, for every kind of device that
    is not in use: half a millisecond a step, in a list that grows for ever.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, with no two small tuples alike."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 0x632BE59BD9B4E019) % 2**63
    return mixed
