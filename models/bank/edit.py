"""Blocks that are deleted, replaced or taken out of a bank, and banks that are put together.

An edit writes the new blocks beside the older ones, and a crash leaves all of its blocks changed or
none (`mneme.storage.generations`). Who has the bank open goes on to read it as it was, and sees the
edit when it is opened again. The bytes of what was deleted or replaced are overwritten at once, or,
where a reader has them open, by the next edit or `compact_bank` after it has closed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.layers.bank.memory_bank import BankShape
from mneme.models.bank.manifest import BankFiles, Manifest, write_bank
from mneme.storage.files import StorageError
from mneme.storage.generations import read_generation
from mneme.storage.writing import compact, edit_generation, locked

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
        StorageError: as `replace_blocks`.
    """
    zero = torch.zeros(())
    _edit(folder, nodes, lambda shape, node: zero.expand(shape.record(node[0])))


def replace_blocks(folder: Path, records: Mapping[Node, Tensor]) -> None:
    """Puts blocks in the place of others, in one edit.

    Args:
        folder: of the bank.
        records: new blocks `[L, r_l, W]` by level and node; they are read one by one.

    Raises:
        StorageError: there is no such bank or block, a block has another shape or is not finite in
            the dtype of the bank, another is writing it, or there is no room. Nothing is changed
            then. Or the older blocks cannot be overwritten now, which the error says.
    """
    _edit(folder, records, lambda shape, node: records[node])


def export_blocks(folder: Path, nodes: Iterable[Node]) -> dict[Node, Tensor]:
    """Copies of blocks in the dtype of the bank, as `replace_blocks` takes them.

    Raises:
        StorageError: there is no such bank or block, or it is damaged.
    """
    with BankFiles(folder) as bank:
        return {node: bank.read(*node) for node in nodes}


def compact_bank(folder: Path) -> Manifest:
    """Writes a bank anew where edits have left blocks beside it, and erases what nobody reads.

    Raises:
        StorageError: there is no bank, a block is damaged, another is writing it, or there is no
            room for another copy.
    """
    return Manifest.of(folder, compact(folder))


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
        StorageError: a child is missing, the banks differ in shape, dtype, router or base model, a
            block is damaged, or as `write_bank`.
    """
    with ExitStack() as opened:
        banks = {
            child: opened.enter_context(BankFiles(folder))
            for child, folder in folders_by_child.items()
        }
        if generic not in banks:
            raise StorageError(
                f"generic must be one of the children {sorted(banks)}, got {generic}"
            )
        first = banks[generic].manifest
        _require_alike(folders_by_child, {c: bank.manifest for c, bank in banks.items()}, generic)
        children = [*range(first.shape.branching)]
        if sorted(banks) != children:
            raise StorageError(
                f"banks are given for the children {sorted(banks)}; needed: {children}"
            )
        return write_bank(
            out,
            first.shape,
            lambda level: _merged(banks, generic, level),
            dtype=first.dtype,
            router=first.router,
            base_model=first.base_model,
            facts=facts,
        )


def _merged(banks: Mapping[int, BankFiles], generic: int, level: int) -> Iterator[Tensor]:
    """The blocks of a level: each child's share of its nodes, in order."""
    if level == 0:
        yield banks[generic].read(0, 0)
        return
    share = banks[generic].manifest.shape.nodes(level) // len(banks)
    for child in sorted(banks):
        for node in range(child * share, (child + 1) * share):
            yield banks[child].read(level, node)


def _require_alike(
    folders: Mapping[int, Path], manifests: Mapping[int, Manifest], first: int
) -> None:
    for child, manifest in manifests.items():
        for name in ("shape", "dtype", "router", "base_model"):
            ours, other = getattr(manifests[first], name), getattr(manifest, name)
            if ours != other:
                raise StorageError(
                    f"banks to be merged must have the same {name}: {ours} in {folders[first]}, "
                    f"{other} in {folders[child]}"
                )


def _edit(folder: Path, nodes: Iterable[Node], block: Callable[[BankShape, Node], Tensor]) -> None:
    with locked(folder):
        older = read_generation(folder)
        manifest = Manifest.of(folder, older)
        by_level: dict[int, list[int]] = {}
        for level, node in dict.fromkeys(nodes):
            manifest.require_node(level, node)
            by_level.setdefault(level, []).append(node)

        def data(level: int, node: int) -> memoryview:
            return manifest.encode(level, node, block(manifest.shape, (level, node)))

        edit_generation(folder, older, by_level, data)
