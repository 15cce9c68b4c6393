"""`ProductKeyMemory` is the layer of product-key-memory 0.3.0."""

import pytest
import torch
from product_key_memory import PKM
from torch.nn import functional as F

from mneme.layers import ProductKeyMemory, TableOptions
from tests.peers.compare import assert_same, peer
from tests.peers.mappings.product_key_memory import pkm_options, pkm_weights

CASES = {
    "softmax": {"dim": 10, "heads": 3, "num_keys": 7, "topk": 5, "dim_head": 4},
    "relu": {
        "dim": 9,
        "heads": 2,
        "num_keys": 5,
        "topk": 3,
        "dim_head": 3,
        "non_competitive_gates": True,
    },
    "one row, relu": {
        "dim": 6,
        "heads": 1,
        "num_keys": 4,
        "topk": 1,
        "dim_head": 5,
        "non_competitive_gates": True,
    },
    "all sub-keys": {"dim": 6, "heads": 2, "num_keys": 4, "topk": 4, "dim_head": 2},
    "norm before": {
        "dim": 7,
        "heads": 2,
        "num_keys": 6,
        "topk": 4,
        "dim_head": 3,
        "pre_layernorm": True,
    },
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_layer(arguments):
    dim, options = arguments["dim"], pkm_options(**arguments)
    theirs = peer(lambda: PKM(**arguments))
    ours = ProductKeyMemory(dim, **options, table=TableOptions(update="dense"))
    if arguments.get("pre_layernorm"):
        ours.register_forward_pre_hook(lambda _, inputs: (F.layer_norm(inputs[0], (dim,)),))
    x = torch.randn(2, 9, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_same(ours, theirs, pkm_weights, x)


@pytest.mark.parametrize("option", ["use_layernorm", "concat_values_and_combine", "norm_output"])
def test_what_ours_cannot_be_is_refused(option):
    with pytest.raises(ValueError, match=option):
        pkm_options(**{"dim": 8, option: option != "use_layernorm"})
