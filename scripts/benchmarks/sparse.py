"""Speed and memory of layers that read a few rows of a large table.

    steps      a forward and backward pass and the optimizer's step of whole layers, against
               product-key-memory and PEER-pytorch with a dense Adam, as their users train them
    lookups    reading, its backward pass and the rows' update, per lookup and by table size;
               finding the rows is left out, as the sub-keys grow with the table's square root
    bandwidth  bytes of rows that the reads get through, as a share of the rate of a large copy
    memory     peak resident memory of training steps of a table of 4M rows

Tokens are four batches in turn, so that a step does not find its rows in cache. Ratios are taken
within a round, as medians over rounds. Each line names the share or ratio aimed at.
"""

import gc
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mneme.layers import PEER, ProductKeyMemory, TableOptions
from mneme.layers.sparse.table import Table
from mneme.models.optim import make_optimizer
from mneme.ops.table_read import dot_rows, sum_rows
from scripts.benchmarks import measure
from scripts.benchmarks.peak import peak_memory

WIDTH, HEADS, TOP_K = 256, 4, 32
LOOKUPS = HEADS * TOP_K  # of a token
BATCHES = 4
PARTS = ("steps", "lookups", "bandwidth", "memory")
STEP_BARS = {512: 5.0, 2048: 2.5}  # times faster, by tokens
LOOKUP_BAR, BANDWIDTH_BAR, MEMORY_BAR = 1.5, 0.5, 10.0  # ratio, share, GiB
COPIED = 2**26  # elements, 256 MiB: far more than any cache holds
Row = dict[str, Any]
Contenders = Iterator[tuple[str, nn.Module, torch.optim.Optimizer]]


@dataclass(frozen=True)
class Scale:
    """How much the benchmark measures.

    Attributes:
        sub_keys: of the layers, whose tables have the square of it as rows.
        tokens: of a training step, one measurement each.
        tables: rows of the tables that are looked up in, one measurement each.
        rounds: of timings.
    """

    sub_keys: int
    tokens: tuple[int, ...]
    tables: tuple[int, ...]
    rounds: int


FULL = Scale(sub_keys=1024, tokens=(512, 2048), tables=(2**18, 2**20, 2**22), rounds=9)
QUICK = Scale(sub_keys=64, tokens=(64, 128), tables=(2**12, 2**14), rounds=3)


def run(arguments: list[str]) -> None:
    """Parse the benchmark's own options, measure, print, and write rows with `--json`."""
    parser = measure.parser("sparse", __doc__, "small tables, for which bars are not meant")
    parser.add_argument("--part", choices=PARTS, help="only this")
    options = parser.parse_args(arguments)
    scale = QUICK if options.quick else FULL

    measure.print_provenance()
    print(f"huge pages requested: {os.environ.get('THP_MEM_ALLOC_ENABLE', '0') == '1'}")
    print(
        f"width {WIDTH}, {HEADS} heads, {TOP_K} rows each, fp32, medians of {scale.rounds} rounds"
    )
    rows: list[Row] = []
    for part in PARTS if options.part is None else (options.part,):
        rows += MEASURE[part](scale)
    if options.json:
        measure.save(options.json, rows, {"sizes": vars(scale)})


def _steps(scale: Scale) -> list[Row]:
    rows = []
    for family, contenders in {"product keys": _product_keys, "experts": _experts}.items():
        print(f"\nsteps, {family}, {scale.sub_keys**2:,} rows:")
        found = _family(family, contenders(scale.sub_keys), scale)
        print(measure.table([_step_text(row) for row in found]))
        rows += found
        gc.collect()  # models refer to themselves, and the next ones need the memory
    return rows


def _family(family: str, contenders: Contenders, scale: Scale) -> list[Row]:
    calls = {
        (name, tokens): call
        for name, model, optimizer in contenders
        for tokens in scale.tokens
        for call in [_training_step(model, optimizer, tokens)]
    }
    times = measure.interleaved(calls, scale.rounds, warmup=BATCHES)
    return [_step_row(family, key, times) for key in sorted(times, key=lambda key: key[1])]


