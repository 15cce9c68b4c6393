"""Shape and type checks on, global state restored, threads as on the smallest machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no thread but the one that made it

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook finds the checker by its dotted name)

# Every annotated signature of these packages is checked at run time throughout the tests.
install_import_hook(["mneme.ops", "mneme.layers", "mneme.models"], "tests.typecheck.check")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parents[1]
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


@pytest.fixture(scope="session")
def compiled():
    """Asks a program what is wrong with a compiled layer or op; it starts with the first."""
    command = [sys.executable, "-m", "tests.compile_one"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:

        def ask(*words: str) -> str:
            program.stdin.write(" ".join(words) + "\n")
            program.stdin.flush()
            return json.loads(program.stdout.readline() or '"the program ended"')

        yield ask
        program.stdin.close()


PROGRAMS = (
    "harness/",
    "scripts/",
    "test_adding_a_layer.py",
    "test_malformed.py",
    "test_package.py",
)
QUICK = ("harness/test_check.py", "harness/test_targets.py", "harness/test_renames.py")
SLOW = (  # for `make quick`, which leaves them out; all others of conformance stay
    "conformance/test_compile.py", "conformance/test_models.py", "conformance/test_nothing.py",
    "test_every_config_takes_a_step", "test_compiling_changes_nothing", "_in_bf16_over_",
    "test_bfloat16_is_finite_at_length_16k", "test_whatever_is_accepted_is_computed_as_specified",
    "conformance/test_state_fit.py", "conformance/test_not_finite.py", "ops/test_ops_nothing.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Marks whole programs and slow tests by their place, so that a new one is found at once."""
    for item in items:
        place = item.nodeid.removeprefix("tests/")
        if place.startswith(PROGRAMS) and not place.startswith(QUICK):
            item.add_marker("program")
        if any(part in place for part in SLOW):
            item.add_marker("slow")
