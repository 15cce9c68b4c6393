"""Recall tasks: synthetic sequences that ask for what they showed earlier."""

from tasks.recall.base import RecallTask
from tasks.recall.mixture import RecallMixture
from tasks.recall.mqar import MQAR, make_mqar, solve_mqar

__all__ = ["MQAR", "RecallMixture", "RecallTask", "make_mqar", "solve_mqar"]
