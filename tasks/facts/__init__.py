"""Facts to learn by heart: what a model's parameters can hold, rather than its state."""

from tasks.facts.metrics import FactMetrics, Told
from tasks.facts.world import World, make_world, tell
from tasks.facts.zipf import ZipfFacts

__all__ = ["FactMetrics", "Told", "World", "ZipfFacts", "make_world", "tell"]