def _product_keys(sub_keys: int) -> Contenders:
    """Product-key memories without output gates, which theirs has not."""
    for update in ("lazy", "rowwise"):
        torch.manual_seed(0)
        model = ProductKeyMemory(
            WIDTH,
            heads=HEADS,
            top_k=TOP_K,
            sub_keys=sub_keys,
            key_dim=WIDTH,
            gate="none",
            table=TableOptions(update=update, lr_multiplier=10.0),
        )
        yield f"ours, {update}", model, _ours(model)
    try:
        from product_key_memory import (  # type: ignore[import-untyped]
            PKM,
            fetch_optimizer_parameters,
        )
    except ImportError as error:
        print(f"product-key-memory is left out ({error}); it is in requirements-dev.txt")
        return
    for fused in (False, True):
        torch.manual_seed(0)
        theirs = PKM(WIDTH, heads=HEADS, num_keys=sub_keys, topk=TOP_K, dim_head=WIDTH // 2)
        groups = fetch_optimizer_parameters(theirs)  # as its README advises, with plain Adam
        optimizer = torch.optim.Adam(groups, lr=1e-3, fused=fused)
        yield f"product-key-memory, {'fused ' if fused else ''}Adam", theirs, optimizer


def _experts(sub_keys: int) -> Contenders:
    """Experts of one neuron; theirs, one model, with the paper's scores (not its default)."""
    torch.manual_seed(0)
    ours = PEER(
        WIDTH,
        heads=HEADS,
        top_k=TOP_K,
        sub_keys=sub_keys,
        key_dim=WIDTH,
        table=TableOptions(update="lazy"),
    )
    yield "ours, lazy", ours, _ours(ours)
    try:
        from PEER_pytorch import PEER as Theirs  # type: ignore[import-untyped]
    except ImportError as error:
        print(f"PEER-pytorch is left out ({error}); it is in requirements-dev.txt")
        return
    torch.manual_seed(0)
    theirs = Theirs(
        WIDTH,
        heads=HEADS,
        num_experts=sub_keys**2,
        num_experts_per_head=TOP_K,
        non_competing_scores=False,
    )
    for fused in (False, True):  # the plain one table by table: 20 GiB are enough for all this
        optimizer = torch.optim.Adam(theirs.parameters(), fused=fused, foreach=False)
        yield f"PEER-pytorch, {'fused ' if fused else ''}Adam", theirs, optimizer


def _ours(model: nn.Module) -> torch.optim.Optimizer:
    """Our optimizer, over what is dense as well as the tables."""
    return make_optimizer(model, lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True))


def _training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: int
) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    batches = itertools.cycle(torch.randn(BATCHES, 1, tokens, WIDTH, generator=generator))

    def step() -> None:
        out = model(next(batches))
        y = out if isinstance(out, Tensor) else out.y
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()  # now, so that contenders do not hold gradients at the same time

    return step


def _step_row(family: str, key: tuple[str, int], times: Mapping[Any, list[float]]) -> Row:
    name, tokens = key
    ratios = _ratios(times[key], times["ours, lazy", tokens])
    return {
        "part": "steps",
        "family": family,
        "layer": name,
        "tokens": tokens,
        "seconds": statistics.median(times[key]),
        "spread": measure.spread(times[key]),
        "times_ours": statistics.median(ratios),
        "times_ours_spread": measure.spread(ratios),
        "bar": None if name.startswith("ours") else STEP_BARS.get(tokens),
    }


def _step_text(row: Row) -> dict[str, str]:
    return {
        "tokens": str(row["tokens"]),
        "layer": row["layer"],
        "ms/step": f"{1e3 * row['seconds']:.1f}",
        "spread": f"{row['spread']:.0%}",
        "times ours, lazy": f"{row['times_ours']:.2f}",
        "spread of it": f"{row['times_ours_spread']:.0%}",
        "bar": "" if row["bar"] is None else f"{row['bar']}",
    }


def _lookups(scale: Scale) -> list[Row]:
    rows, tokens = [], scale.tokens[0]
    for update in ("lazy", "rowwise"):
        calls = {count: _read_and_update(count, tokens, update) for count in scale.tables}
        times = measure.interleaved(calls, scale.rounds, warmup=BATCHES)
        rows += [_lookup_row(update, count, tokens, times) for count in times]
        del calls
        gc.collect()
    print(f"\nlookups, {tokens} tokens: reading, backward pass and update, without key scoring:")
    print(measure.table([_lookup_text(row) for row in rows]))
    return rows


def _read_and_update(count: int, tokens: int, update: Any) -> Callable[[], None]:
    """A step of a table of which every token reads rows at random."""
    table = Table(count, WIDTH, std=WIDTH**-0.5, options=TableOptions(update=update))
    optimizer, inputs = _ours(table), itertools.cycle(_random_reads(count, tokens))

    def step() -> None:
        rows, weights, _ = next(inputs)
        table.sum_rows(rows, weights).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _random_reads(count: int, tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows, weights and tokens of each batch."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(count, (tokens, LOOKUPS), generator=generator),
            torch.rand(tokens, LOOKUPS, generator=generator).requires_grad_(),
            torch.randn(tokens, WIDTH, generator=generator).requires_grad_(),
        )
        for _ in range(BATCHES)
    ]


def _lookup_row(update: str, count: int, tokens: int, times: Mapping[int, list[float]]) -> Row:
    ratios = _ratios(times[count], times[min(times)])
    return {
        "part": "lookups",
        "update": update,
        "table": count,
        "nanoseconds": 1e9 * statistics.median(times[count]) / (tokens * LOOKUPS),
        "spread": measure.spread(times[count]),
        "times_smallest": statistics.median(ratios),
        "times_smallest_spread": measure.spread(ratios),
        "bar": LOOKUP_BAR,
    }


