"""Checks of choices, with one message that names what, where and what instead."""

from collections.abc import Collection


def require_one_of(allowed: Collection[object], **options: object) -> None:
    """Raises ValueError for the first option that is none of the allowed, by its name."""
    for name, value in options.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
