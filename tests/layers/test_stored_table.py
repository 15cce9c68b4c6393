"""Stored tables: what rounding costs, which files are refused, what the cache keeps."""

import struct
from functools import partial

import pytest
import torch
from torch import nn

from mneme.layers import PEER, ProductKeyMemory, TableOptions, UltraMem
from mneme.layers.sparse.stored_table import Reads, StoredTable, replace_tables, store_tables
from mneme.layers.sparse.table import Table
from mneme.models import LanguageModel
from mneme.storage.quantized_rows import (
    BLOCK_ROWS,
    Layout,
    TableFileError,
    decode,
    encode,
    write_table,
)

BITS = pytest.mark.parametrize("bits", [8, 4])
DENSE = TableOptions(update="dense")
SHARED = TableOptions(update="dense", share="facts")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def decoded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return decode(encode(weight, bits), Layout(*weight.shape, bits))


def table_of(weight: torch.Tensor) -> Table:
    table = Table(*weight.shape, std=0.0, options=DENSE)
    table.weight.data.copy_(weight)
    return table


def lookups(tokens: int, m: int, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(rows, (tokens, m), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.table"
    write_table(path, normal(50, 5), bits=4)
    return path


# Arithmetic


@BITS
@pytest.mark.parametrize("dim", [1, 2, 5, 64])
def test_no_value_is_off_by_more_than_half_a_step(bits, dim):
    weight = normal(40, dim) * torch.logspace(-30, 30, 40)[:, None]
    step = weight.abs().amax(1, keepdim=True) / {8: 127, 4: 7}[bits]
    assert ((decoded(weight, bits) - weight).abs() <= 0.5001 * step).all()


@BITS
def test_error_of_normal_rows_is_that_of_rounding_evenly(bits):
    """A step of s rounds with an error of s / sqrt(12) in the mean square."""
    weight = normal(2000, 64)
    step = weight.abs().amax(1) / {8: 127, 4: 7}[bits]
    error = (decoded(weight, bits) - weight).square().mean().sqrt()
    torch.testing.assert_close(error, (step.square().mean() / 12).sqrt(), rtol=0.02, atol=0)


@BITS
def test_largest_values_of_either_sign_and_zeros_are_exact(bits):
    weight = torch.tensor([[3.5, -3.5, 0.0], [0.0, 0.0, 0.0], [0.0, -7.0, 7.0]])
    torch.testing.assert_close(decoded(weight, bits), weight, rtol=1e-7, atol=0)
    assert not decoded(weight, bits)[1].any()


@BITS
def test_rows_too_small_for_a_scale_become_zero_and_no_nan(bits):
    assert not decoded(torch.full((1, 3), 1e-45), bits).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_refused_by_number(tmp_path, bad):
    weight = torch.zeros(BLOCK_ROWS + 9, 3)
    weight[BLOCK_ROWS + 4, 1] = bad
    with pytest.raises(ValueError, match=f"row {BLOCK_ROWS + 4} of the table is not finite"):
        write_table(tmp_path / "t.table", weight, bits=8)


def test_other_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        write_table(tmp_path / "t.table", normal(2, 2), bits=3)


# Reads


@BITS
@pytest.mark.parametrize("dim", [7, 16])
@pytest.mark.parametrize("cache_bytes", [0, 100, 1000, 2**20])
def test_reads_are_those_of_a_table_of_the_decoded_rows(tmp_path, bits, dim, cache_bytes):
    weight = normal(300, dim)
    write_table(tmp_path / "t.table", weight, bits=bits)
    stored = StoredTable(tmp_path / "t.table", cache_bytes=cache_bytes)
    table = table_of(decoded(weight, bits))
    for call in range(6):
        rows = lookups(11, 4, 300, seed=call)
        with torch.no_grad():
            for weights in (normal(11, 4), normal(11, 4).bfloat16(), normal(11, 4).double()):
                assert torch.equal(stored.sum_rows(rows, weights), table.sum_rows(rows, weights))
            x = normal(11, dim)
            # the library adds up rows that do not begin at 64 bytes in another order
            close = {"rtol": 0, "atol": 0} if dim % 16 == 0 else {}
            torch.testing.assert_close(stored.dot_rows(rows, x), table.dot_rows(rows, x), **close)


def test_any_number_of_axes_and_no_tokens(file):
    stored, table = StoredTable(file), table_of(decoded(normal(50, 5), 4))
    for shape in [(2, 3, 4), (0, 4), (2, 0, 4)]:
        rows = lookups(24, 1, 50).flatten()[: torch.Size(shape).numel()].view(shape)
        weights, x = torch.ones(shape), torch.ones(*shape[:-1], 5)
        with torch.no_grad():
            assert torch.equal(stored.sum_rows(rows, weights), table.sum_rows(rows, weights))
            torch.testing.assert_close(stored.dot_rows(rows, x), table.dot_rows(rows, x))


def test_a_call_of_many_rows_is_answered_part_by_part(file, monkeypatch):
    monkeypatch.setattr("mneme.layers.sparse.stored_table._LARGEST", 60)  # numbers of 12 rows
    stored, table = StoredTable(file, cache_bytes=0), table_of(decoded(normal(50, 5), 4))
    parts, decoding = [], stored._decoded
    monkeypatch.setattr(stored, "_decoded", lambda rows: parts.append(len(rows)) or decoding(rows))
    rows, weights = lookups(20, 4, 50), normal(20, 4)
    assert torch.equal(stored.sum_rows(rows, weights), table.sum_rows(rows, weights))
    assert len(parts) > 4
    assert max(parts) <= 12


def test_each_distinct_row_of_a_call_is_read_once(file):
    stored = StoredTable(file, cache_bytes=0)
    record = Layout(50, 5, 4).record
    rows = torch.tensor([[7, 7, 3], [3, 7, 3]])
    stored.sum_rows(rows, torch.ones(2, 3))
    assert (stored.reads.rows, stored.reads.file_bytes) == (2, 2 * record)


def test_rows_that_are_not_there_are_refused(file):
    for row in (50, -1):
        with pytest.raises(ValueError, match="rows must be from 0 to 49, but run from"):
            StoredTable(file).sum_rows(torch.tensor([[row]]), torch.ones(1, 1))


def test_gradients_are_refused(file):
    stored, weights = StoredTable(file), torch.ones(1, 1, requires_grad=True)
    with pytest.raises(ValueError, match="has no gradient"):
        stored.sum_rows(torch.tensor([[1]]), weights)
    with pytest.raises(ValueError, match="has no gradient"):
        stored.dot_rows(torch.tensor([[1]]), torch.ones(1, 5, requires_grad=True))
    with torch.inference_mode():
        stored.sum_rows(torch.tensor([[1]]), weights)


# Cache


@pytest.mark.parametrize("cache_bytes", [0, 1, 50, 300, 2000, 10**6])
def test_the_cache_keeps_within_its_budget(file, cache_bytes):
    cache = StoredTable(file, cache_bytes=cache_bytes).cache
    held = sum(a.nbytes for a in vars(cache).values() if hasattr(a, "nbytes"))
    assert held == cache.nbytes <= cache_bytes
    slot = Layout(50, 5, 4).record + 1 + 8  # the number of one of 50 rows, and when it was read
    assert cache.nbytes > cache_bytes - 8 * slot, "the budget is used but for less than a set"


def test_rows_that_were_read_come_from_the_cache(file):
    stored = StoredTable(file, cache_bytes=10**5)
    rows = torch.arange(50)[:, None]
    for _ in range(3):
        stored.sum_rows(rows, torch.ones(50, 1))
    assert (stored.reads.rows, stored.reads.cached) == (150, 100)
    assert stored.reads.file_bytes == 50 * Layout(50, 5, 4).record


def test_the_row_that_was_read_longest_ago_gives_way(file):
    slot = Layout(50, 5, 4).record + 1 + 8
    stored = StoredTable(file, cache_bytes=3 * slot)

    def was_cached(row: int) -> bool:
        stored.reads = Reads()
        stored.sum_rows(torch.tensor([[row]]), torch.ones(1, 1))
        return stored.reads.cached == 1

    assert [was_cached(row) for row in (1, 2, 3, 1)] == [False, False, False, True]
    assert not was_cached(4), "and takes the place of 2"
    assert len(stored.cache) == 3
    assert [was_cached(row) for row in (1, 3, 4, 2)] == [True, True, True, False]


def test_a_hot_row_stays_while_others_pass(file):
    stored = StoredTable(file, cache_bytes=300)
    for row in range(1, 50):
        stored.sum_rows(torch.tensor([[0, row]]), torch.ones(1, 2))
    assert stored.reads.cached == 48
    assert len(stored.cache) == 16, "rows in two sets of eight"


# Files


def damaged(file, at: int):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)
    return file


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TableFileError, match=r"there is no stored table at .*absent\.table"):
        StoredTable(tmp_path / "absent.table")


