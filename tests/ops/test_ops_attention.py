"""What is peculiar to attention: windows, the past, and memory that does not grow with T x S."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mneme.ops import OPS
from mneme.ops.attention import attention
from tests.ops.calls import make, results
from tests.ops.closeness import assert_close

OP = OPS["attention"]


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("window", [1, 2, 64, 65, 1000])
@pytest.mark.parametrize("prefix", [0, 3])
def test_windows_of_all_lengths(window, prefix):
    inputs = make(OP, 140, regime="window_prefix_past") | {"window": window, "prefix": prefix}
    assert_close(results(attention, inputs), results(OP.naive, inputs), 1e-10)


@pytest.mark.parametrize("regime", OP.regimes)
def test_one_query_at_a_time_equals_all_at_once(regime):
    inputs = make(OP, 20, regime=regime)
    whole, first = attention(**inputs), inputs["k"].shape[1] - 20
    for t in range(20):
        seen = {"k": inputs["k"][:, : first + t + 1], "v": inputs["v"][:, : first + t + 1]}
        step = attention(**inputs | seen | {"q": inputs["q"][:, t : t + 1]})
        assert_close({"y": step}, {"y": whole[:, t : t + 1]}, 1e-12)


def test_a_window_makes_nothing_of_size_queries_by_keys():
    inputs = make(OP, 8192, batch=1, dtype=torch.float32, regime="window")
    with _LargestTensor() as seen:
        y = attention(**inputs)
    assert seen.numel == y.numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"prefix": -1}, "prefix of -1"),
        ({"prefix": 6}, "5 keys cannot hold a prefix of 6 and 5 queries"),
    ],
)
def test_impossible_options_are_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        attention(**make(OP, 5) | options)


def test_key_heads_must_divide_query_heads():
    with pytest.raises(ValueError, match=r"key heads \(4\) must divide query heads \(6\)"):
        attention(**make(OP, 5, key_heads=4))
