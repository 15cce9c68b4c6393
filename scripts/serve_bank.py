"""Answers prompts with a trained model whose memory bank stays on disk.

The model's other weights are read from the run's last.ckpt, of which nothing else is loaded. So
memory is needed for them, for the blocks of one prompt and for a cache of blocks. Each prompt is
routed by the router that the run kept, and reads one block per level; a prompt is cold if any of
them had to be read from files, which the system may have in memory all the same. Prompts are
arguments, or lines of the standard input.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mneme.harness.cli import number, report_errors, whole_number
from mneme.harness.evaluate.serving import Answer, ServedModel, answer, load
from mneme.harness.run.run_directory import RunError, find_run
from mneme.layers import GENERIC
from mneme.storage.reading import Read
from scripts.benchmarks.peak import resident

MIB = 2**20


def run(arguments: Sequence[str]) -> None:
    """Answers all prompts, and says what reading blocks came to.

    Raises:
        RunError: as `load` and `answer`, or a prompt has no route.
        StorageError, RouterError: as `load`.
    """
    options, before = _options(arguments), resident("VmRSS")
    directory, file = find_run(options.run)
    served = load(
        directory,
        file or directory.last,
        options.bank or directory.bank,
        cache_bytes=int(options.cache_mib * MIB),
        read=options.read,
    )
    with closing(served.bank):
        print(_opening(served))
        prompts = _prompts(options)
        answers = [given for prompt in prompts for given in _served(served, prompt, options)]
        memory = f"{resident('VmRSS'):.0f} MiB of resident memory, {before:.0f} before"
    print(f"{_closing(served, answers)}; {memory}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python scripts/serve_bank.py", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="default: lines of stdin")
    parser.add_argument("--bank", type=Path, metavar="FOLDER", help="default: bank/ of the run")
    parser.add_argument("--cache-mib", type=number(0), default=64, help="for blocks that were read")
    parser.add_argument("--read", choices=get_args(Read), default="auto", help="way of reading")
    parser.add_argument("--tokens", type=whole_number(1), default=8, help="of an answer")
    parser.add_argument("--temperature", type=number(0), default=0, help="0: the likeliest word")
    parser.add_argument(
        "--route", type=leaf, metavar="LEAF", help="a leaf or generic; default: the router's"
    )
    parser.add_argument(
        "--compare", action="store_true", help="answer with the generic block as well"
    )
    return parser.parse_intermixed_args(arguments)  # options may stand before prompts


def leaf(text: str) -> int:
    """A route, as typed."""
    return GENERIC if text == "generic" else int(text)


def _prompts(options: argparse.Namespace) -> Iterator[str]:
    lines = options.prompts or (line.strip() for line in sys.stdin)
    return (line for line in lines if line or options.prompts)


def _served(served: ServedModel, prompt: str, options: argparse.Namespace) -> Iterator[Answer]:
    """Answers a prompt, with the generic block as well if asked, and prints the answers."""
    print(f"\n{prompt}", flush=True)
    routes = [_route_of(served, prompt, options.route)]
    if options.compare and GENERIC not in routes:
        routes.append(GENERIC)
    for route in routes:
        given = answer(
            served, prompt, route=route, tokens=options.tokens, temperature=options.temperature
        )
        print(_line(served, given), flush=True)
        yield given


def _route_of(served: ServedModel, prompt: str, given: int | None) -> int:
    if given is not None:
        leaves = served.bank.shape.leaves
        if not GENERIC <= given < leaves:
            raise RunError(f"--route {given}: the bank has leaves 0 to {leaves - 1}; or generic")
        return given
    if served.router is None:
        raise RunError(
            "the run kept no router, as no router made the routes of its training; give --route "
            "with a leaf, or --route generic"
        )
    return int(served.router.route([prompt])[0])


def _line(served: ServedModel, given: Answer) -> str:
    """The answer, and what it cost."""
    speed = f", {1 / given.decode:,.0f} tokens/s" if given.decode is not None else ""
    costs = f"fetch {1e3 * given.fetch:.2f} ms, prefill {1e3 * given.prefill:.2f} ms{speed}"
    return f"  {given.text}\n    {_where(served, given)}; {costs}"


def _where(served: ServedModel, given: Answer) -> str:
    if given.route == GENERIC:
        return "generic block"
    shape = served.bank.shape
    path = " > ".join(str(shape.node(given.route, level)) for level in shape.levels)
    found = f"cold ({given.misses} of {given.hits + given.misses} blocks read)"
    return f"route {given.route}, path {path}, {found if given.misses else 'warm'}"


def _opening(served: ServedModel) -> str:
    shape, facts = served.bank.shape, served.bank.manifest.facts
    own = sum(p.numel() for p in served.model.parameters())
    ways = ", ".join(f"level {level} by {way}" for level, way in served.bank.ways.items())
    return (
        f"{own:,} parameters in memory; a bank of {shape.parameters:,} on disk (step "
        f"{facts.get('step')}), of which a prompt reads {shape.fetched:,}; {ways}"
    )


def _closing(served: ServedModel, answers: Sequence[Answer]) -> str:
    reads = served.bank.reads
    fetched = [given for given in answers if given.route != GENERIC]
    blocks = max(1, reads.hits + reads.misses)
    medians = {
        "cold": [given.fetch for given in fetched if given.misses],
        "warm": [given.fetch for given in fetched if not given.misses],
    }
    times = [
        f"{name} {1e3 * statistics.median(values):.2f} ms" if values else f"{name} -"
        for name, values in medians.items()
    ]
    return (
        f"\n{len(answers)} answers; {reads.hits / blocks:.0%} of blocks from the cache, "
        f"{reads.file_bytes / MIB:.2f} MiB read; median fetch: {', '.join(times)}"
    )


if __name__ == "__main__":
    with report_errors():
        run(sys.argv[1:])
