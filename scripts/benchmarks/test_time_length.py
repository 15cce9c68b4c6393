"""Cost and memory of a Titans memory against length, and the cost of decoding against position."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from mneme.layers import TestTimeMemory, detach_state, state_tensors
from scripts.benchmarks import measure
from scripts.benchmarks.peak import peak_memory

BATCH, WIDTH, HEADS, CHUNK = 1, 128, 2, 64
LENGTHS = (1024, 4096, 16384, 65536)
SAMPLE = 16384  # tokens in one timing, so that short lengths are as warm as long ones
KINDS = ("kept", "recomputed")


def step(kind: str, length: int) -> Callable[[], None]:
    """A forward and backward pass over sequences of a length, `SAMPLE` tokens or one sequence."""
    torch.manual_seed(0)
    layer = TestTimeMemory(WIDTH, heads=HEADS, chunk_size=CHUNK, recompute=kind == "recomputed")
    x = torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(0))

    def call() -> None:
        layer.zero_grad()
        layer(x).y.square().sum().backward()

    return call


def repeated(kind: str, length: int) -> Callable[[], None]:
    """As `step`, as often as makes a timing long enough."""
    call, times = step(kind, length), max(1, SAMPLE // length)

    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def decoding(length: int) -> Callable[[], None]:
    """64 tokens, one at a time, after a sequence of a length."""
    torch.manual_seed(0)
    layer = TestTimeMemory(WIDTH, heads=HEADS, chunk_size=CHUNK).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        state = detach_state(layer(torch.randn(1, length, WIDTH, generator=generator)).state)
    tokens = torch.randn(1, 64, WIDTH, generator=generator).split(1, dim=1)

    @torch.no_grad()
    def calls() -> None:
        inner = state
        for token in tokens:
            inner = layer(token, inner).state

    print(f"state after {length} tokens: {sum(t.numel() for t in state_tensors(state)):,} scalars")
    return calls


def run(arguments: list[str]) -> None:
    """Parse the benchmark's own options, measure, print, and write rows with `--json`."""
    options = measure.parser("test_time_length", __doc__, "two lengths, three rounds").parse_args(
        arguments
    )
    lengths, rounds = (LENGTHS[:2], 3) if options.quick else (LENGTHS, 5)
    training = {(kind, length): repeated(kind, length) for length in lengths for kind in KINDS}
    decode = {("decode", length): decoding(length) for length in lengths}
    times = measure.interleaved({**training, **decode}, rounds)
    rows = [_row(kind, length, times) for kind in (*KINDS, "decode") for length in lengths]
    measure.print_provenance()
    print(
        f"batch {BATCH}, width {WIDTH}, {HEADS} heads, chunks of {CHUNK}, fp32; "
        f"forward and backward, or decoding; medians of {rounds} rounds:"
    )
    print(measure.table([_text(row, rows) for row in rows]))
    if options.json:
        measure.save(options.json, rows, {})


def _row(kind: str, length: int, times: dict[Any, list[float]]) -> dict[str, Any]:
    seconds = times[kind, length]
    tokens = 64 if kind == "decode" else max(SAMPLE, length)
    return {
        "kind": kind,
        "length": length,
        "microseconds_per_token": 1e6 * statistics.median(seconds) / tokens,
        "peak_mib": None if kind == "decode" else peak_memory(__name__, kind, length),
        "spread": measure.spread(seconds),
    }


def _text(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    first = next(r for r in rows if r["kind"] == row["kind"])
    peak = row["peak_mib"]
    return {
        "kind": row["kind"],
        "length": f"{row['length']:,}",
        "us/token": f"{row['microseconds_per_token']:.1f}",
        "relative": f"{row['microseconds_per_token'] / first['microseconds_per_token']:.2f}x",
        "peak MiB": "" if peak is None else f"{peak:.0f}",
        "KiB/token": "" if peak is None else f"{1024 * peak / row['length']:.1f}",
        "spread": f"{row['spread']:.0%}",
    }
