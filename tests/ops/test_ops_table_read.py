"""What is peculiar to reads of a table: gradients by row, precision, and what calls look like."""

import inspect
import runpy
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mneme.ops.table_read import dot_rows, kernels, sum_rows, sum_rows_naive
from tests.ops.closeness import relative_error

READS = {"sum": sum_rows, "dot": dot_rows}
every_read = pytest.mark.parametrize("read", READS)


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def indices(rows, *shape, seed=0):
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


def factor(read, rows, width, dtype=torch.float32):
    """The other argument of a read: weights of `sum_rows`, or tokens of `dot_rows`."""
    return normal(*rows.shape[:-1], rows.shape[-1] if read == "sum" else width, seed=1, dtype=dtype)


def table_gradient(read, table, rows, other, **options):
    """Gradient of the table for a fixed random gradient of the result, as an optimizer sees it."""
    leaf = table.detach().clone().requires_grad_()
    y = READS[read](leaf, rows, other, **options)
    y.backward(normal(*y.shape, seed=2, dtype=y.dtype))
    return leaf.grad


# Elements of lookups of one row around the length from which they are summed in two stages.
LONGEST = kernels._LONGEST
HITS = {
    "typical": [3, 1, 0, 2, 0, 0, 4],
    "one_row": [0, 0, 10_000],
    "all_unique": [1] * 96,
    "around_the_longest": [LONGEST - 1, LONGEST, 0, LONGEST + 1, 2 * LONGEST, 2 * LONGEST + 1, 5],
}


def lookups(hits, tokens=2):
    """Rows that come up as often as given, in random places; what does not fit is left out."""
    flat = torch.arange(len(hits)).repeat_interleave(torch.tensor(hits))
    flat = flat[: len(flat) // tokens * tokens]
    shuffled = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    return flat[shuffled].view(tokens, -1)


@every_read
@pytest.mark.parametrize("case", HITS)
def test_sparse_gradient_is_the_dense_one_bit_for_bit(read, case):
    rows = lookups(HITS[case])
    table = normal(len(HITS[case]), 5)
    other = factor(read, rows, 5)
    dense = table_gradient(read, table, rows, other)
    sparse = table_gradient(read, table, rows, other, sparse_grad=True)
    assert sparse.layout == torch.sparse_coo
    assert sparse.sparse_dim() == 1
    assert sparse._indices()[0].tolist() == sorted(set(rows.flatten().tolist()))
    assert torch.equal(sparse.to_dense(), dense)


@every_read
def test_sparse_gradients_of_several_reads_add_up_coalesced(read):
    table = normal(20, 3).requires_grad_()
    first, second = indices(20, 4, 2), indices(20, 4, 2, seed=1)
    both = [
        READS[read](table, rows, factor(read, rows, 3), sparse_grad=True)
        for rows in (first, second)
    ]
    (grad,) = torch.autograd.grad(sum(y.sum() for y in both), table)
    assert grad.is_coalesced()
    assert set(grad.indices()[0].tolist()) == set(torch.cat((first, second)).flatten().tolist())


def test_gradient_of_a_row_is_the_sum_over_its_lookups_and_of_others_exactly_zero():
    rows = torch.tensor([[4, 1, 4], [1, 2, 4]])
    weights, dy = torch.tensor([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]]), torch.tensor([[1.0], [3.0]])
    table = normal(6, 1).requires_grad_()
    sum_rows(table, rows, weights).backward(dy)
    assert table.grad.flatten().tolist() == [0, 1 + 12, 24, 0, 0.5 + 2 + 48, 0]


def test_gradient_of_a_row_adds_its_tokens_in_their_order_bit_for_bit():
    """With weights whose products are exact, since fused multiply-adds round once."""
    rows, table, weights = indices(300, 64, 8), normal(300, 12), 2.0 ** indices(5, 64, 8)
    expected, dy = torch.zeros(300, 12), normal(64, 12, seed=2)
    for token in range(64):
        for row, weight in zip(rows[token], weights[token], strict=True):
            expected[row] += weight * dy[token]
    assert torch.equal(table_gradient("sum", table, rows, weights), expected)


def test_value_and_gradients_are_those_of_the_library_s_bags():
    rows, values = indices(300, 64, 8), {}
    for function in (sum_rows, F.embedding_bag):
        table, weights = normal(300, 12).requires_grad_(), normal(64, 8, seed=1).requires_grad_()
        if function is sum_rows:
            y = sum_rows(table, rows, weights)
        else:
            y = F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
        y.backward(normal(64, 12, seed=2))
        values[function] = y, table.grad, weights.grad
    for ours, theirs in zip(*values.values(), strict=True):
        assert relative_error(ours, theirs) < 1e-6


