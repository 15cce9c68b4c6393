"""Memory banks in files: writing them, and what opening one checks.

L places, k children of a node, r_l units of a block of level l, W elements of a unit.

A bank is a folder of blocks (`mneme.storage.generations`), level 0 of which is the generic block.
The nodes of a level are in tree order: the blocks below a node are neighbors in each file. A block
is `[L, r_l, W]`; the elements of a place lie unit by unit, so that blocks of several levels join
along one axis for every kind of block. Of the kind "ffn", a unit is its row of M1, its row of M2
and its column of M3, next to each other. arXiv 2510.02375 leaves the order open.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.bank.memory_bank import BankShape
from mneme.layers.protocol import require_choice
from mneme.storage.files import StorageError
from mneme.storage.generations import MANIFEST, Generation, hold_generation, read_generation
from mneme.storage.record_file import AGAIN, Dtype, tensor_bytes, tensor_of
from mneme.storage.writing import write_generation

_SHOWN = 12  # digits of a hash in a message


@dataclass(frozen=True)
class Manifest:
    """What a bank is.

    Attributes:
        generation: which write or edit of the bank this is.
        shape: sizes.
        dtype: of stored elements.
        router: hash of the router whose leaves the blocks were trained for; None if not known.
        base_model: hash of the model that was trained with them; None if not known.
        facts: of the caller, such as `{"step": 500}`; what JSON can hold.
    """

    generation: int
    shape: BankShape
    dtype: Dtype
    router: str | None
    base_model: str | None
    facts: dict[str, Any]

    @property
    def levels(self) -> list[int]:
        """The levels that have blocks; 0 is the generic block's."""
        return [0, *self.shape.levels]

    def encode(self, level: int, node: int, block: Float[Tensor, "places r w"]) -> memoryview:
        """The bytes of a block.

        Raises:
            StorageError: the block has another shape, or is not finite when stored.
        """
        where, shape = f"block {node} of level {level}", self.shape.record(level)
        if tuple(block.shape) != shape:
            raise StorageError(f"{where} must have the shape {shape}, got {tuple(block.shape)}")
        data = tensor_bytes(block, self.dtype)
        if not bool(tensor_of(data, self.dtype, shape).isfinite().all()):
            raise StorageError(
                f"{where} is not finite in {self.dtype}, and only finite blocks can be stored"
            )
        return data

    def decode(self, level: int, data: Any) -> Float[Tensor, "places r w"]:
        """A block of its bytes, see `mneme.storage.record_file.tensor_of`."""
        return tensor_of(data, self.dtype, self.shape.record(level))

    def require_node(self, level: int, node: int) -> None:
        """Raises StorageError where there is no such block."""
        if level not in self.levels:
            raise StorageError(f"the bank has no blocks at level {level}, only at {self.levels}")
        if not 0 <= node < self.shape.nodes(level):
            last = self.shape.nodes(level) - 1
            raise StorageError(f"level {level} has blocks 0 to {last}, and no {node}")

    @classmethod
    def of(cls, folder: Path, generation: Generation) -> "Manifest":
        """What a generation of a folder says of its bank.

        Raises:
            StorageError: it does not say what a bank has.
        """
        try:
            about = dict(generation.about)
            shape = about.pop("shape")
            shape = BankShape(**{**shape, "hidden": tuple(shape["hidden"])})
            found = cls(generation.number, shape, facts=generation.facts, **about)
            sizes = {n: (level.count, level.block_bytes) for n, level in generation.levels.items()}
            if sizes != _sizes(shape, found.dtype):
                raise ValueError(f"its levels are not those of {shape}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            path = folder / MANIFEST
            raise StorageError(f"{path} is of no bank ({error}); {AGAIN['blocks']}") from error
        return found


class BankFiles(AbstractContextManager["BankFiles"]):
    """A bank in files as it is now, until this is closed: what is edited meanwhile is not seen.

    Args:
        folder: what `write_bank` wrote.
        router: hash of the router that will choose blocks; None does not compare.
        base_model: hash of the model that will use them; None does not compare.

    Attributes:
        manifest: of the bank.
        held: its files, all of them open.

    Raises:
        StorageError: there is no bank, its manifest or a file is damaged, missing or of another
            version, or it was written for another router or base model.
    """

    def __init__(
        self, folder: Path, *, router: str | None = None, base_model: str | None = None
    ) -> None:
        self.held = hold_generation(folder)
        try:
            self.manifest = _checked(folder, self.held.generation, router, base_model)
            self.held.open_files()
        except BaseException:
            self.close()
            raise

    def read(self, level: int, node: int) -> Float[Tensor, "places r w"]:
        """A block, in the dtype of the bank.

        Raises:
            StorageError: there is no such block, or it cannot be read or is damaged.
        """
        self.manifest.require_node(level, node)
        return self.manifest.decode(level, self.held.read(level, node))

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files."""
        self.held.close()


def read_manifest(
    folder: Path, *, router: str | None = None, base_model: str | None = None
) -> Manifest:
    """What a bank is now; arguments and errors as those of `BankFiles`, but for files of levels."""
    return _checked(folder, read_generation(folder), router, base_model)


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
    block at a time is in memory.

    Args:
        folder: made if it is not there.
        shape: sizes.
        records: gives the blocks `[L, r_l, W]` of a level, in the order of its nodes; asked for
            level 0, the generic block, and for each level that has units.
        dtype: in which elements are stored; the blocks may have another.
        router: hash of the router whose leaves the blocks were trained for.
        base_model: hash of the model that was trained with them, see `model_hash`.
        facts: kept with the bank; what JSON can hold.

    Raises:
        StorageError: another is writing the bank, there is no room, or a block has another shape,
            is missing or is not finite in `dtype`. The older bank is as it was.
        ValueError: `dtype` is none of those above.
        TypeError: JSON cannot hold the facts.
    """
    require_choice(Dtype, dtype=dtype)
    to_be = Manifest(0, shape, dtype, router, base_model, facts or {})
    about = {name: asdict(to_be)[name] for name in ("shape", "dtype", "router", "base_model")}
    written = write_generation(
        folder,
        _sizes(shape, dtype),
        lambda level: (to_be.encode(level, n, block) for n, block in enumerate(records(level))),
        about=about,
        facts=to_be.facts,
    )
    return Manifest.of(folder, written)


def verify_bank(folder: Path) -> list[str]:
    """Reads and checks every block of a bank; returns all problems, none of a sound one."""
    try:
        with hold_generation(folder) as held:
            Manifest.of(folder, held.generation)
            return held.problems()
    except StorageError as error:
        return [str(error)]


def model_hash(module: nn.Module, leave_out: Collection[str] = ("bank",)) -> str:
    """The hash that ties a bank to the model it was trained with.

    SHA-256 of a model's weights: names, dtypes, shapes and bytes, in the order of names. It is the
    same after saving and loading, on any device. Another name of the same module gives another
    hash, so hash what is saved: the model, not a module around it.

    Args:
        module: its parameters and persistent buffers count, and no other state.
        leave_out: parts of dotted names. What has one of them is left out: the bank, above all,
            which is what the base model is the rest of.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor) or not set(name.split(".")).isdisjoint(leave_out):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        elements = tensor.cpu().contiguous().view(-1)  # state_dict has detached it
        digest.update(elements.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sizes(shape: BankShape, dtype: Dtype) -> dict[int, tuple[int, int]]:
    """Blocks of each level, and bytes of each."""
    item = getattr(torch, dtype).itemsize
    return {
        level: (shape.nodes(level), prod(shape.record(level)) * item)
        for level in (0, *shape.levels)
    }


def _checked(
    folder: Path, generation: Generation, router: str | None, base_model: str | None
) -> Manifest:
    """The manifest, compared with what is to use the bank."""
    manifest = Manifest.of(folder, generation)
    for what, found, given, remedy in (
        ("router", manifest.router, router, "route with that router"),
        ("base model", manifest.base_model, base_model, "use the weights of that base model"),
    ):
        if given is not None and found != given:
            known = f"for the {what} {found[:_SHOWN]}" if found else f"without naming its {what}"
            raise StorageError(
                f"the bank in {folder} was written {known}, and is used with {given[:_SHOWN]}; "
                f"{remedy}, or write a bank for this one"
            )
    return manifest
