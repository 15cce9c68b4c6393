"""What options are checked and widths are computed with, in ops and in layers."""

import math
from typing import Any, get_args


def require_choice(choices: Any, **options: object) -> None:
    """Raises ValueError for the first option that is none of the choices, by its name.

    Args:
        choices: a `Literal` of all that is allowed, or a collection of it.
        **options: name to value.
    """
    allowed = get_args(choices) or tuple(choices)
    for name, value in options.items():
        if value not in allowed:
            known = ", ".join(map(repr, allowed))
            raise ValueError(f"{name} must be one of {known}; got {value!r}")


def scaled_width(width: int, ratio: float, *, multiple_of: int | None = None) -> int:
    """`ratio * width` as a whole number, F for a ratio of F / width whatever rounding makes of it.

    25 / 11 * 11 is more than 25 in floating point, and 15 / 11 * 11 less than 15.

    Args:
        width: what the ratio is of.
        ratio: what is wanted over it.
        multiple_of: round up to a multiple of this; by default the fraction is cut off.
    """
    size = round(ratio * width, 6)
    return int(size) if multiple_of is None else math.ceil(size / multiple_of) * multiple_of
