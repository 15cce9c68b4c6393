"""Where text comes from, which corpus it is, and which files are held out."""

import glob
import hashlib
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

BLOCK_BYTES = 1 << 20  # text is read and encoded about this much at a time

# Directories of the standard library that are not library: tests and their data, and what pip
# put there. `config-*` and `_sysconfigdata*` record the build of one machine's interpreter, and
# would make two machines with the same Python disagree about the corpus.
NOT_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
BUILD_RECORDS = ("config-*/*", "_sysconfigdata*.py")


class Document(NamedTuple):
    """One file of a corpus.

    Attributes:
        name: relative path with forward slashes: what identifies the document on any machine.
        path: where it is on this one.
    """

    name: str
    path: Path


class Source(ABC):
    """A set of UTF-8 text files.

    Attributes:
        name: short name for tables.
    """

    name: str

    @abstractmethod
    def documents(self) -> list[Document]:
        """All files, sorted by name."""


class StandardLibrary(Source):
    """The Python sources of the running interpreter's own standard library.

    A corpus of some 10 MB that needs no download. It differs between Python versions; its content
    hash, recorded with every run, tells them apart.
    """

    name = "python_standard_library"

    def documents(self) -> list[Document]:
        """All `.py` files but tests and records of the build, sorted by name."""
        root = Path(sysconfig.get_paths()["stdlib"])
        names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        return [Document(name, root / name) for name in sorted(filter(_is_library, names))]


def _is_library(name: str) -> bool:
    path = PurePosixPath(name)
    if any(folder in NOT_LIBRARY for folder in path.parts[:-1]):
        return False
    return not any(path.match(pattern) for pattern in BUILD_RECORDS)


class LocalFiles(Source):
    """Files of this machine.

    A document is named relative to the folder of its path, or to the last folder before the
    first wildcard, so that moving the whole corpus does not change which files are held out.

    Args:
        paths: files, or patterns such as `books/**/*.txt`.
    """

    name = "local_files"

    def __init__(self, paths: Sequence[str]) -> None:
        if isinstance(paths, str):
            raise ValueError(f"paths must be a list: write ['{paths}'] instead of '{paths}'")
        self.paths = list(paths)

    def documents(self) -> list[Document]:
        """All matching files, each once, sorted by name."""
        found = {
            document.path.resolve(): document
            for pattern in self.paths
            for document in _matches(pattern)
        }
        return sorted(found.values())


def _matches(pattern: str) -> list[Document]:
    """The files one path or pattern stands for."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"'{pattern}' is a folder; name its files, as in '{pattern}/**/*.txt'")
    root = path.parent
    while glob.has_magic(str(root)):
        root = root.parent
    files = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [file for file in files if file.is_file()]
    if not files:
        raise ValueError(f"'{pattern}' matches no file (from {Path.cwd()})")
    return [Document(file.relative_to(root).as_posix(), file) for file in files]


def content_hash(documents: Iterable[Document]) -> str:
    """Identifies a corpus: SHA-256 over the names and contents of its documents, in order."""
    total = hashlib.sha256()
    for document in documents:
        with document.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        total.update(document.name.encode() + b"\0" + content)
    return total.hexdigest()


def blocks(document: Document) -> Iterator[str]:
    """Reads a document as whole lines, about `BLOCK_BYTES` at a time; nothing is translated."""
    with document.path.open("rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            try:
                yield b"".join(lines).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{document.path} is not UTF-8 ({error.reason}: "
                    f"0x{error.object[error.start]:02x}); convert it or leave it out"
                ) from error


def split_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Holds out about 5 % of the files for testing and 5 % for validation.

    The hash of a file's name decides, so adding files moves no other file. Only where chance
    leaves a held-out set empty, which happens to corpora of a few dozen files, it is given the
    next file in the order of hashes.

    Args:
        documents: at least three.

    Returns:
        The documents of `train`, `val` and `test`, each in the order of hashes: the beginning
        of a split is a fair sample of it, where alphabetical order would give one letter.
    """
    if len(documents) < 3:
        raise ValueError(
            f"a corpus is split by file and needs at least 3, one each to train, validate and "
            f"test on; this one has {len(documents)}: cut it into more files"
        )
    ranked = sorted(documents, key=lambda document: _place(document.name))
    tested = sum(_place(document.name) < 0.05 for document in ranked) or 1
    validated = sum(_place(document.name) < 0.10 for document in ranked[tested:]) or 1
    # A corpus whose files all hash low keeps one to train on.
    tested = min(tested, len(ranked) - 2)
    validated = min(validated, len(ranked) - tested - 1)
    held_out = tested + validated
    return {
        "train": ranked[held_out:],
        "val": ranked[tested:held_out],
        "test": ranked[:tested],
    }


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
