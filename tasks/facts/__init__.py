"""Facts to learn by heart: what a model's parameters can hold, rather than its state."""

from mneme.tasks.facts.arms import ArmMetrics
from mneme.tasks.facts.base import FactTask, Zipf
from mneme.tasks.facts.library import Library, LibraryOptions, ask_for, make_library, write
from mneme.tasks.facts.metrics import Exposures, FactMetrics
from mneme.tasks.facts.rare import RareFacts
from mneme.tasks.facts.routes import LibraryRoutes, RoutingOptions, topic_routes
from mneme.tasks.facts.words import Words
from mneme.tasks.facts.world import World, make_world, tell
from mneme.tasks.facts.zipf import ZipfFacts

__all__ = [
    "ArmMetrics",
    "Exposures",
    "FactMetrics",
    "FactTask",
    "Library",
    "LibraryOptions",
    "LibraryRoutes",
    "RareFacts",
    "RoutingOptions",
    "Words",
    "World",
    "Zipf",
    "ZipfFacts",
    "ask_for",
    "make_library",
    "make_world",
    "tell",
    "topic_routes",
    "write",
]
