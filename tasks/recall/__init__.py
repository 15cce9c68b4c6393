"""Recall tasks: synthetic sequences that ask for what they showed earlier."""

from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.copying import Copying
from mneme.tasks.recall.forgetting import ForgettingMQAR, make_forgetting_mqar
from mneme.tasks.recall.lookup import CompositionalMQAR, Induction, PhoneBook, SetDisjointness
from mneme.tasks.recall.mixture import RecallMixture
from mneme.tasks.recall.mqar import MQAR, make_mqar, solve_mqar
from mneme.tasks.recall.needle import Needle, make_needle, solve_needle
from mneme.tasks.recall.read_twice import ReadTwice

__all__ = [
    "MQAR",
    "CompositionalMQAR",
    "Copying",
    "ForgettingMQAR",
    "Induction",
    "Needle",
    "PhoneBook",
    "ReadTwice",
    "RecallMixture",
    "RecallTask",
    "SetDisjointness",
    "make_forgetting_mqar",
    "make_mqar",
    "make_needle",
    "solve_mqar",
    "solve_needle",
]
