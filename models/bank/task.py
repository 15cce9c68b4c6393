"""A block that is being read, piece by piece, by as many threads as come to it."""

from concurrent.futures import Future
from threading import Lock, get_ident

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from mneme.models.bank.buffers import Buffers

PIECE = 2 * 2**20  # bytes: whole pages


class Task:
    """A block, and how far it has been read.

    Threads take pieces in order until none is left. Exactly one of them is told that the block is
    over, when no piece is being read any more: it has to set the result.

    Args:
        level: whose block it is.
        node: likewise.
        size: bytes to read.

    Attributes:
        level, node, size: likewise.
        block: it, in the end, or why it cannot be read.
        error: why no more of it is to be read.
    """

    def __init__(self, level: int, node: int, size: int) -> None:
        self.level, self.node, self.size = level, node, size
        self.block: Future[Tensor] = Future()
        self.error: BaseException | None = None
        self._data: np.ndarray | None = None
        self._begun, self._reading = 0, set[int]()  # bytes; threads
        self._over, self._lock = False, Lock()

    @property
    def pieces(self) -> int:
        """How many there are in all."""
        return -(-self.size // PIECE)

    def take(self, buffers: Buffers) -> tuple[int, UInt8[np.ndarray, " n"]] | None:
        """Where the next piece begins, and what it is to be read into; None if there is none.

        What was taken has to be given back, also when this fails.
        """
        with self._lock:
            if self._begun >= self.size or self.error is not None:
                return None
            self._reading.add(get_ident())
            if self._data is None:
                self._data = buffers.take(self.size)
            start = self._begun
            self._begun = min(start + PIECE, self.size)
            return start, self._data[start : self._begun]

    def give_back(self, error: BaseException | None) -> bool:
        """Ends this thread's piece, if it has one; whether the block is over.

        Args:
            error: why it could not be read, if so.
        """
        with self._lock:
            self._reading.discard(get_ident())
            self.error = self.error or error
            return self._end()

    def stop(self, error: BaseException) -> bool:
        """Lets no thread begin another piece; whether the block is over, by this."""
        with self._lock:
            self.error = self.error or error
            return self._end()

    def data(self) -> UInt8[np.ndarray, " n"]:
        """What was read, for the thread that ends the block; the task has it no more."""
        data, self._data = self._data, None
        assert data is not None, "a block that is over without an error was read"
        return data

    def _end(self) -> bool:
        left = self._begun < self.size and self.error is None
        if self._over or self._reading or left:
            return False
        self._over = True
        return True
