"""Speed and memory of serving a model with a memory bank that stays on disk.

    cold       blocks and whole paths that are on disk only, by way of reading ("auto" is what the
               bank chooses), as a share of the rate at which large reads get through the same file,
               by one thread or by as many as the bank has, whichever is faster; and what each level
               would cost in memory, in the page cache and on this disk
    warm       fetching a path whose blocks are in memory, as a share of reading a prompt
    decode     tokens of one sequence with fetched blocks, against the model without a bank
    memory     resident memory of a process that serves random routes

The bank has random blocks, in bfloat16, of a tree of 3 levels with 16 children each. It is made
once, and used again when its folder is given again. The model has random weights: about 100M of
them, of which a path is 9 %.

A block counts as read when it is in memory and was compared with its checksum; a path, when all its
blocks are converted to float32 and in their places. Before each of them the files are taken out of
this machine's page cache; blocks of a small level may still be in memory of the disk. Ratios are
taken within a round, as medians over rounds. Each line names the share aimed at.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from mneme.models import generate
from mneme.models.bank import StoredBank
from scripts.benchmarks import measure
from scripts.benchmarks.cold_reads import Row, measure_cold, ratios, text
from scripts.benchmarks.peak import ROOT, resident
from scripts.benchmarks.random_bank import (
    DTYPE,
    FULL,
    QUICK,
    BankSizes,
    generator,
    make_models,
    prepare,
)

PARTS = ("cold", "warm", "decode", "memory")
WARM_BAR, DECODE_BAR, MEMORY_BAR = 0.1, 0.85, 1.5  # shares, GiB
PROMPT, BASE_MODEL = "reading the prompt", "no bank"  # to compare to


def run(arguments: list[str]) -> None:
    """Parse the benchmark's own options, measure, print, and write rows if asked."""
    parser = argparse.ArgumentParser(
        prog="bench.py bank", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the bank; made if not there")
    parser.add_argument("--gib", type=float, help=f"size of the bank; default {FULL.gib:g}")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny bank and model, for which bars are not meant"
    )
    parser.add_argument("--part", choices=PARTS, help="only this")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    sizes = replace(sizes, gib=options.gib or sizes.gib)

    measure.print_provenance()
    try:
        shape = prepare(options.folder, sizes)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"a bank of {shape.parameters * DTYPE.itemsize / 2**30:.2f} GiB, {shape.hidden} units of a "
        f"block; {shape.fetched:,} elements a path; medians of {sizes.rounds} rounds"
    )
    rows: list[Row] = []
    for part in PARTS if options.part is None else (options.part,):
        rows += MEASURE[part](options.folder, sizes)
    if options.json:
        measure.save(options.json, rows, {"sizes": vars(sizes), "hidden": shape.hidden})


def _warm(folder: Path, sizes: BankSizes) -> list[Row]:
    """Fetching what is in memory, against reading a prompt."""
    route = torch.zeros(1, dtype=torch.long)
    prompt = torch.randint(sizes.vocab, (1, sizes.prompt), generator=generator())
    with (
        closing(StoredBank(folder, cache_bytes=2**31)) as bank,
        closing(StoredBank(folder, read="pread", cache_bytes=0)) as uncached,
        torch.inference_mode(),
    ):
        _, base_model = make_models(sizes, bank)
        calls = {
            PROMPT: lambda: base_model(prompt),
            "fetch from memory": lambda: bank.fetch(route),
            "fetch from the page cache": lambda: uncached.fetch(route),
        }
        times = measure.interleaved(calls, sizes.rounds, warmup=2)
    rows = [_warm_row(what, times) for what in times]
    print(f"\nwarm, and a prompt of {sizes.prompt} tokens:")
    lines = [text(row, {"ms": f"{1e3 * row['seconds']:.1f}"}, "of prompt") for row in rows]
    print(measure.table(lines))
    return rows


