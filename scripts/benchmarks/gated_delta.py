"""Speed of the gated delta rule against length, and as a share of the matrix-product rate."""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import OPS
from scripts.benchmarks import measure

OP = OPS["gated_delta"]
BATCH = 2
LENGTHS = (1024, 4096, 16384, 65536)
SAMPLE = 16384  # tokens a sequence in one timing, so that short lengths are as warm as long ones
AGAINST_NAIVE = 1024  # tokens; the naive loop takes seconds beyond
PASSES = {"forward": 1, "forward+backward": 3}  # matrix products of each, in forwards


def _call(function: Callable[..., Any], inputs: dict[str, Tensor], passes: str) -> None:
    if passes == "forward":
        with torch.no_grad():
            function(**inputs)
        return
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = function(**leaves)
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def _repeats(length: int) -> int:
    """Calls in one timing."""
    return max(1, SAMPLE // length)


def _calls(
    function: Callable[..., Any], length: int, repeats: int, generator: torch.Generator
) -> dict[str, Callable[[], None]]:
    inputs = OP.inputs(generator, BATCH, length)

    def repeated(passes: str) -> Callable[[], None]:
        def call() -> None:
            for _ in range(repeats):
                _call(function, inputs, passes)

        return call

    return {passes: repeated(passes) for passes in PASSES}


def _rows(
    times: dict[Any, list[float]], lengths: tuple[int, ...], rate: float
) -> list[dict[str, Any]]:
    flops = OP.flops(OP.inputs(torch.Generator(), BATCH, 64)) / (64 * BATCH)

    def cost_of(length: int, passes: str) -> float:
        return statistics.median(times[passes, length]) / (BATCH * length * _repeats(length))

    rows = []
    for length in lengths:
        for passes, forwards in PASSES.items():
            cost = cost_of(length, passes)
            rows.append(
                {
                    "length": length,
                    "passes": passes,
                    "tokens_per_second": 1 / cost,
                    "share_of_product_rate": flops * forwards / cost / rate,
                    "cost_relative_to_shortest": cost / cost_of(lengths[0], passes),
                    "spread": measure.spread(times[passes, length]),
                }
            )
    return rows


def _speed_up(generator: torch.Generator) -> dict[str, float]:
    """How many times faster than the naive loop, by pass."""
    calls = {
        (form, passes): call
        for form, function in (("naive", OP.naive), ("chunk", OP.forms["chunk"]))
        for passes, call in _calls(function, AGAINST_NAIVE, 1, generator).items()
    }
    medians = {key: statistics.median(x) for key, x in measure.interleaved(calls, 3).items()}
    return {passes: medians["naive", passes] / medians["chunk", passes] for passes in PASSES}


def run(arguments: list[str]) -> None:
    """Parse the benchmark's own options, measure, print, and write rows if asked."""
    parser = argparse.ArgumentParser(prog="bench.py gated_delta", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two lengths, three rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    options = parser.parse_args(arguments)
    lengths, rounds = (LENGTHS[:2], 3) if options.quick else (LENGTHS, 9)

    generator = torch.Generator().manual_seed(0)
    product, product_flops = measure.matrix_product()
    calls: dict[Any, Callable[[], object]] = {"product": product}
    for length in lengths:
        for passes, call in _calls(OP.forms["chunk"], length, _repeats(length), generator).items():
            calls[passes, length] = call
    times = measure.interleaved(calls, rounds)
    rate = product_flops / statistics.median(times["product"])
    rows, speed_up = _rows(times, lengths, rate), _speed_up(generator)

    measure.print_provenance()
    print(f"matrix product, 2048 x 2048 in fp32: {rate / 1e9:.0f} GFLOP/s (median of {rounds})")
    print(f"gated delta rule, batch {BATCH}, 4 heads of 64 x 64, fp32, medians of {rounds} rounds:")
    print(measure.table([_text(row) for row in rows]))
    for passes, ratio in speed_up.items():
        print(f"{passes}: {ratio:.0f} times as fast as naive at length {AGAINST_NAIVE}")
    if options.json:
        facts = {"product_gflops": rate / 1e9, "speed_up": speed_up}
        measure.save(options.json, rows, facts)


def _text(row: dict[str, Any]) -> dict[str, str]:
    return {
        "length": str(row["length"]),
        "passes": row["passes"],
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "of product rate": f"{row['share_of_product_rate']:.1%}",
        "cost/token": f"{row['cost_relative_to_shortest']:.2f}x",
        "spread": f"{row['spread']:.0%}",
    }
