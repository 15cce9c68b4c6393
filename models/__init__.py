"""Models: a residual stack of layers, its training module, and what they cost."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mneme.models.lightning_module import SequenceModule

if __name__ != "mneme.models":  # under two names, it would be two packages
    raise ImportError("import mneme.models, not models")


from mneme.models.budget import Budget, budget
from mneme.models.generation import generate
from mneme.models.language_model import LanguageModel
from mneme.models.optim import make_optimizer
from mneme.models.schedules import WSD, Constant, Cosine, Schedule


def __getattr__(name: str) -> Any:
    """`SequenceModule` when it is asked for: importing Lightning takes seconds."""
    if name == "SequenceModule":
        from mneme.models.lightning_module import SequenceModule

        return SequenceModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