@pytest.mark.parametrize("content", [b"", b"short", b"PK\x03\x04" + bytes(5000)])
def test_another_kind_of_file_is_named(tmp_path, content):
    path = tmp_path / "other.table"
    path.write_bytes(content)
    with pytest.raises(TableFileError, match=r"other\.table is not a stored table"):
        StoredTable(path)


@pytest.mark.parametrize(
    ("kept", "says"), [(20, "cut short within its head"), (-1, "has 4,495 bytes where")]
)
def test_a_file_that_was_cut_short_is_named(file, kept, says):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(TableFileError, match=says):
        StoredTable(file)


def test_a_file_with_more_than_its_rows_is_named(file):
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(TableFileError, match=r"has 4,497 bytes where its 50 rows .* need 4,496"):
        StoredTable(file)


@pytest.mark.parametrize("at", [12, 16, 24, 32, 36, 40])
def test_a_flipped_bit_of_the_head_is_found_on_opening(file, at):
    with pytest.raises(TableFileError, match=r"the head of .* is damaged"):
        StoredTable(damaged(file, at))


def test_versions_and_byte_orders_to_come_are_refused(file):
    original = file.read_bytes()
    file.write_bytes(original[:10] + struct.pack("=H", 2) + original[12:])
    with pytest.raises(TableFileError, match="has version 2 of the format; this one reads 1"):
        StoredTable(file)
    file.write_bytes(original[:8] + original[9:7:-1] + original[10:])
    with pytest.raises(TableFileError, match="another byte order"):
        StoredTable(file)


