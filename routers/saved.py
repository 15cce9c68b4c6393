"""Folders with a router: `router.json`, and one file with all arrays.

The JSON has the router's hash, and the arrays are in `arrays-HASH.npz` (its first 16 digits). It is
written last and replaced whole, so a folder is at every moment the router that its JSON tells of.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mneme.routers.embedders import Arrays
from mneme.routers.errors import RouterError
from mneme.storage.files import read_regular, replacing

NAME = "router.json"

_FORMAT = 1  # of the folder, and of what texts and vectors go through on their way to a leaf


def digest(description: Mapping[str, Any], arrays: Arrays) -> str:
    """A sha256 over a description, as JSON, and names, types, shapes and bytes of arrays."""
    told = {"format": _FORMAT, **description}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        found.update(f"{name} {little.dtype.str} {little.shape}".encode())
        found.update(little.tobytes())
    return found.hexdigest()


def write(folder: Path, description: Mapping[str, Any], arrays: Arrays) -> None:
    """Writes a folder, or replaces the router that is in it.

    Raises:
        RouterError: the folder cannot be written.
    """
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    identity = digest(description, arrays)
    file = _arrays_of(folder, identity)
    sha256 = hashlib.sha256(content.getvalue()).hexdigest()
    told = {"format": _FORMAT, "hash": identity, "arrays": sha256, "router": description}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in (
            (file, content.getvalue()),
            (folder / NAME, (json.dumps(told, indent=2) + "\n").encode()),
        ):
            with replacing(path) as opened:
                opened.write(data)
        for old in folder.glob(_arrays_of(folder, "*").name):
            if old != file:
                old.unlink()
    except OSError as error:
        raise RouterError(f"cannot write the router to {folder}: {error}") from error


def read(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """The description and the arrays of a folder, both as they were written.

    Raises:
        RouterError: a file is not there, or not as it was written.
    """
    file = folder / NAME
    try:
        told = json.loads(read_regular(file))
        version, identity, sha256 = told["format"], str(told["hash"]), told["arrays"]
        description = dict(told["router"])
    except OSError as error:
        raise RouterError(f"{folder} has no router that can be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RouterError(f"{file} is damaged; save the router again") from error
    if version != _FORMAT:
        raise RouterError(
            f"{file} has format {version}; this version reads {_FORMAT}; fit the router again"
        )
    arrays = _read_arrays(_arrays_of(folder, identity), sha256)
    if digest(description, arrays) != identity:
        raise RouterError(f"{file} was changed: its options are not those of its hash")
    return description, arrays


def _arrays_of(folder: Path, identity: str) -> Path:
    return folder / f"arrays-{identity[:16]}.npz"


def _read_arrays(file: Path, sha256: str) -> Arrays:
    try:
        content = read_regular(file)
    except OSError as error:
        raise RouterError(f"cannot read the router's arrays: {error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RouterError(f"{file} was changed or cut short; save the router again")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RouterError(f"{file} is no file of arrays: {error}") from error
