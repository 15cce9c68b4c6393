"""Writing a bank: its levels one record after another, its manifest last."""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float
from torch import Tensor

from mneme.layers.bank.memory_bank import BankShape
from mneme.models.bank.errors import BankError
from mneme.models.bank.journal import (
    JOURNAL,
    LEVEL_NAME,
    apply_journal,
    locked,
    remove_journal,
    told,
)
from mneme.models.bank.layout import Dtype, LevelLayout
from mneme.models.bank.level_file import checksum_table, header
from mneme.models.bank.manifest import MANIFEST, Manifest
from mneme.storage.atomic_file import replacing, sync_folder
from mneme.storage.regular_file import read_regular

_PART = re.compile(rf"\.({LEVEL_NAME.pattern}|{MANIFEST}|{JOURNAL})\.\w+")  # left by `replacing`


def write_bank(
    folder: Path,
    shape: BankShape,
    records: Callable[[int], Iterable[Tensor]],
    *,
    dtype: Dtype,
    router: str | None = None,
    base_model: str | None = None,
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Writes a bank, in the place of the one that the folder has.

    A crash at any moment leaves the older bank whole, or the newer one; when this returns, the
    newer one is on disk. The older files stay until then, so there must be room for both. One
    record at a time is in memory.

    Args:
        folder: made if it is not there.
        shape: sizes.
        records: gives the blocks `[L, r_l, W]` of a level, in the order of its nodes; asked for
            level 0, the generic block, and for each level that has units.
        dtype: in which numbers are stored; the records may have another.
        router: hash of the router whose leaves the blocks were trained for.
        base_model: hash of the model that was trained with them, see `model_hash`.
        facts: kept with the bank; what JSON can hold.

    Raises:
        BankError: another is writing the bank, there is no room, or a record has another shape,
            is missing or is not finite in `dtype`. The older bank is as it was.
        ValueError: `dtype` is none of those above.
        TypeError: JSON cannot hold the facts.
    """
    kept_facts = json.loads(json.dumps(facts or {}))
    _make(folder)
    with locked(folder):
        with suppress(
            BankError
        ):  # of a broken bank: its journal stays until the newer one is there
            apply_journal(folder)
        older = _in_use(folder)
        generation = max(_generations(folder).values(), default=0) + 1
        manifest = Manifest(generation, shape, dtype, router, base_model, kept_facts)
        _remove_all_but(folder, older)
        try:
            for level in manifest.levels:
                _write_level(folder, manifest.layout(level), records(level))
            _write_manifest(folder, manifest)
        except BaseException:
            published = _names(folder, manifest)  # so that what failed came after it
            _remove_all_but(folder, older | ({generation} if published else set()))
            raise
        remove_journal(folder)
        _remove_all_but(folder, {generation})
    return manifest


def encode_block(
    layout: LevelLayout, node: int, record: Float[Tensor, "places r w"]
) -> tuple[memoryview, int]:
    """The bytes of a block and their checksum.

    Raises:
        BankError: the block has another shape, or is not finite when stored.
    """
    where = f"block {node} of level {layout.level}"
    if tuple(record.shape) != layout.record_shape:
        raise BankError(
            f"{where} must have the shape {layout.record_shape}, got {tuple(record.shape)}"
        )
    data = layout.encode(record)
    if not bool(layout.decode(data).isfinite().all()):
        raise BankError(
            f"{where} is not finite in {layout.dtype}, and only finite blocks can be stored"
        )
    return data, xxhash.xxh3_64_intdigest(data)


def _write_level(folder: Path, layout: LevelLayout, records: Iterable[Tensor]) -> None:
    path, checksums = folder / layout.file_name, np.zeros(layout.nodes, dtype=np.uint64)
    padding, written = bytes(layout.stride - layout.record_bytes), 0
    with told(path, layout.file_bytes), replacing(path) as file:
        file.seek(layout.records)
        for node, record in enumerate(records):
            written += 1
            if written > layout.nodes:
                break
            data, checksums[node] = encode_block(layout, node, record)
            file.write(data)
            file.write(padding)
        if written != layout.nodes:
            more = "more" if written > layout.nodes else f"only {written}"
            raise BankError(f"level {layout.level} has {layout.nodes} blocks; {more} were given")
        file.seek(0)
        file.write(header(layout))
        file.write(checksum_table(checksums))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    path, data = folder / MANIFEST, manifest.to_bytes()
    with told(path, len(data)), replacing(path) as file:
        file.write(data)


def _in_use(folder: Path) -> set[int]:
    """Generations whose files are to be kept: the manifest's, or all if that cannot be read."""
    path = folder / MANIFEST
    if not path.exists():
        return set()
    try:
        return {Manifest.from_bytes(path, read_regular(path)).generation}
    except (BankError, OSError):
        return set(_generations(folder).values())


def _names(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder has this manifest."""
    with suppress(OSError):
        return read_regular(folder / MANIFEST) == manifest.to_bytes()
    return False


def _generations(folder: Path) -> dict[Path, int]:
    """Of all files of levels."""
    found = {path: LEVEL_NAME.fullmatch(path.name) for path in folder.iterdir()}
    return {path: int(match[1]) for path, match in found.items() if match}


def _remove_all_but(folder: Path, generations: set[int]) -> None:
    """Removes files of other generations, and parts of files; what cannot be removed now, later."""
    with suppress(OSError):
        parts = [path for path in folder.iterdir() if _PART.fullmatch(path.name)]
        others = [path for path, g in _generations(folder).items() if g not in generations]
        for path in parts + others:
            path.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    """Makes a folder and those above it, on disk when this returns."""
    if not folder.exists():
        _make(folder.parent)
        with told(folder):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
