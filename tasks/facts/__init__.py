"""Facts to learn by heart: what a model's parameters can hold, rather than its state."""

from tasks.facts.arms import ArmMetrics
from tasks.facts.base import FactTask, Zipf
from tasks.facts.library import Library, LibraryOptions, ask_for, make_library, write
from tasks.facts.metrics import FactMetrics, Told
from tasks.facts.rare import RareFacts
from tasks.facts.routes import LibraryRoutes, RoutingOptions, topic_routes
from tasks.facts.words import Words
from tasks.facts.world import World, make_world, tell
from tasks.facts.zipf import ZipfFacts

__all__ = [
    "ArmMetrics",
    "FactMetrics",
    "FactTask",
    "Library",
    "LibraryOptions",
    "LibraryRoutes",
    "RareFacts",
    "RoutingOptions",
    "Told",
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
