"""Goes on with a prompt: `python scripts/sample.py run=runs/NAME prompt="import "`.

Works for every run whose tokens are text: bytes, SentencePiece, or words; a memory bank is read
along the route of the prompt. The prompt is printed, and the text as it comes. Other options, in
configs/sample.yaml: tokens=200, temperature=1.0, top_k=40, top_p=0.9, seed=0, checkpoint=last and
route=LEAF (-1 for the generic block).
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mneme
from mneme.harness.cli import report_errors
from mneme.harness.config.compose import program_options
from mneme.harness.run.run_directory import RunError


@dataclass(frozen=True)
class SampleOptions:
    """The options; configs/sample.yaml explains them and holds the defaults."""

    run: str
    prompt: str
    checkpoint: Literal["best", "last"]
    tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    route: int | None


def sample(arguments: Sequence[str]) -> None:
    """Prints a text.

    Raises:
        ConfigError: a mistake in the command line.
        RunError: no usable run there, or none with a text.
    """
    prompts = [a.removeprefix("prompt=") for a in arguments if a.startswith("prompt=")]
    others = [a for a in arguments if not a.startswith("prompt=")]  # Hydra would read commas
    options = program_options("sample", SampleOptions, others, prompt=[*prompts, ""][0])
    run = mneme.load(options.run, checkpoint=options.checkpoint)
    pieces = run.stream(
        options.prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        route=options.route,
    )
    try:
        first = next(pieces, "")
    except ValueError as error:
        raise RunError(str(error)) from error
    print(options.prompt, end="")
    for piece in itertools.chain([first], pieces):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    with report_errors():
        sample(sys.argv[1:])
