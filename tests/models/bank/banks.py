"""Small banks for tests, and processes that may be killed over them."""

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from mneme.layers.bank.memory_bank import BankShape
from mneme.models.bank import Manifest, write_bank

SHAPE = BankShape(places=2, branching=2, hidden=(3, 0, 2), width=5)
NODES = [(level, node) for level in (0, 1, 3) for node in range(SHAPE.nodes(level))]


def block(level: int, node: int, *, seed: int = 0, shape: BankShape = SHAPE) -> torch.Tensor:
    """What `save` puts there."""
    generator = torch.Generator().manual_seed(1_000_000 * seed + 1000 * level + node)
    return torch.randn(shape.record(level), generator=generator)


def save(folder: Path, *, seed=0, shape=SHAPE, dtype="float32", **options) -> Manifest:
    """Writes a bank of random blocks."""

    def records(level):
        return (block(level, n, seed=seed, shape=shape) for n in range(shape.nodes(level)))

    return write_bank(folder, shape, records, dtype=dtype, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but locks."""
    return {name: data for name, data in everything(folder).items() if not name.endswith(".lock")}


def everything(folder: Path) -> dict[str, bytes]:
    """All files but the writer's lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def damage(path: Path, at: int) -> None:
    """Flips a bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def fork(act: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Starts a process that runs `act`, which may report; returns its id and where to read.

    A fork of the test is there at once, where a new process would import torch first. It does no
    more than small arithmetic and files, for which it needs none of the threads it has lost.
    """
    out, into = os.pipe()
    if child := os.fork():
        os.close(into)
        return child, out
    try:
        act(lambda text: os.write(into, f"{text}\n".encode()))
    except BaseException:
        os.write(into, traceback.format_exc().encode())
    finally:
        os._exit(0)


def finish(child: int, out: int, *, kill: bool = False) -> tuple[list[str], bool]:
    """Waits for a process, or ends it at once: its reports, and whether it came to its end."""
    if kill:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(out) as file:
        reports = file.read().splitlines()
    _, status = os.waitpid(child, 0)
    return reports, status == 0
