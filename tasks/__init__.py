"""Tasks: what models are trained and measured on.

`Batch` and `Task` are the interface; recall tasks and facts are generators, text tasks read files.
A stream of features is no `Task`: it has no tokens. This package knows nothing of layers, models
or configuration.
"""

if __name__ != "mneme.tasks":  # under two names, it would be two packages
    raise ImportError("import mneme.tasks, not tasks")


from mneme.tasks.base import Batch, Task
from mneme.tasks.classification import Digits, ListOps
from mneme.tasks.facts import LibraryOptions, RareFacts, RoutingOptions, ZipfFacts
from mneme.tasks.mad import FuzzyRecall, InContextRecall, Memorization, SelectiveCopying
from mneme.tasks.path_star import PathStar, PathStarInWeights
from mneme.tasks.recall import (
    MQAR,
    CompositionalMQAR,
    Copying,
    ForgettingMQAR,
    Induction,
    Needle,
    PhoneBook,
    ReadTwice,
    RecallMixture,
    SetDisjointness,
)
from mneme.tasks.state_tracking import GroupWords, ModularArithmetic, Parity
from mneme.tasks.streams import ClassIncremental
from mneme.tasks.text import (
    ByteTokenizer,
    LocalFiles,
    SentencePieceTokenizer,
    StandardLibrary,
    Text,
)

__all__ = [
    "MQAR",
    "Batch",
    "ByteTokenizer",
    "ClassIncremental",
    "CompositionalMQAR",
    "Copying",
    "Digits",
    "ForgettingMQAR",
    "FuzzyRecall",
    "GroupWords",
    "InContextRecall",
    "Induction",
    "LibraryOptions",
    "ListOps",
    "LocalFiles",
    "Memorization",
    "ModularArithmetic",
    "Needle",
    "Parity",
    "PathStar",
    "PathStarInWeights",
    "PhoneBook",
    "RareFacts",
    "ReadTwice",
    "RecallMixture",
    "RoutingOptions",
    "SelectiveCopying",
    "SentencePieceTokenizer",
    "SetDisjointness",
    "StandardLibrary",
    "Task",
    "Text",
    "ZipfFacts",
]
