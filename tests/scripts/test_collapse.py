"""The thresholds by which a table that is in use is told from one that is not."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts import collapse
from scripts.collapse import control, memory, trained, trained_control


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


@pytest.mark.parametrize("kind", ["isotropic", "common mean"])
def test_a_dense_layer_of_as_many_operations_learns_the_inputs_too(kind):
    assert trained_control(kind, seed=0) > 0.99


def test_the_control_has_as_many_operations():
    def products(layer):
        with FlopCounterMode(display=False) as counter:
            layer(torch.zeros(1, 16, collapse.WIDTH))
        return counter.get_total_flops() / 2 / 16

    reading = collapse.HEADS * collapse.TOP_K * collapse.CLASSES  # which the counter does not see
    assert products(memory("none")) + reading == products(control())


def test_every_kind_of_input_has_a_row_for_each_norm_and_the_control(monkeypatch, capsys):
    monkeypatch.setattr(collapse, "trained", partial(trained, steps=1))
    monkeypatch.setattr(collapse, "trained_control", partial(trained_control, steps=1))
    collapse.run(["--seeds", "0"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    learners = [*collapse.NORMS, "(dense control)"]
    assert [row[:2] for row in cells] == [[k, n] for k in collapse.INPUT_KINDS for n in learners]
    assert all(row[-1] for row in cells)


def test_the_page_of_results_tells_the_constants():
    page = Path(__file__).parents[2] / "docs" / "results" / "sparse_memory.md"
    for remark in collapse.REMARKS:
        assert f"\n- {remark}\n" in page.read_text()
