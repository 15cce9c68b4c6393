"""Where text comes from, which corpus it is, and which files are held out."""

import fnmatch
import glob
import hashlib
import os
import sysconfig
from abc import ABC, abstractmethod
from collections import Counter
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
        found = [Document(name, root / name) for name in filter(_is_library, names)]
        return sorted(document for document in found if document.path.is_file())


def _is_library(name: str) -> bool:
    path = PurePosixPath(name)
    if any(folder in NOT_LIBRARY for folder in path.parts[:-1]):
        return False
    return not any(path.match(pattern) for pattern in BUILD_RECORDS)


class LocalFiles(Source):
    """Files of this machine.

    A document is named relative to the folder of its path, or to the last folder before the
    first wildcard, so that moving the whole corpus does not change which files are held out. A
    file that is found several times, by links too, is one document: under the name that is no
    link, and of several the first in alphabetical order.

    Args:
        paths: files, or patterns such as `books/**/*.txt`. Brackets are a set of characters, as in
            `[0-9]*.txt`, unless a file or folder has just that name.
    """

    name = "local_files"

    def __init__(self, paths: Sequence[str]) -> None:
        if isinstance(paths, str):
            raise ValueError(f"paths must be a list: write ['{paths}'] instead of '{paths}'")
        self.paths = list(paths)

    def documents(self) -> list[Document]:
        """All matching files, each once, sorted by name, and by content where names are alike."""
        found = {match for pattern in self.paths for match in _matches(pattern)}
        once: dict[tuple[int, int], Document] = {}
        for _, document in sorted(found):  # those that are no links come first
            status = document.path.stat()
            once.setdefault((status.st_dev, status.st_ino), document)
        alike = Counter(document.name for document in once.values())

        def order(document: Document) -> tuple[str, bytes]:
            return document.name, _digest(document) if alike[document.name] > 1 else b""

        return sorted(once.values(), key=order)


def at_home(path: str | Path) -> Path:
    """A path whose `~` is the user's home.

    Raises:
        ValueError: the user has no home: HOME is not set, and the system does not know the user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{path}: there is no home folder for ~ to stand for; set HOME, or MNEME_CACHE for the "
            "cache, or name another folder"
        ) from error


def _matches(pattern: str) -> Iterator[tuple[bool, Document]]:
    """The files that one path or pattern stands for, and whether each is a link or behind one."""
    path = at_home(pattern)
    if path.is_dir():
        raise ValueError(f"'{pattern}' is a folder; name its files, as in '{pattern}/**/*.txt'")
    fixed = _fixed_part(path)
    if fixed == path:
        root, names = path.parent, [path.name]
    else:
        root = fixed
        wanted = path.relative_to(root).as_posix()
        names = glob.glob(wanted, root_dir=root, recursive=True)
    files = [name for name in names if (root / name).is_file()]
    if not files:
        hint = "; a bracket that is no set of characters is written [[]" if "[" in pattern else ""
        raise ValueError(f"'{pattern}' matches no file (from {Path.cwd()}){hint}")
    for name in files:
        linked = (root / name).resolve() != root.resolve() / name
        yield linked, Document(Path(name).as_posix(), root / name)


def _fixed_part(path: Path) -> Path:
    """A path up to the first part that is a pattern."""
    fixed = Path(path.anchor)
    for part in path.relative_to(fixed).parts:
        if glob.has_magic(part) and not _has_just_that_name(fixed / part):
            return fixed
        fixed /= part
    return fixed


def _has_just_that_name(path: Path) -> bool:
    """Whether there is a `[1].txt`, which the pattern `[1].txt` does not match; `*` matches `*`."""
    return not fnmatch.fnmatchcase(path.name, path.name) and os.path.lexists(path)


def _digest(document: Document) -> bytes:
    """SHA-256 of a document's content."""
    try:
        with document.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise _unreadable(document, error) from error


def _unreadable(document: Document, error: OSError) -> ValueError:
    return ValueError(f"cannot read {document.path}: {error.strerror}; leave it out of the corpus")


def content_hash(documents: Iterable[Document]) -> str:
    """Identifies a corpus: SHA-256 over the names and contents of its documents, in order."""
    total = hashlib.sha256()
    for document in documents:
        total.update(_as_bytes(document.name) + b"\0" + _digest(document))
    return total.hexdigest()


def blocks(document: Document) -> Iterator[str]:
    """Reads a document as whole lines, about `BLOCK_BYTES` at a time; nothing is translated.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    before = 0
    try:
        with document.path.open("rb") as file:
            while lines := file.readlines(BLOCK_BYTES):
                yield _decoded(document, b"".join(lines), before)
                before += len(lines)
    except OSError as error:
        raise _unreadable(document, error) from error


def _decoded(document: Document, block: bytes, before: int) -> str:
    """The text of a block that so many lines stand before."""
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        line = before + block.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{document.path}, line {line}, is not UTF-8 ({error.reason}: "
            f"0x{block[error.start]:02x}); convert it or leave it out"
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
    return int.from_bytes(hashlib.sha256(_as_bytes(name)).digest()[:8]) / 2**64


def _as_bytes(name: str) -> bytes:
    """UTF-8, or the bytes of a name that is none."""
    return name.encode("utf-8", "surrogateescape")
