"""Fits a router to texts, and says which leaf of its tree a text belongs to.

`fit` learns an embedder and a tree of centroids, writes them to a folder, and prints how the texts
spread over the nodes of each level. `ask` prints a line per text: its leaf, its nodes from the
first level to the last, and how it begins.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mneme.harness.cli import report_errors, whole_number
from mneme.harness.run.run_directory import RunError
from mneme.routers import (
    Embedder,
    HashedTfidf,
    Router,
    RouterError,
    SentenceTransformer,
    markdown,
    nodes,
    report,
)

SHOWN = 60  # characters of a text


def run(arguments: Sequence[str]) -> None:
    """Fits or asks.

    Raises:
        RunError: texts that cannot be read, an option out of its range, or no router there.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.program == "fit":
            _fit(options)
        else:
            _route(options)
    except ValueError as error:
        raise RunError(str(error)) from error


def read_texts(source: Path) -> list[str]:
    """The lines of a file, blank ones left out, or the files of a folder in order of their names.

    Raises:
        RouterError: there are none, or a file is not UTF-8 text.
    """
    files = sorted(f for f in source.iterdir() if f.is_file()) if source.is_dir() else [source]
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RouterError(f"cannot read {file}: {error}") from error
        texts += [text] if source.is_dir() else [t for t in text.split("\n") if t.strip()]
    if not texts:
        raise RouterError(f"{source} has no texts; give a file with one per line, or a folder")
    return texts


def _fit(options: argparse.Namespace) -> None:
    texts = read_texts(options.texts)
    embedder: Embedder = SentenceTransformer(options.embedder)
    if options.embedder == HashedTfidf.name:
        embedder = HashedTfidf(seed=options.seed)
    router = Router.fit(
        texts,
        embedder=embedder,
        branching=options.branching,
        depth=options.depth,
        seed=options.seed,
    )
    router.save(options.out)
    found = report(router.route(texts), branching=router.branching, depth=router.depth)
    print(markdown(found))
    print(f"\n{len(texts):,} texts; router {router.hash[:16]} is in {options.out}")


def _route(options: argparse.Namespace) -> None:
    router = Router.load(options.router)
    texts = options.text or [line.rstrip("\n") for line in sys.stdin]
    leaves = router.route(texts)
    levels = range(1, router.depth + 1)
    paths = [nodes(leaves, level, router.depth, router.branching) for level in levels]
    for text, leaf, *path in zip(texts, leaves, *paths, strict=True):
        start = " ".join(text.split())[:SHOWN]
        print(f"{leaf}\t{'/'.join(map(str, path))}\t{start}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python scripts/route.py", description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True)
    fit = programs.add_parser("fit", help="learn a router from texts")
    fit.add_argument(
        "--texts", type=Path, required=True, help="a file with one per line, or a folder of files"
    )
    fit.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the router")
    fit.add_argument("--branching", type=whole_number(2), default=4, help="children of each node")
    fit.add_argument("--depth", type=whole_number(1), default=3, help="levels of the tree")
    fit.add_argument("--seed", type=whole_number(0), default=0)
    fit.add_argument(
        "--embedder",
        default=HashedTfidf.name,
        help=f"{HashedTfidf.name}, or a model of sentence-transformers by name or folder",
    )
    ask = programs.add_parser("ask", help="route texts")
    ask.add_argument("--router", type=Path, required=True, metavar="FOLDER")
    ask.add_argument("text", nargs="*", metavar="TEXT", help="none: the lines of stdin")
    return parser


if __name__ == "__main__":
    with report_errors():
        run(sys.argv[1:])
