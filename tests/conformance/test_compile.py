"""torch.compile changes nothing: compiled equals eager in output, state and gradients."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mneme.layers import LAYERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def differences():
    command = [sys.executable, "-m", "tests.conformance.compile_all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_equals_eager(differences, name):
    assert differences[name] == ""
