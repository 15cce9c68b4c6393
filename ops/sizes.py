"""Widths that are given as ratios."""

import math


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
