"""A page that shows a text with each token colored by a value, and curves over position."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import NamedTuple

from mneme.harness.evaluate.page import document

# Control characters have pictures; a line break shows itself and breaks the line.
_VISIBLE = {i: chr(0x2400 + i) for i in range(32) if chr(i) != "\t"} | {127: "␡", 10: "↵\n"}

STEPS = 5  # colors that the scale shows
TAIL = 0.01  # share of the values at either end that get the end's color: one would hide the rest
LEFT, WIDTH, HEIGHT, GAP = 70, 830, 60, 30  # of a curve, in the picture's own units


class Token(NamedTuple):
    """How a token is shown: in the text, and on one line by itself."""

    text: str
    label: str


@dataclass(frozen=True)
class Section:
    """One coloring of the text.

    Attributes:
        title: whose values they are.
        note: a line below it.
        values: one per token.
        curves: name to a value per token, NaN where there is none.
    """

    title: str
    note: str
    values: Sequence[float]
    curves: dict[str, Sequence[float]]


def page(title: str, tokens: Sequence[Token], sections: Sequence[Section]) -> str:
    """The page, complete."""
    return document(title, "".join(_section(section, tokens) for section in sections))


def _section(section: Section, tokens: Sequence[Token]) -> str:
    low, high = _range(section.values)
    spans = "".join(
        f'<span class="t" style="--s:{_share(value, low, high):.3f}" '
        f'title="{position}: {escape(token.label)}, {value:.4g}">{_text(token)}</span>'
        for position, (token, value) in enumerate(zip(tokens, section.values, strict=True))
    )
    return (
        f"<section><h2>{escape(section.title)}</h2><p>{escape(section.note)}</p>\n"
        f'<p class="scale">surprise {_scale(low, high)}</p>\n'
        f'<div class="text">{spans}</div>\n{_curves(section.curves)}</section>\n'
    )


def _text(token: Token) -> str:
    return escape(token.text.translate(_VISIBLE))


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Where the colors begin and end."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[math.floor(TAIL * last)], ordered[math.ceil((1 - TAIL) * last)]


def _share(value: float, low: float, high: float) -> float:
    """How far a value is from `low` to `high`, from 0 to 1."""
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0


def _scale(low: float, high: float) -> str:
    shares = [step / (STEPS - 1) for step in range(STEPS)]
    labels = [f"{low + share * (high - low):.3g}" for share in shares]
    labels[0], labels[-1] = f"{labels[0]} or less", f"{labels[-1]} or more"
    return "".join(
        f'<span style="--s:{share:g}">{label}</span>'
        for share, label in zip(shares, labels, strict=True)
    )


def _curves(curves: dict[str, Sequence[float]]) -> str:
    """A panel for each curve, one above the other, over the same positions."""
    known = {name: ys for name, ys in curves.items() if not all(map(math.isnan, ys))}
    height = len(known) * (HEIGHT + GAP) + GAP
    panels = (_panel(*curve, row * (HEIGHT + GAP)) for row, curve in enumerate(known.items()))
    last = max(map(len, curves.values())) - 1
    return (
        f'<svg viewBox="0 0 {LEFT + WIDTH + 10} {height}" role="img">{"".join(panels)}'
        f'<text x="{LEFT}" y="{height - 10}">position 0</text>'
        f'<text x="{LEFT + WIDTH}" y="{height - 10}" text-anchor="end">{last}</text></svg>\n'
    )


def _panel(name: str, values: Sequence[float], top: int) -> str:
    known = [value for value in values if not math.isnan(value)]
    low, high = min(known), max(known)
    top, bottom = top + GAP - 8, top + GAP - 8 + HEIGHT
    return (
        f'<text class="name" x="{LEFT}" y="{top - 6}">{escape(name)}</text>'
        f'<path d="M{LEFT} {top}V{bottom}H{LEFT + WIDTH}"/>'
        f'<text x="{LEFT - 6}" y="{top + 8}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end">{low:.3g}</text>'
        + "".join(_marks(values, low, high, bottom))
    )


def _marks(values: Sequence[float], low: float, high: float, bottom: int) -> Iterator[str]:
    """Lines through neighboring values; a dot for a value without neighbors."""
    across = WIDTH / max(1, len(values) - 1)
    for missing, run in groupby(enumerate(values), key=lambda item: math.isnan(item[1])):
        if missing:
            continue
        points = [
            (LEFT + x * across, bottom - HEIGHT * _share(value, low, high)) for x, value in run
        ]
        if len(points) == 1:
            yield f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2"/>'
        else:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            yield f'<polyline points="{line}"/>'
