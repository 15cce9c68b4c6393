"""Models: a residual stack of layers, its training module, and what they cost."""

from models.budget import Budget, budget
from models.generation import generate
from models.language_model import LanguageModel
from models.lightning_module import SequenceModule
from models.parameter_groups import make_optimizer
from models.schedules import WSD, Constant, Cosine, Schedule
