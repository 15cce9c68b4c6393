"""A task as Lightning's Trainer reads it."""

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from mneme.tasks.base import Batch, Task


class TaskData(LightningDataModule):
    """Hands a task's batches to a trainer, and the trainer's place in them to the task.

    Args:
        task: what is read.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def prepare_data(self) -> None:
        """Fills the task's caches."""
        self.task.prepare_data()

    def setup(self, stage: str) -> None:
        """Tells the task who reads it."""
        self.task.trainer = self.trainer
        self.task.setup(stage)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches without end, from where training stands."""
        return self.task.train_dataloader()

    def val_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the validation set."""
        return self.task.val_dataloader()

    def test_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the test set."""
        return self.task.test_dataloader()
