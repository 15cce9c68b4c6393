"""The thresholds by which a table that is in use is told from one that is not."""

import pytest

from scripts.collapse import trained


def test_isotropic_inputs_use_the_table():
    run = trained("isotropic", "none", seed=0)
    assert run.accuracy > 0.99
    assert run.after["usage"] > 95
    assert run.after["kl_reads"] < 0.2


def test_a_common_mean_leaves_most_rows_unused_without_a_norm():
    run = trained("common mean", "none", seed=0)
    assert run.accuracy > 0.99, "the collapse does not show in accuracy"
    assert run.after["usage"] < 30


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_query_norm_brings_them_into_use(norm):
    run = trained("common mean", norm, seed=0)
    assert run.accuracy > 0.99
    assert run.after["usage"] > 85
