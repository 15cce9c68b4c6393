"""Checks the files of a memory bank, or writes them anew without what edits have left.

verify reads every block once and compares it with its checksum. compact writes the levels whole
where edits have put blocks beside them, which needs room for another copy, and erases what was
deleted while somebody was reading it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mneme.harness.cli import report_errors
from mneme.models.bank import compact_bank, verify_bank
from mneme.storage.files import StorageError
from mneme.storage.generations import read_generation


def run(arguments: Sequence[str]) -> None:
    """Does what is asked, and says what the bank is now.

    Raises:
        StorageError: there is no bank, or one that is damaged, with a line for each problem; or as
            `compact_bank`.
    """
    parser = argparse.ArgumentParser(prog="python scripts/bank.py", description=__doc__)
    parser.add_argument("command", choices=["verify", "compact"])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the bank")
    options = parser.parse_args(arguments)
    if options.command == "compact":
        compact_bank(options.folder)
    elif problems := verify_bank(options.folder):
        raise StorageError("\n".join(problems))
    now = read_generation(options.folder)
    files = sum(len(level.parts) for level in now.levels.values())
    kept = (
        "; blocks or files that were superseded are still being read, and are not erased yet"
        if now.superseded
        else ""
    )
    sound = "every block is as it was written" if options.command == "verify" else "written whole"
    print(f"{options.folder}: {sound}; generation {now.number}, {files} files{kept}")


if __name__ == "__main__":
    with report_errors():
        run(sys.argv[1:])
