"""The tasks of MAD (arXiv 2403.17844), without compression, which needs a decoder of its own."""

from mneme.tasks.mad.recall import (
    FuzzyRecall,
    InContextRecall,
    make_fuzzy_recall,
    make_in_context_recall,
    solve_fuzzy_recall,
)
from mneme.tasks.mad.storage import (
    Memorization,
    SelectiveCopying,
    make_memorization,
    make_selective_copying,
    memorized_values,
    solve_selective_copying,
)

__all__ = [
    "FuzzyRecall",
    "InContextRecall",
    "Memorization",
    "SelectiveCopying",
    "make_fuzzy_recall",
    "make_in_context_recall",
    "make_memorization",
    "make_selective_copying",
    "memorized_values",
    "solve_fuzzy_recall",
    "solve_selective_copying",
]
