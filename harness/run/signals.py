"""Ctrl-C and SIGTERM: answered within a second, and obeyed where nothing is lost.

A program listens from its first line on (`listen`): this module imports no other, as torch alone
takes seconds. Until the program has begun, a signal ends it there and then; after that it raises
`Interrupted` in the main thread (`interruptible`); and while a run trains it waits for the end of
the step (`defer`). A second Ctrl-C ends the program at once, whatever it is doing.

Python runs handlers of signals between two operations of the main thread only, and a backward pass
is one operation. So a thread of its own reads, from a pipe that is written to by the system's
handler, which signals have come; it answers, and it ends the program if that is what was asked.
"""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 0.5  # seconds that the main thread has to react before the watching thread does
_SHOW_CURSOR = b"\x1b[?25h"  # which progress bars hide


class Interrupted(BaseException):
    """The program was asked to stop by a signal; a run has saved itself.

    Not an Exception, so that it also ends the sweep that a run belongs to.

    Attributes:
        number: of the signal.
        exit_status: of the process: 130 for Ctrl-C, as shells expect. For SIGTERM 0 if there is a
            run to go on with (its sender expects a clean end), else 143.
    """

    def __init__(self, number: int, step: int = 0, run: Path | None = None) -> None:
        said = f"stopped by {signal.Signals(number).name}"
        if run is not None:
            sweep = (run.parent / "sweep.json").is_file()  # which goes on with its other jobs too
            place = run.parent if sweep else run
            # Not above: signals are listened to before anything slow is imported.
            from mneme.harness.run.provenance import program

            command = shlex.join([*program("train.py"), f"resume={place}"])
            said += f"; {step} steps are saved. Continue with: {command}"
        super().__init__(said)
        self.number = number
        self.exit_status = 130 if number == signal.SIGINT else 143 if run is None else 0


class _Listener:
    """What has been received and what is to be done about it."""

    def __init__(self) -> None:
        self.received: int | None = None  # the first signal
        self.reacted = threading.Event()  # the main thread has seen it
        self.raises = False
        self.deferred: Callable[[], str] | None = None  # what it waits for
        self.last_words: Callable[[int], Interrupted] = Interrupted
        self.previous: dict[int, Any] = {}
        self.pipe: tuple[int, int] | None = None

    def start(self) -> None:
        """Takes over the signals; only the main thread can."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self.pipe = (reading, writing)
        self.received = None
        self.reacted.clear()
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        self.previous = {number: signal.signal(number, self._receive) for number in _NUMBERS}
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def stop(self) -> None:
        """Gives them back."""
        assert self.pipe is not None
        signal.set_wakeup_fd(-1)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        os.close(self.pipe[1])  # upon which the watching thread closes the other end
        self.pipe = None

    def _receive(self, number: int, frame: object) -> None:
        """In the main thread."""
        if self.received is not None:
            return
        self.received = number
        self.reacted.set()
        if self.deferred is None:
            if self.raises:
                raise Interrupted(number)
            self._exit(number)

    def _watch(self, pipe: int) -> None:
        """In a thread of its own; ends with the pipe."""
        came: list[int] = []
        while data := os.read(pipe, 64):
            for number in data:
                if number not in _NUMBERS or signal.getsignal(number) != self._receive:
                    continue  # not ours, or not now
                came.append(number)
                if len(came) == 1:
                    self._answer(number)
                elif number == signal.SIGINT and came.count(number) > 1:
                    self._exit(number)
        os.close(pipe)

    def _answer(self, number: int) -> None:
        reacted = self.reacted.wait(_PATIENCE)
        if (waits_for := self.deferred) is not None:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                return  # the first of the processes that train together says it
            again = "again to stop at once" if number == signal.SIGINT else "Ctrl-C stops at once"
            print(f"\nstopping after this {waits_for()}; {again}", file=sys.stderr, flush=True)
        elif not reacted:  # it is in a call that does not return
            self._exit(number)

    def _exit(self, number: int) -> None:
        """Ends the process here, from whatever thread."""
        status, said = Interrupted(number).exit_status, str(Interrupted(number))
        try:
            words = self.last_words(number)
            status, said = words.exit_status, str(words)
        finally:
            cursor = _SHOW_CURSOR if os.isatty(2) else b""
            os.write(2, cursor + f"\n{said}\n".encode())
            os._exit(status)


_listener = _Listener()


def listen() -> None:
    """Takes over Ctrl-C and SIGTERM for good; the first thing that a program does."""
    if _listener.pipe is None:
        _listener.start()


@contextmanager
def interruptible(last_words: Callable[[int], Interrupted] | None = None) -> Iterator[None]:
    """Lets a signal raise `Interrupted` in the main thread.

    Where no program listens, as in a notebook, the signals are taken over meanwhile. In another
    thread than the main one, this does nothing.

    Args:
        last_words: called, in any thread, if the process ends here without unwinding; saves what
            can be, and says so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = _listener.pipe is None
    if own:
        _listener.start()
    before = _listener.raises, _listener.last_words
    _listener.raises, _listener.last_words = True, last_words or _listener.last_words
    try:
        yield
    finally:
        _listener.raises, _listener.last_words = before
        if own:
            _listener.stop()


def defer(waits_for: Callable[[], str]) -> None:
    """From here on a signal is only noted, see `received`; until `undefer`.

    Args:
        waits_for: what is to be completed before the program ends, for the answer: "step".
    """
    _listener.deferred = waits_for


def undefer(*, obey: bool) -> None:
    """Ends `defer`; with `obey`, a signal that was noted raises `Interrupted` now."""
    _listener.deferred = None
    if obey and _listener.received is not None:
        raise Interrupted(_listener.received)


def received() -> int | None:
    """The first signal that came; None if none did."""
    return _listener.received


def note(number: int) -> None:
    """Takes a signal as received, as another process was asked to stop: more are not obeyed."""
    if _listener.received is None:
        _listener.received = number


def _forget() -> None:
    """A forked process does not write into its parent's pipe."""
    if _listener.pipe is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
