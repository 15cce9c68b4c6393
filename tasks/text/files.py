"""Files that appear whole or not at all, so that a killed or concurrent run does no harm."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Where prepared data are kept: the argument, else `$MNEME_CACHE`, else `~/.cache/mneme`."""
    return Path(cache_dir or os.environ.get("MNEME_CACHE") or "~/.cache/mneme").expanduser()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a scratch file that takes the place of `path` if the block ends without an error.

    Two processes may write the same path at once: each has its own scratch file, and the last to
    finish wins. Readers that have the old file open keep it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with scratch.open("xb") as file:
            yield file
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
