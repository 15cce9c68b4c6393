"""Attaches banks that `AttachedBank.save` wrote: in memory for training, on disk for serving."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mneme.layers.bank.memory_bank import BankOptions, MemoryBank
from mneme.models.bank.attach import AttachedBank
from mneme.models.bank.errors import BankError
from mneme.models.bank.hashing import model_hash
from mneme.models.bank.manifest import Manifest, open_levels
from mneme.models.bank.reading import Read
from mneme.models.bank.stored import CACHE_BYTES, StoredBank


def attach_saved(
    model: nn.Module, folder: Path, *, router: str | None = None, freeze: bool = True
) -> AttachedBank:
    """Attaches a bank that `AttachedBank.save` wrote, in memory, to be trained on.

    Args:
        model: with the weights that it had then.
        folder: of the bank.
        router: hash of the router that will give routes; None does not compare.
        freeze: as in `attach_bank`.

    Raises:
        BankError: there is no such bank, it is damaged, or is of another model or router.
    """
    manifest, files = open_levels(folder, router=router, base_model=model_hash(model))
    shape, layers = manifest.shape, _fact(manifest, "layers", folder)
    options = _fact(manifest, "options", folder)
    options = BankOptions(**{**options, "hidden": tuple(options["hidden"])})
    with torch.device("meta"):
        bank = MemoryBank(shape, shape.width // 3, options)
    bank.to_empty(device="cpu")
    for level, file in files.items():
        for node in range(shape.nodes(level)):
            bank.write(level, node, file.read(node))
    return AttachedBank(model, bank, layers=layers, freeze=freeze)


def attach_stored(
    model: nn.Module,
    folder: Path,
    *,
    router: str | None = None,
    cache_bytes: int | Mapping[int, int] = CACHE_BYTES,
    read: Read = "auto",
) -> AttachedBank:
    """Attaches a bank that `AttachedBank.save` wrote, and leaves it on disk: for serving.

    Args:
        model: with the weights that it had then.
        folder: of the bank.
        router: hash of the router that will give routes; None does not compare.
        cache_bytes: see `StoredBank`.
        read: likewise.

    Raises:
        BankError: as `attach_saved`.
    """
    bank = StoredBank(
        folder,
        router=router,
        base_model=model_hash(model),
        cache_bytes=cache_bytes,
        read=read,
    )
    attached = AttachedBank(model, bank, layers=_fact(bank.manifest, "layers", folder))
    bank.to(attached.base_model.dtype)
    return attached


def _fact(manifest: Manifest, name: str, folder: Path) -> Any:
    if name not in manifest.facts:
        raise BankError(
            f"the bank in {folder} does not say its {name}, as one that AttachedBank.save wrote "
            "does; if it was merged, give merge_banks the facts of its parts"
        )
    return manifest.facts[name]
