"""Streams of labeled features: what a memory is trained on class by class."""

from mneme.tasks.streams.class_incremental import ClassIncremental, Labeled

__all__ = ["ClassIncremental", "Labeled"]
