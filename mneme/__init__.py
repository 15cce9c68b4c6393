"""Memory-augmented sequence models behind one protocol.

    import mneme
    from mneme.layers import GatedDeltaNet

    run = mneme.load("runs/NAME")
    print(run.generate("import ", max_new_tokens=200))

The packages are `mneme.ops`, `mneme.layers`, `mneme.models`, `mneme.tasks`, `mneme.routers` and
`mneme.harness`. Nothing is imported before it is asked for, torch included.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from mneme.harness.evaluate.loading import LoadedRun

__all__ = ["__version__", "load"]
__version__ = "0.1.0"

# In a checkout the packages lie beside this folder, which holds relative links to them. Where a
# file system or an archive has made something else of the links, they are looked for there. An
# installed package has real folders here, and must never look among its neighbors.
_here = Path(__file__).resolve().parent
if not (_here / "layers").is_dir() and (_here.parent / "layers" / "__init__.py").is_file():
    if not {"site-packages", "dist-packages"} & {*_here.parts}:
        __path__.append(str(_here.parent))


def load(
    run: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    device: str | torch.device | None = None,
) -> LoadedRun:
    """A trained run, ready to be used: its model, its tokenizer, and text from both.

    Args:
        run: a run directory, or one of its checkpoints.
        checkpoint: which one of a directory: of the best validation, or the newest.
        device: where the model goes; by default a GPU, if there is one.

    Raises:
        mneme.harness.run.run_directory.RunError: no usable run lies there.
    """
    from mneme.harness.evaluate.loading import load as load_run

    return load_run(run, checkpoint=checkpoint, device=device)