def test_a_flipped_bit_of_a_row_is_found_by_verify(tmp_path):
    path, rows = tmp_path / "t.table", BLOCK_ROWS + 100
    write_table(path, normal(rows, 3), bits=8)
    StoredTable(path).file.verify()
    layout = Layout(rows, 3, 8)
    damaged(path, layout.head + (BLOCK_ROWS + 5) * layout.record + 4)
    with pytest.raises(TableFileError, match=f"damaged in rows {BLOCK_ROWS} to {rows - 1}"):
        StoredTable(path).file.verify()


def test_the_checksum_tells_tables_of_one_shape_apart(tmp_path):
    def checksum(weight: torch.Tensor) -> int:
        write_table(tmp_path / "t.table", weight, bits=8)
        return StoredTable(tmp_path / "t.table").file.checksum

    weight = normal(BLOCK_ROWS + 9, 3)
    first = checksum(weight)
    assert checksum(weight) == first
    weight[-1, 0] += 1
    assert checksum(weight) != first


def test_the_file_is_as_large_as_its_layout_says(tmp_path):
    for bits, dim, record in [(8, 5, 12), (4, 5, 8), (4, 64, 36), (8, 64, 68)]:
        write_table(tmp_path / "t.table", normal(3, dim), bits=bits)
        assert (tmp_path / "t.table").stat().st_size == 4096 + 3 * record


def test_a_writer_that_fails_half_way_leaves_the_older_file(tmp_path):
    path, weight = tmp_path / "t.table", normal(2 * BLOCK_ROWS, 3)
    write_table(path, weight, bits=8)
    older = path.read_bytes()
    weight[-1, 0] = float("nan")  # found when the first block is written
    with pytest.raises(ValueError, match="not finite"):
        write_table(path, weight, bits=8)
    assert path.read_bytes() == older
    assert [file.name for file in tmp_path.iterdir()] == ["t.table"]


