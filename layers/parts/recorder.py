"""How a layer deep inside a model finds whoever is listening to it, if anybody is."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Slot(Generic[T]):
    """Holds what listens inside a block of code, in the thread or task that runs the block.

    Args:
        name: for the messages of `ContextVar`. A slot is made once, at the top of a module.
    """

    def __init__(self, name: str) -> None:
        self._active: ContextVar[T | None] = ContextVar(name, default=None)

    def get(self) -> T | None:
        """What listens now: that of the innermost block; None where nothing does."""
        return self._active.get()

    @contextmanager
    def holding(self, listener: T | None) -> Iterator[None]:
        """Puts a listener, or with None nothing, in the place of what listens outside."""
        token = self._active.set(listener)
        try:
            yield
        finally:
            self._active.reset(token)
