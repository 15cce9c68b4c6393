"""How evenly a model's layers use the rows of their tables: figures, and a picture of each."""

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mneme.harness.evaluate.page import document
from mneme.harness.run.run_directory import finite, write_atomically
from mneme.layers import Usage

LEFT, WIDTH, HEIGHT, TOP = 70, 560, 220, 30  # of a curve, in the picture's own units
POINTS = 200  # of a curve
DECADES = 6  # below the largest share, which the picture shows


def print_usage(usage: Mapping[str, Usage]) -> None:
    """A table with a column per layer."""
    table = Table(title="use of the rows of tables", title_justify="left")
    table.add_column("")
    for layer in usage:
        table.add_column(layer, justify="right", overflow="fold")
    figures = [found.metrics() for found in usage.values()]
    for name in figures[0]:
        table.add_row(name, *(_number(row[name]) for row in figures))
    Console().print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def write_usage(folder: Path, usage: Mapping[str, Usage], title: str) -> list[Path]:
    """Writes usage.json and usage.html, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {layer: found.metrics() for layer, found in usage.items()}
    body = "".join(_section(layer, found) for layer, found in usage.items())
    files = {
        "usage.json": json.dumps(finite(figures), indent=2) + "\n",
        "usage.html": document(title, body),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def _section(layer: str, usage: Usage) -> str:
    figures = ", ".join(f"{name} {value:,.4g}" for name, value in usage.metrics().items())
    return f"<section><h2>{escape(layer)}</h2><p>{escape(figures)}</p>\n{_curve(usage)}</section>\n"


def _curve(usage: Usage) -> str:
    """Each row's weight against the mean, the largest first, on logarithmic axes; dashed: even."""
    shares = (usage.curve() * len(usage.curve())).tolist()
    size, largest = len(shares), max(shares[0], 1.0)

    def at(rank: int, share: float) -> str:
        across = math.log(rank) / math.log(size) if size > 1 else 0.0
        down = min(1.0, math.log10(largest / share) / DECADES)
        return f"{LEFT + WIDTH * across:.1f},{TOP + HEIGHT * down:.1f}"

    ranks = sorted({round(size ** (i / (POINTS - 1))) for i in range(POINTS)})
    line = " ".join(at(rank, shares[rank - 1]) for rank in ranks if shares[rank - 1] > 0)
    even = f"{at(1, 1.0)} {at(size, 1.0)}"
    bottom = TOP + HEIGHT
    return (
        f'<svg viewBox="0 0 {LEFT + WIDTH + 10} {bottom + 30}" role="img">'
        f'<text class="name" x="{LEFT}" y="{TOP - 8}">weight of a row over the mean</text>'
        f'<path d="M{LEFT} {TOP}V{bottom}H{LEFT + WIDTH}"/>'
        f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{largest:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end">{largest / 10**DECADES:.3g}</text>'
        f'<polyline points="{line}"/><polyline stroke-dasharray="4 4" points="{even}"/>'
        f'<text x="{LEFT}" y="{bottom + 20}">row 1, the most used</text>'
        f'<text x="{LEFT + WIDTH}" y="{bottom + 20}" text-anchor="end">{size:,}</text></svg>\n'
    )
