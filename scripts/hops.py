"""Counts the files that a reader opens to follow one thing: those of which a line runs.

    python scripts/hops.py            # a table
    python scripts/hops.py --files    # and the files

Protocol, registry and `layers/parts` are left out: they are read once, for all layers.
"""

import argparse
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lightning.pytorch import Callback
from torch import nn

from mneme.harness.cli import report_errors
from mneme.harness.config.build import build
from mneme.harness.config.compose import compose_checked
from mneme.harness.run.run_directory import RunDirectory
from mneme.harness.run.training import optimizer_factory, prepare, train
from mneme.models import make_optimizer

ROOT = Path(__file__).resolve().parent.parent
ONCE = ("layers/protocol", "layers/registry", "layers/state_fit", "layers/parts/", "scripts/")


class Watch:
    """Notes the files of this project in which a function runs."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.seen.add(frame.f_code.co_filename)

    def __enter__(self) -> "Watch":
        threading.setprofile(self._note)  # a backward pass may have a thread of its own
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    @property
    def files(self) -> list[str]:
        """Paths of the files seen, from the root of the project, sorted."""
        paths = [Path(name).resolve() for name in self.seen]
        own = [str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT)]
        return sorted({name for name in own if not name.startswith((".", "<", *ONCE))})


class WatchSteps(Callback):
    """Watches updates of a run, from batch to batch."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, *_: object) -> None:
        """Starts to watch."""
        self.watch.__enter__()

    def on_train_batch_end(self, *_: object) -> None:
        """Stops watching."""
        self.watch.__exit__()


def mixer_of(choice: str) -> nn.Module:
    """The mixer of one block, as a command line chooses it."""
    config = compose_checked([f"mixer={choice}", "model.d_model=64", "model.n_layers=2"])
    layer: nn.Module = build(config.config["mixer"])(64)
    return layer


def cases() -> Iterator[tuple[str, list[str]]]:
    """Yields what is followed, and the files that run for it."""
    x = torch.randn(2, 40, 64)
    for name in ("gated_deltanet", "titans_mag"):
        layer = mixer_of(name)
        with Watch() as watch:
            layer(x).y.sum().backward()
        yield f"a pass of {name}", watch.files
    small = ["model.d_model=64", "model.n_layers=2", "task.batch_size=2", "logger=csv",
             "trainer.max_steps=2", "trainer.val_check_interval=2",
             "trainer.enable_progress_bar=false"]  # fmt: skip
    prepared = prepare(compose_checked(small).config)
    with Watch() as watch:
        build(prepared.config["model"], vocab_size=64)
    yield "from config to model, without its layers", [f for f in watch.files if not inside(f)]
    with tempfile.TemporaryDirectory() as place:
        train(prepared, RunDirectory(Path(place)), callbacks=[WatchSteps(watch := Watch())])
    yield "a training step, without its layers", [f for f in watch.files if not inside(f)]
    prepared = prepare(compose_checked([*small, "ffn=pkm", "ffn.sub_keys=16"]).config)
    optimizer = make_optimizer(prepared.model, optimizer_factory(prepared.config))
    prepared.model(prepared.task.train_batch(0).inputs).y.logsumexp(-1).mean().backward()
    with Watch() as watch:
        optimizer.step()
    yield "a table's row update", watch.files


def inside(file: str) -> bool:
    """Whether it belongs to what a model is made of."""
    return file.startswith(("layers/", "ops/"))


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python scripts/hops.py", description=__doc__)
    parser.add_argument("--files", action="store_true", help="name them")
    options = parser.parse_args(arguments)
    for name, files in cases():
        print(f"{name}: {len(files)}")
        if options.files:
            print("".join(f"    {file}\n" for file in files), end="")


if __name__ == "__main__":
    with report_errors():
        main(sys.argv[1:])