@every_read
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_gradient_of_a_row_hit_many_times_keeps_single_precision(read, sparse):
    """Terms of one sign, which a single running sum in fp32 adds up to 1e-5 only."""
    rows, table = torch.full((1000, 100), 1), normal(3, 4).abs()
    other = factor(read, rows, 4).abs()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = table.to(dtype, copy=True).requires_grad_()
        y = READS[read](leaf, rows, other.to(dtype), sparse_grad=sparse)
        y.backward(normal(*y.shape, seed=2).abs().to(dtype))
        gradients.append(leaf.grad.to_dense()[1])
    assert relative_error(*gradients) < 1e-6


@every_read
def test_table_in_half_precision_costs_only_the_rounding_of_the_table(read):
    rows, table = indices(50, 40, 30), normal(50, 9).bfloat16()
    other = factor(read, rows, 9)
    half = table.requires_grad_()
    y = READS[read](half, rows, other)
    exact = table.detach().float().requires_grad_()
    reference = READS[read](exact, rows, other)
    assert y.dtype == torch.float32
    assert relative_error(y, reference) < 1e-6
    dy = normal(*y.shape, seed=2)
    y.backward(dy)
    reference.backward(dy)
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(half.grad, exact.grad.bfloat16())


@every_read
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_result_has_the_dtype_of_what_meets_the_table(read, dtype):
    rows, table = indices(10, 4, 3), normal(10, 5)
    other = factor(read, rows, 5).to(dtype).requires_grad_()
    y = READS[read](table, rows, other)
    y.sum().backward()
    assert y.dtype == other.grad.dtype == dtype


