"""Speed and memory of a Titans memory against titans-pytorch, and as a share of the product rate.

Both are whole layers of the same sizes and parts: projections, a two-layer memory of four times the
width, momentum and forgetting; ours without its convolution and output gate, unless it says so.
titans-pytorch takes all gradients at the initial weights by default, decides decay and momentum
once per chunk and reads once per chunk, so it does less; with its batch_size equal to the chunk it
refreshes the weights every chunk, as ours does.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mneme.layers import Features, Readout, TestTimeMemory
from mneme.ops import OPS
from mneme.ops.test_time import Rule
from scripts.benchmarks import measure
from scripts.benchmarks.peak import peak_memory

BATCH, LENGTH, WIDTH, HEADS = 2, 1024, 256, 4
CHUNKS = (64, 16)
PEERS = (
    "ours",
    "ours, recomputed",
    "ours, bf16",
    "ours, all parts",
    "theirs",
    "theirs, refreshed",
    "theirs, refreshed, step 0.1",
)
PASSES = 3  # a forward and a backward pass, in products of a forward pass


def layer(peer: str, chunk: int) -> nn.Module:
    """One of `PEERS` with default initial weights."""
    torch.manual_seed(0)
    if peer == "ours, all parts":
        return TestTimeMemory(WIDTH, heads=HEADS, chunk_size=chunk)
    if peer.startswith("ours"):
        alone = Features(conv_size=1, silu=False)
        return TestTimeMemory(
            WIDTH,
            heads=HEADS,
            chunk_size=chunk,
            features=alone,
            readout=Readout(gate=False),
            recompute="recomputed" in peer,
        )
    from titans_pytorch import MemoryMLP, NeuralMemory  # type: ignore[import-untyped]

    options: dict[str, Any] = {"default_step_transform_max_lr": 0.1} if "step" in peer else {}
    return NeuralMemory(
        dim=WIDTH,
        dim_head=WIDTH // HEADS,
        heads=HEADS,
        chunk_size=chunk,
        batch_size=chunk if "refreshed" in peer else None,
        model=MemoryMLP(WIDTH // HEADS, depth=2, expansion_factor=4.0),
        **options,
    )


def step(peer: str, chunk: int) -> Callable[[], Tensor]:
    """A forward and backward pass of one of `PEERS`; returns its output."""
    model = layer(peer, chunk)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in peer):
            y: Tensor = model(x)[0]
        model.zero_grad()
        y.float().square().sum().backward()
        return y

    return call


def op_step(chunk: int) -> tuple[Callable[[], None], float]:
    """A forward and backward pass of the op alone, and its operations."""
    op = OPS["test_time"]
    inputs = op.inputs(torch.Generator().manual_seed(0), BATCH, LENGTH, heads=HEADS)
    rule = Rule(chunk=chunk)
    inputs |= {"rule": rule, "state": rule.start(inputs["state"].weights)}
    gates = (inputs["gates"].inner_lr, inputs["gates"].log_keep, inputs["gates"].log_momentum)
    for leaf in (inputs["q"], inputs["k"], inputs["v"], *gates):
        leaf.requires_grad_()

    def call() -> None:
        y, _ = op.forms["chunk"](**inputs)
        y.sum().backward()

    return call, PASSES * op.flops(inputs)


def run(arguments: list[str]) -> None:
    """Parse the benchmark's own options, measure, print, and write rows with `--json`."""
    options = measure.parser("test_time", __doc__, "three rounds").parse_args(arguments)
    rounds = 3 if options.quick else 9

    product, product_flops = measure.matrix_product()
    calls: dict[Any, Callable[[], object]] = {"product": product}
    flops = {}
    for chunk in CHUNKS:
        calls["op", chunk], flops[chunk] = op_step(chunk)
        calls |= {(peer, chunk): step(peer, chunk) for peer in PEERS}
    finite = {key: _is_finite(call) for key, call in calls.items() if key[0] in PEERS}
    times = measure.interleaved(calls, rounds)
    rate = product_flops / statistics.median(times["product"])
    rows = [
        _row(peer, chunk, times, finite[peer, chunk], peak_memory(__name__, peer, chunk))
        for chunk in CHUNKS
        for peer in PEERS
    ]
    shares = {
        chunk: flops[chunk] / statistics.median(times["op", chunk]) / rate for chunk in CHUNKS
    }
    measure.print_provenance()
    print(f"matrix product, 2048 x 2048 in fp32: {rate / 1e9:.0f} GFLOP/s (median of {rounds})")
    print(
        f"forward and backward, batch {BATCH}, {LENGTH} tokens, width {WIDTH}, {HEADS} heads, "
        f"medians of {rounds} rounds:"
    )
    print(measure.table([_text(row, rows) for row in rows]))
    for chunk, share in shares.items():
        print(f"the op alone, chunks of {chunk}: {share:.1%} of the product rate")
    if options.json:
        measure.save(options.json, rows, {"product_gflops": rate / 1e9, "share": shares})


def _is_finite(call: Callable[[], object]) -> bool:
    y = call()
    return isinstance(y, Tensor) and bool(y.isfinite().all())


def _row(
    peer: str, chunk: int, times: dict[Any, list[float]], finite: bool, peak: float
) -> dict[str, Any]:
    seconds = times[peer, chunk]
    return {
        "chunk": chunk,
        "layer": peer,
        "seconds": statistics.median(seconds),
        "spread": measure.spread(seconds),
        "finite": finite,
        "peak_mib": peak,
    }


def _text(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    ours = next(r for r in rows if r["layer"] == "ours" and r["chunk"] == row["chunk"])
    return {
        "chunk": str(row["chunk"]),
        "layer": row["layer"],
        "seconds": f"{row['seconds']:.3f}",
        "times ours": f"{row['seconds'] / ours['seconds']:.2f}",
        "peak MiB": f"{row['peak_mib']:.0f}",
        "ours of it": f"{ours['peak_mib'] / row['peak_mib']:.0%}",
        "finite": "yes" if row["finite"] else "no",
        "spread": f"{row['spread']:.0%}",
    }