def _lookup_text(row: Row) -> dict[str, str]:
    return {
        "update": row["update"],
        "rows of table": f"{row['table']:,}",
        "ns/lookup": f"{row['nanoseconds']:.0f}",
        "spread": f"{row['spread']:.0%}",
        "times smallest": f"{row['times_smallest']:.2f}",
        "spread of it": f"{row['times_smallest_spread']:.0%}",
        "bar": f"{row['bar']}",
    }


def _bandwidth(scale: Scale) -> list[Row]:
    """Rates of the ops; every looked-up row counts once, and so does every row written."""
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    calls: dict[Any, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    moved: dict[Any, int] = {"copy": 2 * 4 * COPIED}
    count = scale.tables[-2]
    table = torch.ones(count, WIDTH, requires_grad=True)
    for tokens in scale.tokens:
        inputs = _random_reads(count, tokens)
        read, written = 4 * WIDTH * tokens * LOOKUPS, 4 * WIDTH * inputs[0][0].unique().numel()
        for name, call in _reads(table, inputs).items():
            calls[name, tokens] = call
            moved[name, tokens] = read + (written if "backward" in name else 0)
    times = measure.interleaved(calls, scale.rounds, warmup=BATCHES)
    rows = [_bandwidth_row(key, moved, times) for key in times]
    print(f"\nbandwidth, {count:,} rows; a copy counts what it reads and what it writes:")
    print(measure.table([_bandwidth_text(row) for row in rows]))
    return rows


def _reads(table: Tensor, inputs: list[Any]) -> dict[str, Callable[[], object]]:
    """Forward passes, and backward passes alone; the graph of each is kept for all rounds."""
    batches = itertools.cycle(inputs)

    def forward(op: Callable[..., Tensor], factor: int) -> Callable[[], object]:
        def call() -> Tensor:
            batch = next(batches)
            with torch.no_grad():
                return op(table, batch[0], batch[factor])

        return call

    def backward(op: Callable[..., Tensor], factor: int) -> Callable[[], object]:
        made = [(op(table, b[0], b[factor], sparse_grad=True), b[factor]) for b in inputs]
        graphs = itertools.cycle([(y, x, torch.randn_like(y)) for y, x in made])

        def call() -> object:
            y, x, dy = next(graphs)
            return torch.autograd.grad(y, (table, x), dy, retain_graph=True)

        return call

    return {
        "sum_rows": forward(sum_rows, 1),
        "dot_rows": forward(dot_rows, 2),
        "sum_rows, backward": backward(sum_rows, 1),
        "dot_rows, backward": backward(dot_rows, 2),
    }


def _bandwidth_row(key: Any, moved: Mapping[Any, int], times: Mapping[Any, list[float]]) -> Row:
    name, tokens = (key, None) if key == "copy" else key
    shares = [
        (moved[key] / seconds) / (moved["copy"] / copy)
        for seconds, copy in zip(times[key], times["copy"], strict=True)
    ]
    return {
        "part": "bandwidth",
        "call": name,
        "tokens": tokens,
        "gigabytes_per_second": moved[key] / statistics.median(times[key]) / 1e9,
        "spread": measure.spread(times[key]),
        "share_of_copy": statistics.median(shares),
        "share_of_copy_spread": measure.spread(shares),
        "bar": None if key == "copy" else BANDWIDTH_BAR,
    }


def _bandwidth_text(row: Row) -> dict[str, str]:
    return {
        "call": row["call"],
        "tokens": "" if row["tokens"] is None else str(row["tokens"]),
        "GB/s": f"{row['gigabytes_per_second']:.1f}",
        "spread": f"{row['spread']:.0%}",
        "of copy": f"{row['share_of_copy']:.0%}",
        "spread of it": f"{row['share_of_copy_spread']:.0%}",
        "bar": "" if row["bar"] is None else f"{row['bar']:.0%}",
    }


def step(name: str, number: int) -> Callable[[], None]:
    """Makes a table of `number` rows with the update `name` and trains it; for `peak_memory`."""

    def call() -> None:
        train = _read_and_update(number, FULL.tokens[0], name)
        for _ in range(BATCHES):
            train()

    return call


def _memory(scale: Scale) -> list[Row]:
    count = scale.tables[-1]
    gib = peak_memory(__name__, "rowwise", count) / 2**10
    print(
        f"\nmemory: training a table of {count:,} x {WIDTH} with row-wise state takes {gib:.2f} "
        f"GiB at its peak, the table included (bar {MEMORY_BAR:.0f} GiB)"
    )
    return [{"part": "memory", "table": count, "peak_gib": gib, "bar": MEMORY_BAR}]


def _ratios(times: list[float], references: list[float]) -> list[float]:
    return [a / b for a, b in zip(times, references, strict=True)]


MEASURE: Mapping[str, Callable[[Scale], list[Row]]] = {
    "steps": _steps,
    "lookups": _lookups,
    "bandwidth": _bandwidth,
    "memory": _memory,
}
