"""What is particular to attention."""

import pytest
import torch

from mneme.layers import SoftmaxAttention
from mneme.layers.parts.rotary import rotate
from tests.helpers import assert_close


def attention(**options):
    torch.manual_seed(0)
    return SoftmaxAttention(16, **options).double()


def x(length=12):
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1)).double()


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()

    def score(a: int, b: int):
        (turned_q,) = rotate(q, positions=torch.tensor([[a]]), base=1e4)
        (turned_k,) = rotate(k, positions=torch.tensor([[b]]), base=1e4)
        return (turned_q * turned_k).sum()

    assert_close(score(1005, 1002), score(3, 0), "score", 1e-12)
    assert (score(5, 0) - score(3, 0)).abs() > 1e-6
    assert torch.equal(rotate(q, positions=torch.tensor([[0]]), base=1e4)[0], q)


def test_a_window_sees_its_width_and_no_more():
    layer, inputs = attention(heads=2, window=4), x()
    for shift, changes in ((3, True), (4, False)):
        changed = inputs.clone()
        changed[:, 11 - shift] += 1
        assert torch.equal(layer(changed).y[:, 11], layer(inputs).y[:, 11]) != changes


def test_a_window_of_one_sees_itself():
    layer, inputs = attention(heads=2, window=1), x()
    alone = torch.cat([layer(inputs[:, t : t + 1]).y for t in range(12)], dim=1)
    assert_close(layer(inputs).y, alone, "window of one")
    assert layer.state_size(100) == 1


def test_the_cache_of_a_window_is_bounded_and_owns_its_memory():
    layer = attention(heads=2, window=4)
    state = layer(x(1000)).state
    assert state.k.shape[1] == 3
    assert state.k.untyped_storage().nbytes() == state.k.numel() * 8


def test_a_wide_window_is_full_attention():
    full, wide = attention(heads=2), attention(heads=2, window=50)
    assert_close(wide(x()).y, full(x()).y, "wide window")


def test_grouped_heads_with_copied_weights_equal_full_heads():
    grouped, full = attention(heads=4, kv_heads=2), attention(heads=4)
    with torch.no_grad():
        k, v = grouped.kv_proj.weight.view(2, 2, 4, 16)
        repeated = torch.stack([k, v]).repeat_interleave(2, dim=1)
        full.kv_proj.weight.copy_(repeated.reshape(32, 16))
        full.q_proj.weight.copy_(grouped.q_proj.weight)
        full.out_proj.weight.copy_(grouped.out_proj.weight)
    assert_close(full(x()).y, grouped(x()).y, "grouped heads")
    assert grouped.state_size(10) < full.state_size(10)


def test_persistent_tokens_are_seen_beyond_the_window_and_are_no_state():
    layer, inputs = attention(heads=2, window=2, persistent=3), x()
    before = layer(inputs).y
    assert layer.state_size(100) == attention(heads=2, window=2).state_size(100)
    with torch.no_grad():
        layer.persistent += 1
    assert (layer(inputs).y - before).abs().amax(-1).min() > 1e-6, "every query sees them"


def test_without_positions_order_in_the_past_does_not_matter():
    layer, inputs = attention(heads=2, rope_base=None), x()
    swapped = inputs[:, [1, 0, *range(2, 12)]]
    assert_close(layer(swapped).y[:, -1], layer(inputs).y[:, -1], "last output")
    assert not torch.allclose(
        attention(heads=2)(swapped).y[:, -1], attention(heads=2)(inputs).y[:, -1]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"heads \(3\) must divide d_model \(16\)"),
        ({"heads": 4, "kv_heads": 3}, r"kv_heads \(3\) must divide heads \(4\)"),
        ({"heads": 2, "head_dim": 3}, "even head_dim, got 3"),
        ({"heads": 2, "window": 0}, "window must be 1 or more, got 0"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        attention(**options)
