"""A page that shows a text with each token coloured by a value, and curves over position.

One file that needs nothing else: no scripts, fonts or pictures from elsewhere. Colours follow the
reader's light or dark setting.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --faint: #6a6a6a; --rule: #ddd;
  --hot: 235 104 52; --line: #2a78d6 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #eee; --faint: #a0a0a0; --rule: #3a3d42; --hot: 200 80 30;
    --line: #6ba6ee } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2.5rem } p { color: var(--faint) }
.text { font: 14px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--rule); border-radius: 4px; padding: .8rem; max-height: 32rem;
  overflow-y: auto }
.t, .scale span { background: rgb(var(--hot) / calc(.85 * var(--s))); unicode-bidi: isolate }
.t { border-radius: 2px }
.scale span { color: var(--ink); padding: .2rem .7rem }
svg { width: 100%; height: auto; margin-top: 1rem; font: 12px system-ui, sans-serif }
svg text { fill: var(--faint) } svg .name { fill: var(--ink) }
svg path { fill: none; stroke: var(--rule) }
svg polyline { fill: none; stroke: var(--line) } svg circle { fill: var(--line) }
"""

# Control characters have pictures; a line break shows itself and breaks the line.
_VISIBLE = {i: chr(0x2400 + i) for i in range(32) if chr(i) != "\t"} | {127: "␡", 10: "↵\n"}

STEPS = 5  # colours that the scale shows
TAIL = 0.01  # share of the values at either end that get the end's colour: one would hide the rest
LEFT, WIDTH, HEIGHT, GAP = 70, 830, 60, 30  # of a curve, in the picture's own units


class Token(NamedTuple):
    """How a token is shown: in the text, and on one line by itself."""

    text: str
    label: str


@dataclass(frozen=True)
class Section:
    """One colouring of the text.

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


def document(title: str, body: str) -> str:
    """A page in the style of this module, around a body of HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


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
    """Where the colours begin and end."""
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
    """Lines through neighbouring values; a dot for a value without neighbours."""
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
