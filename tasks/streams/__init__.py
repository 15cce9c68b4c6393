"""Streams of labelled features: what a memory is trained on class by class."""

from mneme.tasks.streams.class_incremental import ClassIncremental, Labelled

__all__ = ["ClassIncremental", "Labelled"]