# Layers and models


MEMORIES = {
    "ProductKeyMemory": partial(ProductKeyMemory, heads=2, top_k=3, sub_keys=5),
    "PEER": partial(PEER, heads=2, top_k=3, sub_keys=5),
}


@BITS
@pytest.mark.parametrize("table", [DENSE, SHARED], ids=["own", "shared"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_model_reads_its_stored_tables(tmp_path, memory, table, bits):
    recipe = partial(MEMORIES[memory], table=table)
    model = LanguageModel(16, vocab_size=11, n_layers=2, pattern=[[recipe]]).eval()
    owners = {n: m for n, m in model.named_modules() if isinstance(m, Table)}
    assert set(store_tables(model, tmp_path, bits=bits)) == set(owners)
    tokens = lookups(2, 6, 11)
    for owner in owners.values():
        owner.weight.data.copy_(decoded(owner.weight, bits))
    with torch.no_grad():
        expected = model(tokens).y
        stored = replace_tables(model, tmp_path, cache_bytes=3000)
        assert torch.equal(model(tokens).y, expected)
    assert set(stored) == set(owners)
    assert all(table.reads.rows for table in stored.values())
    assert sum(table.cache.nbytes for table in stored.values()) <= 3000
    assert not any(p.shape == (25, 16) for p in model.parameters())
    with pytest.raises(ValueError, match="no gradient"):
        model(tokens)


def test_a_model_on_the_meta_device_is_served_without_its_tables(tmp_path):
    recipe = partial(MEMORIES["ProductKeyMemory"], table=SHARED)
    make = partial(LanguageModel, 16, vocab_size=11, n_layers=2, pattern=[[recipe]])
    model = make().eval()
    store_tables(model, tmp_path, bits=8)
    with torch.device("meta"):
        served = make().eval()
    replace_tables(served, tmp_path)
    weights = {n: p for n, p in model.state_dict().items() if n != "tables.facts.weight"}
    served.load_state_dict(weights, assign=True)
    replace_tables(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(served(lookups(2, 6, 11)).y, model(lookups(2, 6, 11)).y)


def test_files_of_another_model_are_refused(tmp_path):
    def model(sub_keys: int) -> LanguageModel:
        recipe = partial(ProductKeyMemory, heads=2, top_k=3, sub_keys=sub_keys, table=SHARED)
        return LanguageModel(8, vocab_size=11, n_layers=1, pattern=[[recipe]])

    store_tables(model(4), tmp_path, bits=8)
    with pytest.raises(TableFileError, match="16 rows of 8 values; the layer reads 25 of 8"):
        replace_tables(model(5), tmp_path)


def test_a_table_that_is_not_finite_is_named(tmp_path):
    layers = nn.ModuleDict({"memory": MEMORIES["PEER"](7, table=DENSE)})
    layers["memory"].down.weight.data[3] = float("inf")
    with pytest.raises(ValueError, match=r"^memory\.down: row 3 of the table"):
        store_tables(layers, tmp_path, bits=8)


def test_a_model_without_tables_is_refused(tmp_path):
    for act in (partial(store_tables, bits=8), replace_tables):
        with pytest.raises(ValueError, match="the model has no table"):
            act(nn.Linear(2, 2), tmp_path)


def test_a_table_that_the_model_does_not_own_is_refused(tmp_path):
    layers = nn.ModuleList([MEMORIES["ProductKeyMemory"](7, table=o) for o in (DENSE, SHARED)])
    store_tables(layers, tmp_path, bits=8)
    with pytest.raises(ValueError, match=r"1\.values reads tables\.facts, which is not this"):
        replace_tables(layers, tmp_path)


def test_ultra_mem_reads_stored_tables(tmp_path):
    torch.manual_seed(0)
    dense = TableOptions(update="dense")
    layer = UltraMem(8, top_k=4, sub_keys=4, table=dense).eval()
    x = torch.randn(2, 5, 8)
    store_tables(layer, tmp_path, bits=8)
    with torch.no_grad():
        before = layer(x).y
        replace_tables(layer, tmp_path)
        after = layer(x).y
    assert 0 < (after - before).norm() < 0.05 * before.norm()