def _warm_row(what: str, times: Mapping[str, list[float]]) -> Row:
    shares = ratios(times[what], times[PROMPT])
    return {
        "part": "warm",
        "what": what,
        "seconds": statistics.median(times[what]),
        "spread": measure.spread(times[what]),
        "of_prompt": statistics.median(shares),
        "of_prompt_spread": measure.spread(shares),
        "bar": None if what == PROMPT else WARM_BAR,
    }


def _decode(folder: Path, sizes: BankSizes) -> list[Row]:
    """Tokens per second of one sequence whose blocks have been fetched."""
    first = torch.zeros(1, 1, dtype=torch.long)
    with closing(StoredBank(folder)) as bank:
        served, base_model = make_models(sizes, bank)
        state = served.init_state(1, torch.zeros(1, dtype=torch.long))
        calls = {
            BASE_MODEL: lambda: generate(base_model, first, sizes.tokens, temperature=0),
            "with a bank": lambda: generate(
                served, first, sizes.tokens, temperature=0, state=state
            ),
        }
        times = measure.interleaved(calls, sizes.rounds)
    rows = [_decode_row(what, sizes.tokens, times) for what in times]
    print(f"\ndecode, {sizes.tokens} tokens of one sequence:")
    speeds = [{"tokens/s": f"{row['tokens_per_second']:.1f}"} for row in rows]
    print(measure.table([text(*pair, "of base model") for pair in zip(rows, speeds, strict=True)]))
    return rows


def _decode_row(what: str, tokens: int, times: Mapping[str, list[float]]) -> Row:
    shares = ratios(times[BASE_MODEL], times[what])  # of speeds
    return {
        "part": "decode",
        "what": what,
        "tokens_per_second": tokens / statistics.median(times[what]),
        "spread": measure.spread(times[what]),
        "of_base_model": statistics.median(shares),
        "of_base_model_spread": measure.spread(shares),
        "bar": None if what == BASE_MODEL else DECODE_BAR,
    }


def serve(folder: Path, sizes: BankSizes) -> Row:
    """Answers prompts with random routes for a while, reading the next one's blocks meanwhile."""
    draw, routes = random.Random(0), 0
    prompt = torch.randint(sizes.vocab, (1, sizes.prompt), generator=generator())
    with closing(StoredBank(folder)) as bank:
        served, _ = make_models(sizes, bank)
        route = torch.tensor([draw.randrange(bank.shape.leaves)])
        end = time.perf_counter() + sizes.seconds
        while time.perf_counter() < end:
            state = served.init_state(1, route)
            route = torch.tensor([draw.randrange(bank.shape.leaves)])
            bank.prefetch(route)
            generate(served, prompt, sizes.tokens, temperature=0, state=state)
            routes += 1
        return {
            "part": "memory",
            "routes": routes,
            "read_gib": bank.reads.file_bytes / 2**30,
            "resident_gib": resident("VmRSS") / 2**10,
            "peak_gib": resident("VmHWM") / 2**10,
            "bar": MEMORY_BAR,
        }


def serve_elsewhere(folder: Path, sizes: BankSizes) -> Row:
    """What `serve` finds in a process of its own."""
    given = [str(folder.absolute()), json.dumps(vars(sizes))]
    command = [sys.executable, "-m", "scripts.benchmarks.bank", *given]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    row: Row = json.loads(done.stdout)
    return row


def _memory(folder: Path, sizes: BankSizes) -> list[Row]:
    row = serve_elsewhere(folder, sizes)
    print(
        f"\nmemory: a process that served {row['routes']} random routes, and read "
        f"{row['read_gib']:.2f} GiB for them, has {row['resident_gib']:.2f} GiB in memory, "
        f"{row['peak_gib']:.2f} GiB at its peak (bar {MEMORY_BAR} GiB)"
    )
    return [row]


MEASURE: Mapping[str, Callable[[Path, BankSizes], list[Row]]] = {
    "cold": measure_cold,
    "warm": _warm,
    "decode": _decode,
    "memory": _memory,
}


if __name__ == "__main__":  # `serve_elsewhere`
    print(json.dumps(serve(Path(sys.argv[1]), BankSizes(**json.loads(sys.argv[2])))))
