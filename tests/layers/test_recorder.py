"""The slot in which layers find who listens."""

import threading

import pytest

from mneme.layers.parts.recorder import Slot


def test_the_innermost_listener_hears_and_the_outer_one_is_back_afterwards():
    slot: Slot[str] = Slot("test")
    assert slot.get() is None
    with slot.holding("outer"):
        for inner in ("inner", None):
            with slot.holding(inner):
                assert slot.get() == inner
            assert slot.get() == "outer"
    assert slot.get() is None


def test_an_error_within_ends_the_listening():
    slot: Slot[str] = Slot("test")
    with pytest.raises(ZeroDivisionError), slot.holding("here"):
        1 / 0  # noqa: B018
    assert slot.get() is None


def test_other_slots_and_threads_hear_nothing():
    slot: Slot[str] = Slot("test")
    other: Slot[str] = Slot("test")
    heard = []
    with slot.holding("here"):
        thread = threading.Thread(target=lambda: heard.append(slot.get()))
        thread.start()
        thread.join()
        assert heard == [None]
        assert other.get() is None
