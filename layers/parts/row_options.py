"""How the optimizer writes parameters of many rows, of which a step reads a few."""

from dataclasses import dataclass
from typing import Literal

from mneme.layers.protocol import ParamOptions, require_at_least, require_choice

Update = Literal["lazy", "rowwise", "dense"]


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How the optimizer writes rows.

    Attributes:
        update: what a step does. "lazy" is Adam for the rows that the step has read, "rowwise" is
            Adagrad for them with one accumulator a row; both leave other rows and their state
            alone, and gradients are sparse. A plain optimizer of torch, such as AdamW, refuses
            sparse gradients: make it with `mneme.models.make_optimizer`, or take "dense", which
            gives the rows to the model's optimizer like any parameter, with a dense gradient.
        lr_multiplier: times the model's learning rate, before its schedule.
        weight_decay: of the rows that a step writes.

    Raises:
        ValueError: an option is out of range.
    """

    update: Update = "lazy"
    lr_multiplier: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for options out of range."""
        require_choice(Update, update=self.update)
        require_at_least(0, weight_decay=self.weight_decay)
        if self.lr_multiplier <= 0:
            raise ValueError(f"lr_multiplier must be above 0, got {self.lr_multiplier}")

    def param_options(self, clip_group: str) -> ParamOptions:
        """These options as those of a parameter.

        Args:
            clip_group: whose gradients are clipped together.
        """
        return ParamOptions(
            update=self.update,
            lr_multiplier=self.lr_multiplier,
            weight_decay=self.weight_decay,
            clip_group=clip_group,
        )
