"""The count of files that a reader opens is of those in which something ran."""

import torch

from scripts.hops import ROOT, Watch, inside, mixer_of


def test_files_of_a_pass_are_those_that_ran():
    layer, x = mixer_of("gated_deltanet"), torch.randn(2, 40, 64)
    with Watch() as watch:
        layer(x).y.sum().backward()
    assert "layers/matrix/gated_delta_net.py" in watch.files
    assert "ops/gated_delta/chunk.py" in watch.files
    assert all(map(inside, watch.files))
    assert not any("test_time" in name or "protocol" in name for name in watch.files)
    assert all((ROOT / name).exists() for name in watch.files)
    with Watch() as nothing:
        sum(range(3))
    assert not nothing.files