@every_read
def test_blocks_of_lifted_rows_give_the_same_whatever_their_size(read, monkeypatch):
    rows, table = indices(200, 37, 5), normal(200, 12).bfloat16()
    other = factor(read, rows, 12)
    expected = READS[read](table.float(), rows, other)
    for numbers in (1, 64 * 5, 12 * 5 * 36, 12 * 5 * 37):
        monkeypatch.setattr(kernels, "_BLOCK_ELEMENTS", numbers)
        torch.testing.assert_close(READS[read](table, rows, other), expected, rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the largest dense tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = [
            x.numel()
            for x in tree_leaves(out)
            if isinstance(x, torch.Tensor) and x.layout == torch.strided
        ]
        self.numbers = max(self.numbers, *made, 0)
        return out


@every_read
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_all_looked_up_rows_is_made(read, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK_ELEMENTS", 20 * 32)
    rows, table = indices(16, 50, 20), normal(16, 32).to(dtype).requires_grad_()
    other = factor(read, rows, 32).requires_grad_()
    with Largest() as seen:
        y = READS[read](table, rows, other, sparse_grad=True)
        y.sum().backward()
    assert 0 < seen.numbers <= 50 * 32  # that of the tokens; the rows would be 20 times as many


@every_read
def test_gradients_can_be_differentiated_again(read):
    rows = torch.tensor([[4, 1, 4], [1, 2, 4]])
    table = normal(6, 5, dtype=torch.float64).requires_grad_()
    other = factor(read, rows, 5, torch.float64).requires_grad_()
    function = READS[read]
    assert torch.autograd.gradgradcheck(lambda *a: function(a[0], rows, a[1]), (table, other))


@every_read
def test_sparse_gradient_can_be_differentiated_again(read):
    rows = torch.tensor([[4, 1, 4], [1, 2, 4]])
    table = normal(6, 5, dtype=torch.float64).requires_grad_()
    other = factor(read, rows, 5, torch.float64).requires_grad_()
    second = {}
    for sparse in (False, True):
        loss = READS[read](table, rows, other, sparse_grad=sparse).square().sum()
        (first,) = torch.autograd.grad(loss, table, create_graph=True)
        loss = first.to_dense().pow(3).sum()
        second[sparse] = [x.to_dense() for x in torch.autograd.grad(loss, (table, other))]
    torch.testing.assert_close(second[True], second[False], rtol=1e-12, atol=1e-12)


@every_read
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (2, 0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_call_without_lookups_reads_nothing(read, shape, sparse):
    table, rows = normal(5, 7).requires_grad_(), torch.zeros(shape, dtype=torch.int64)
    other = factor(read, rows, 7).requires_grad_()
    y = READS[read](table, rows, other, sparse_grad=sparse)
    assert y.shape == (*shape[:-1], 7 if read == "sum" else shape[-1])
    assert not y.any()
    y.sum().backward()
    assert table.grad.shape == table.shape
    assert not table.grad.to_dense().any()
    assert other.grad.shape == other.shape
    assert not other.grad.any()


@every_read
@pytest.mark.parametrize("leading", [(), (6,), (2, 3)], ids=str)
def test_tokens_may_have_any_axes(read, leading):
    rows, table = indices(9, 6, 4), normal(9, 5)
    flat = factor(read, rows, 5)
    rows, other = rows.view(*leading, -1, 4)[..., 0, :], flat.view(*leading, -1, flat.shape[-1])
    other = other[..., 0, :]
    y = READS[read](table, rows, other)
    expected = READS[read](table, rows.reshape(-1, 4), other.reshape(-1, other.shape[-1]))
    assert torch.equal(y, expected.view(y.shape))
    assert y.shape[:-1] == leading


@every_read
def test_tensors_may_lie_in_memory_as_they_like(read):
    wide = normal(40, 50)
    rows = indices(20, 4, 6).T
    other = factor(read, indices(20, 4, 4), 10)[:1].expand(6, -1)
    for table in (wide[:20, 3:13], wide[::2, :10], wide.T[:20, :10]):
        y = READS[read](table, rows, other)
        expected = READS[read](table.contiguous(), rows.contiguous(), other.contiguous())
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@every_read
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_meta_tensors_have_shapes_of_values_and_gradients(read, sparse):
    rows = torch.empty(4, 3, dtype=torch.int64, device="meta")
    table = torch.empty(2**22, 1024, device="meta", requires_grad=True)
    other = torch.empty(4, 3 if read == "sum" else 1024, device="meta", requires_grad=True)
    y = READS[read](table, rows, other, sparse_grad=sparse)
    y.sum().backward()
    assert y.shape == (4, 1024 if read == "sum" else 3)
    assert (table.grad.shape, other.grad.shape) == (table.shape, other.shape)


def test_tables_of_more_than_two_to_the_31_numbers(tmp_path):
    """In a file with holes, of which only the pages that are touched exist."""
    count, width = 2**23 + 3, 257
    mapped = torch.from_file(str(tmp_path / "table"), shared=True, size=count * width)
    table = mapped.view(count, width)
    rows = torch.tensor([[0, count - 1], [2**23, 2**23 - 1]])
    for row in rows.flatten().tolist():
        table[row] = normal(width, seed=row)
    small, places = table[rows.flatten()], torch.arange(4).view(2, 2)
    for read in READS:
        leaf, other = table.detach().requires_grad_(), factor(read, rows, width)
        y = READS[read](leaf, rows, other, sparse_grad=True)
        torch.testing.assert_close(y, READS[read](small, places, other), rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        per_lookup = other[..., None] if read == "sum" else other[:, None]
        expected = per_lookup.expand(2, 2, width).flatten(0, 1)[rows.flatten().argsort()]
        assert grad.indices()[0].tolist() == sorted(rows.flatten().tolist())
        assert torch.equal(grad.values(), expected)


def test_bad_calls_are_refused_with_the_numbers():
    table, rows = normal(10, 4), indices(10, 3, 2)
    add, dot = inspect.unwrap(sum_rows), inspect.unwrap(dot_rows)  # without the tests' checks
    with pytest.raises(ValueError, match=r"weights \(3, 1\) .* lookups \(3, 2\)"):
        add(table, rows, normal(3, 1))
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\); .* width 4 need \(3, 4\)"):
        dot(table, rows, normal(3, 5))
    for call in (
        lambda bad: add(table, bad, normal(3, 2)),
        lambda bad: dot(table, bad, normal(3, 4)),
    ):
        with pytest.raises(ValueError, match="from 0 to 9, but run from -1 to"):
            call(rows.index_fill(0, torch.tensor([1]), -1))
        with pytest.raises(ValueError, match=r"from 0 to 9, but run from \d to 10"):
            call(rows.index_fill(0, torch.tensor([1]), 10))
        with pytest.raises(ValueError, match=r"int64, but are torch\.int32"):
            call(rows.int())
    with pytest.raises(ValueError, match=r"table must be .* but has shape \(10,\)"):
        dot(table[:, 0], rows, normal(3, 4))


def test_autocast_leaves_precision_alone():
    rows, table, weights = indices(50, 8, 6), normal(50, 16), normal(8, 6, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = sum_rows(table, rows, weights)
    assert relative_error(y, sum_rows_naive(table.double(), rows, weights.double())) < 1e-6


class _Calls(TorchDispatchMode):
    """Counts library calls."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_importing_computes_nothing():
    with _Calls() as calls:
        runpy.run_path(kernels.__file__)
    assert calls.count == 0


def test_nothing_is_said_of_sparse_matrices():
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not only the first time in a process
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            dot_rows(normal(9, 4), indices(9, 3, 2), normal(3, 4))
    finally:
        torch.set_warn_always(before)
    assert not said
