"""Recall tasks: synthetic sequences that ask for what they showed earlier."""

from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.forgetting import ForgettingMQAR, make_forgetting_mqar
from mneme.tasks.recall.mixture import RecallMixture
from mneme.tasks.recall.mqar import MQAR, make_mqar, solve_mqar
from mneme.tasks.recall.needle import Needle, make_needle, solve_needle

__all__ = [
    "MQAR",
    "ForgettingMQAR",
    "Needle",
    "RecallMixture",
    "RecallTask",
    "make_forgetting_mqar",
    "make_mqar",
    "make_needle",
    "solve_mqar",
    "solve_needle",
]
