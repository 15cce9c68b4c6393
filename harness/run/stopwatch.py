"""How long a run has trained."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from mneme.models import SequenceModule


class Stopwatch(Callback):
    """Time spent training since the start or the resumption, validation left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.since = 0.0
        self.first_token = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts."""
        assert isinstance(pl_module, SequenceModule)
        self.since, self.first_token = time.perf_counter(), pl_module.tokens

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pauses."""
        self._pause(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on."""
        self.since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops."""
        self._pause(trainer)

    def _pause(self, trainer: Trainer) -> None:
        if trainer.state.fn == "fit":
            self.seconds += time.perf_counter() - self.since
