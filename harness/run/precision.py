"""The precision that a run computes in, for all that goes on with its model after training."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision

from mneme.harness.config.check import Config, blaming
from mneme.harness.run.console import quiet_libraries


def run_precision(config: Config) -> Precision:
    """What Lightning's trainer of a run computes with.

    Its `convert_module` gives a model the types of the run's weights, and under its
    `forward_context` a call computes as it did in the run's own validation.

    Args:
        config: of the run, checked.
    """
    quiet_libraries()
    with blaming("trainer.precision", ImportError):
        trainer = Trainer(
            precision=config["trainer"].get("precision"),
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    return trainer.precision_plugin
