"""Shape and type checks on, global state restored, threads as on the smallest machine."""

import os

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook finds the checker by its dotted name)

# Every annotated signature of these packages is checked at run time throughout the tests.
install_import_hook(["mneme.ops", "mneme.layers", "mneme.models"], "tests.typecheck.check")

import pytest  # noqa: E402
import torch  # noqa: E402

os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _fresh_global_state():
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def text_cache(tmp_path_factory):
    """One cache of prepared text for the whole session."""
    return tmp_path_factory.getbasetemp().parent / "text-cache"
