"""Blocks that are deleted, replaced or taken out of a bank, and banks that are put together.

An edit changes files in place, and a crash leaves all of its blocks changed or none (see
`mneme.models.bank.journal`). Who has the bank open for reading must open it again after an edit. A
bank that was opened before has the checksums of then, and takes a new block for a damaged one; a
`StoredBank` also goes on to give blocks that it has kept from before.

A folder that cannot be written can be read, unless an edit of it was cut short. Then it must be
opened once where it can be written.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mneme.layers.bank.memory_bank import BankShape
from mneme.models.bank.errors import BankError
from mneme.models.bank.journal import Patch, apply_journal, locked, write_journal
from mneme.models.bank.layout import WORD, LevelLayout
from mneme.models.bank.level_file import LevelFile, checksum_table, words
from mneme.models.bank.manifest import Manifest, open_levels
from mneme.models.bank.writer import encode_block, write_bank

Node = tuple[int, int]
"""A level and a node of it; (0, 0) is the generic block."""


def nodes_below(shape: BankShape, level: int, node: int) -> list[Node]:
    """A node and all below it, level by level: those that have blocks.

    Raises:
        ValueError: there is no such node in the tree.
    """
    if not 1 <= level <= shape.depth or not 0 <= node < shape.nodes(level):
        raise ValueError(
            f"there is no node {node} at level {level}: levels are 1 to {shape.depth}, and level l "
            f"has nodes 0 to {shape.branching}^l - 1"
        )
    below = []
    for lower in (lower for lower in shape.levels if lower >= level):
        share = shape.nodes(lower - level)
        below += [(lower, n) for n in range(node * share, (node + 1) * share)]
    return below


def delete_block(folder: Path, level: int, node: int) -> None:
    """As `delete_blocks`, for one."""
    delete_blocks(folder, [(level, node)])


def replace_block(folder: Path, level: int, node: int, record: Float[Tensor, "places r w"]) -> None:
    """As `replace_blocks`, for one."""
    replace_blocks(folder, {(level, node): record})


def export_block(folder: Path, level: int, node: int) -> Float[Tensor, "places r w"]:
    """As `export_blocks`, for one."""
    return export_blocks(folder, [(level, node)])[level, node]


def delete_blocks(folder: Path, nodes: Iterable[Node]) -> None:
    """Sets blocks to zero, in one edit; with `nodes_below`, a node and all below it.

    A block of zeros of the kind "ffn" or "lora" contributes nothing. One of the kind "kv" has keys
    and values of zero, which add nothing themselves but still take their share of the softmax over
    the slots of a path. So does a block of that kind at the start of training.

    Raises:
        BankError: as `replace_blocks`.
    """
    zero = torch.zeros(())
    _edit(folder, nodes, lambda node, layout: zero.expand(layout.record_shape))


def replace_blocks(folder: Path, records: Mapping[Node, Tensor]) -> None:
    """Puts blocks in the place of others, in one edit.

    There must be room for a copy of the new blocks, as the journal has them for a moment.

    Args:
        folder: of the bank.
        records: new blocks `[L, r_l, W]` by level and node; they are read one by one.

    Raises:
        BankError: there is no such bank or block, a record has another shape or is not finite in
            the dtype of the bank, another is writing it, or there is no room. Nothing is changed
            then. Or a file cannot be written while it is changed. The error says so, and the edit
            is made when the bank is next opened.
    """
    _edit(folder, records, lambda node, layout: records[node])


def export_blocks(folder: Path, nodes: Iterable[Node]) -> dict[Node, Tensor]:
    """Copies of blocks in the dtype of the bank, as `replace_blocks` takes them.

    Raises:
        BankError: there is no such bank or block, or it is damaged.
    """
    _, levels = open_levels(folder)
    return {(level, node): _level(levels, level).read(node) for level, node in nodes}


def merge_banks(
    folders_by_child: Mapping[int, Path],
    out: Path,
    *,
    generic: int,
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Writes a bank whose subtrees were trained apart.

    Runs that train one subtree each, with the same base model, change no block of another's. So a
    bank can be trained in parts, and a part trained again.

    Args:
        folders_by_child: for each node of level 1, the bank that has its subtree.
        out: folder of the new bank.
        generic: whose bank has the generic block.
        facts: kept with the new bank.

    Raises:
        BankError: a child is missing, the banks differ in shape, dtype, router or base model, a
            block is damaged, or as `write_bank`.
    """
    banks = {child: open_levels(folder) for child, folder in folders_by_child.items()}
    if generic not in banks:
        raise BankError(f"generic must be one of the children {sorted(banks)}, got {generic}")
    _require_alike(folders_by_child, {child: m for child, (m, _) in banks.items()}, generic)
    first = banks[generic][0]
    children = [*range(first.shape.branching)]
    if sorted(banks) != children:
        raise BankError(f"banks are given for the children {sorted(banks)}; needed: {children}")
    files = {child: levels for child, (_, levels) in banks.items()}
    return write_bank(
        out,
        first.shape,
        lambda level: _merged(files, generic, level),
        dtype=first.dtype,
        router=first.router,
        base_model=first.base_model,
        facts=facts,
    )


def _merged(
    files: Mapping[int, Mapping[int, LevelFile]], generic: int, level: int
) -> Iterator[Tensor]:
    """The blocks of a level: each child's share of its nodes, in order."""
    if level == 0:
        yield files[generic][0].read(0)
        return
    share = files[generic][level].layout.nodes // len(files)
    for child in sorted(files):
        for node in range(child * share, (child + 1) * share):
            yield files[child][level].read(node)


def _require_alike(
    folders: Mapping[int, Path], manifests: Mapping[int, Manifest], first: int
) -> None:
    for child, manifest in manifests.items():
        for name in ("shape", "dtype", "router", "base_model"):
            ours, other = getattr(manifests[first], name), getattr(manifest, name)
            if ours != other:
                raise BankError(
                    f"banks to be merged must have the same {name}: {ours} in {folders[first]}, "
                    f"{other} in {folders[child]}"
                )


def _level(levels: Mapping[int, LevelFile], level: int) -> LevelFile:
    if level not in levels:
        raise BankError(f"the bank has no blocks at level {level}, only at {sorted(levels)}")
    return levels[level]


def _edit(
    folder: Path, nodes: Iterable[Node], record: Callable[[Node, LevelLayout], Tensor]
) -> None:
    with locked(folder):
        apply_journal(folder)
        _, levels = open_levels(folder)
        write_journal(folder, _patches(levels, nodes, record))
        apply_journal(folder)


def _patches(
    levels: Mapping[int, LevelFile],
    nodes: Iterable[Node],
    record: Callable[[Node, LevelLayout], Tensor],
) -> Iterator[Patch]:
    """The records and their checksums, then the checksum of those for every level."""
    changed: dict[int, np.ndarray] = {}
    for level, node in nodes:
        file = _level(levels, level)
        layout = file.layout
        file.require_node(node)
        if level not in changed:
            changed[level] = file.checksums.copy()
        table = changed[level]
        data, table[node] = encode_block(layout, node, record((level, node), layout))
        yield Patch(layout.file_name, layout.offset(node), data)
        yield Patch(layout.file_name, layout.entry(node), words(table[node : node + 1]))
    for level, table in changed.items():
        layout = levels[level].layout
        yield Patch(layout.file_name, layout.table, checksum_table(table)[:WORD])
