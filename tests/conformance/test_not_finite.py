"""What is not a number stays in its sequence, and after its token."""

import pytest
import torch

from mneme.layers import LAYERS, Memory
from mneme.ops.contract import contained
from tests.helpers import LAYER_EXAMPLES, example_input, example_layer, run_in_pieces


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(("name", "example"), LAYER_EXAMPLES, ids=str)
def test_a_bad_token_reaches_no_earlier_token_and_no_other_sequence(name, example, bad):
    layer, x = example_layer(name, example), example_input(name, length=20)
    with torch.no_grad(), contained():
        before = layer(x).y
        x[0, 9] = bad
        after = layer(x).y
        pieces = run_in_pieces(layer, x, [12, 8]).y
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :9], before[0, :9])
    assert not after[0, 9].isfinite().all()
    assert not (after.isfinite() & ~pieces.isfinite()).any(), "the state made more of it"
    if issubclass(LAYERS[name].cls, Memory):  # a window has forgotten it some tokens later
        assert not (pieces.isfinite() & ~after.isfinite()).any(), "the state lost it"
