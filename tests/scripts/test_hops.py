"""The count of files that a reader opens is of the things it says."""

import pytest

from scripts.hops import ROOT, cases, inside


@pytest.mark.filterwarnings("ignore")
def test_files_that_must_run_are_among_those_that_are_counted():
    found = dict(cases())
    titans, deltanet = found["a pass of titans_mag"], found["a pass of gated_deltanet"]
    assert "layers/hybrid/memory_as_gate.py" in titans
    assert "layers/attention/softmax_attention.py" in titans
    assert "layers/matrix/gated_delta_net.py" in deltanet
    assert "ops/gated_delta/chunk.py" in deltanet
    assert not any("test_time" in name for name in deltanet)
    (step,) = (files for name, files in found.items() if name.startswith("a training step"))
    assert "models/lightning_module.py" in step
    assert not any(map(inside, step))
    assert found["a table's row update"] == ["models/optim.py"]
    assert all((ROOT / name).exists() for files in found.values() for name in files)
