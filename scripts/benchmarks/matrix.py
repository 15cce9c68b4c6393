"""Speed of matrix memories against length, as a share of the matrix-product rate.

Each op is timed forward, and forward and backward, on the same sizes; shares count the operations
that its README states, three times forward for both passes. The layers are a mixture of memories
and the memory that it mixes.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mneme.layers import GatedDeltaNet, Layer, MixtureOfMemories
from mneme.ops import OPS
from scripts.benchmarks import measure

CASES = {  # op and regime
    "scalar_decay": ("scalar_decay", "typical"),
    "scalar_decay, none": ("scalar_decay", "no_decay"),
    "diagonal_decay": ("diagonal_decay", "typical"),
    "delta": ("delta", "typical"),
    "gated_delta": ("gated_delta", "typical"),
}
BATCH, LENGTH = 2, 4096
LENGTHS = (1024, 4096, 16384, 65536)
SAMPLE = 16384  # tokens a sequence in one timing, so that short lengths are as warm as long ones
AGAINST_NAIVE = 1024  # tokens; the naive loop takes seconds beyond
PASSES = {"forward": 1, "forward+backward": 3}  # matrix products of each, in forwards
WIDTH, HEADS = 256, 4  # of the layers


def _call(function: Callable[..., Any], inputs: dict[str, Any], passes: str) -> None:
    if passes == "forward":
        with torch.no_grad():
            function(**inputs)
        return
    leaves = {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }
    outputs = function(**leaves)
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def _inputs(case: str, length: int) -> dict[str, Any]:
    op, regime = CASES[case]
    generator = torch.Generator().manual_seed(0)
    return OPS[op].inputs(generator, BATCH, length, regime=regime)


def _repeats(length: int) -> int:
    """Calls in one timing."""
    return max(1, SAMPLE // length)


def _timed(case: str, form: str, length: int, passes: str, repeats: int) -> Callable[[], None]:
    op, inputs = OPS[CASES[case][0]], _inputs(case, length)
    function = op.naive if form == "naive" else op.forms[form]

    def call() -> None:
        for _ in range(repeats):
            _call(function, inputs, passes)

    return call


def _row(
    key: tuple[str, int, str], times: dict[Any, list[float]], naive: list[float], rate: float
) -> dict[str, Any]:
    """One op, length and kind of pass; `naive` are times of the loop at `AGAINST_NAIVE` tokens."""
    case, length, passes = key
    flops = OPS[CASES[case][0]].flops(_inputs(case, 64)) / (64 * BATCH)

    def cost(tokens: int) -> float:
        median = statistics.median(times[case, tokens, passes])
        return median / (BATCH * tokens * _repeats(tokens))

    shortest = min(tokens for _, tokens, _ in times)
    return {
        "op": case,
        "length": length,
        "passes": passes,
        "tokens_per_second": 1 / cost(length),
        "share_of_product_rate": flops * PASSES[passes] / cost(length) / rate,
        "cost_relative_to_shortest": cost(length) / cost(shortest),
        "times_naive": statistics.median(naive) / (BATCH * AGAINST_NAIVE) / cost(length),
        "spread": measure.spread(times[key]),
    }


def _layer_step(layer: Layer) -> Callable[[], None]:
    """A forward and backward pass of a layer."""
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))

    def call() -> None:
        layer.zero_grad()
        layer(x).y.square().sum().backward()

    return call


def _layers() -> dict[str, Callable[[], None]]:
    """A memory, and a mixture of four of them with a shared one, two for each token."""
    torch.manual_seed(0)
    memory = partial(GatedDeltaNet, heads=HEADS)
    return {"base": _layer_step(memory(WIDTH)), "mixture": _layer_step(_mixture(memory))}


def _mixture(memory: Callable[[int], Layer]) -> Layer:
    return MixtureOfMemories(WIDTH, memory=memory, memories=4, top_k=2, shared=True)


def _measure(
    cases: list[str], lengths: tuple[int, ...], rounds: int
) -> tuple[list[dict[str, Any]], float]:
    """Rows for the ops, and the rate of a large product between them."""
    product, product_flops = measure.matrix_product()
    rows = []
    for case in cases:
        calls: dict[Any, Callable[[], object]] = {"product": product}
        for passes in PASSES:
            for n in lengths:
                calls[case, n, passes] = _timed(case, "chunk", n, passes, _repeats(n))
        times = measure.interleaved(calls, rounds)
        rate = product_flops / statistics.median(times.pop("product"))
        loops = {passes: _timed(case, "naive", AGAINST_NAIVE, passes, 1) for passes in PASSES}
        naive = measure.interleaved(loops, 3)
        rows += [_row(key, times, naive[key[2]], rate) for key in times]
    return rows, rate


def run(arguments: list[str]) -> None:
    """Parse the benchmark's own options, measure, print, and write rows with `--json`."""
    parser = measure.parser("matrix", __doc__, "one length, three rounds")
    parser.add_argument("--op", choices=sorted({op for op, _ in CASES.values()}), help="only this")
    options = parser.parse_args(arguments)
    lengths, rounds = ((LENGTH,), 3) if options.quick else (LENGTHS, 9)
    cases = [case for case, (op, _) in CASES.items() if options.op in (None, op)]

    rows, rate = _measure(cases, lengths, rounds)
    measure.print_provenance()
    print(f"matrix product, 2048 x 2048 in fp32: {rate / 1e9:.0f} GFLOP/s (median of {rounds})")
    print(f"batch {BATCH}, 4 heads of 64 x 64, fp32, medians of {rounds} rounds:")
    print(measure.table([_text(row) for row in rows]))
    if options.op is None:
        _print_layers(measure.interleaved(_layers(), rounds))
    if options.json:
        measure.save(options.json, rows, {"product_gflops": rate / 1e9})


def _print_layers(times: dict[str, list[float]]) -> None:
    base, mixture = (statistics.median(times[name]) for name in ("base", "mixture"))
    print(
        "MixtureOfMemories, 4 memories, 2 a token and a shared one, forward and backward: "
        f"{mixture:.3f} s at {LENGTH} tokens, {mixture / base:.2f} times its base "
        f"(spread {measure.spread(times['mixture']):.0%} and {measure.spread(times['base']):.0%})"
    )


def _text(row: dict[str, Any]) -> dict[str, str]:
    return {
        "op": row["op"],
        "length": str(row["length"]),
        "passes": row["passes"],
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "of product rate": f"{row['share_of_product_rate']:.1%}",
        "cost/token": f"{row['cost_relative_to_shortest']:.2f}x",
        "naive takes": f"{row['times_naive']:.0f}x",
        "spread": f"{row['spread']:.0%}",
    }
