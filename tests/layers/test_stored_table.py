"""Stored tables: what rounding costs, which files are refused, what the cache keeps."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import xxhash
from torch import nn

from mneme.layers import PEER, ProductKeyMemory, TableOptions, UltraMem
from mneme.layers.sparse.stored_table import RowReads, StoredTable, replace_tables, store_tables
from mneme.layers.sparse.table import Table
from mneme.models import LanguageModel
from mneme.storage.files import StorageError
from mneme.storage.quantized_rows import RowFormat, decode, encode, write_table
from mneme.storage.record_file import GROUP_ROWS, Layout, write_records

BITS = pytest.mark.parametrize("bits", [8, 4])
DENSE = TableOptions(update="dense")
SHARED = TableOptions(update="dense", share="facts")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def decoded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return decode(encode(weight, bits), RowFormat(weight.shape[1], bits))


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
    weight = torch.zeros(GROUP_ROWS + 9, 3)
    weight[GROUP_ROWS + 4, 1] = bad
    with pytest.raises(ValueError, match=f"row {GROUP_ROWS + 4} of the table is not finite"):
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
    monkeypatch.setattr("mneme.layers.sparse.stored_table._LARGEST", 60)  # elements of 12 rows
    stored, table = StoredTable(file, cache_bytes=0), table_of(decoded(normal(50, 5), 4))
    parts, decoding = [], stored._decoded
    monkeypatch.setattr(stored, "_decoded", lambda rows: parts.append(len(rows)) or decoding(rows))
    rows, weights = lookups(20, 4, 50), normal(20, 4)
    assert torch.equal(stored.sum_rows(rows, weights), table.sum_rows(rows, weights))
    assert len(parts) > 4
    assert max(parts) <= 12


def test_each_distinct_row_of_a_call_is_read_once(file):
    stored = StoredTable(file, cache_bytes=0)
    record = RowFormat(5, 4).record_bytes
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
    slot = (
        RowFormat(5, 4).record_bytes + 1 + 8
    )  # the number of one of 50 rows, and when it was read
    assert cache.nbytes > cache_bytes - 8 * slot, "the budget is used but for less than a set"


def test_rows_that_were_read_come_from_the_cache(file):
    stored = StoredTable(file, cache_bytes=10**5)
    rows = torch.arange(50)[:, None]
    for _ in range(3):
        stored.sum_rows(rows, torch.ones(50, 1))
    assert (stored.reads.rows, stored.reads.cached) == (150, 100)
    assert stored.reads.file_bytes == 50 * RowFormat(5, 4).record_bytes


def test_the_row_that_was_read_longest_ago_gives_way(file):
    slot = RowFormat(5, 4).record_bytes + 1 + 8
    stored = StoredTable(file, cache_bytes=3 * slot)

    def was_cached(row: int) -> bool:
        stored.reads = RowReads()
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
    with pytest.raises(
        StorageError, match=r"cannot open .*absent\.table, a stored table: No such file"
    ):
        StoredTable(tmp_path / "absent.table")


@pytest.mark.parametrize("content", [b"", b"short", b"PK\x03\x04" + bytes(5000)])
def test_another_kind_of_file_is_named(tmp_path, content):
    path = tmp_path / "other.table"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"other\.table is not a stored table"):
        StoredTable(path)


@pytest.mark.parametrize(
    ("kept", "says"),
    [(20, "is cut short: it has 20 bytes, its header"), (-1, "has 8,591 bytes where")],
)
def test_a_file_that_was_cut_short_is_named(file, kept, says):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(StorageError, match=says):
        StoredTable(file)


def test_a_file_with_more_than_its_rows_is_named(file):
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(StorageError, match=r"has 8,593 bytes where its 50 rows of 8 need 8,592"):
        StoredTable(file)


@pytest.mark.parametrize("at", [8, 12, 40, 300, 4095, 4096, 4104, 8191])
def test_a_flipped_bit_of_header_and_checksums_is_found_on_opening(file, at):
    with pytest.raises(StorageError, match=r"the (header|checksums) (of|in) .* (is|are) damaged"):
        StoredTable(damaged(file, at))


def test_other_formats_are_refused_by_name(file):
    file.write_bytes(b"mnemetab" + bytes(9000))  # the first format
    says = "has version 1 of the format, and this program reads 2; store the table again"
    with pytest.raises(StorageError, match=says):
        StoredTable(file)
    write_records(file, Layout("blocks", 3, 5, {}), [bytes(5)] * 3)
    with pytest.raises(StorageError, match="is a level of a memory bank, not a stored table"):
        StoredTable(file)
    for about in ({"dim": 5, "bits": 3}, {"dim": 9, "bits": 8}, {"dim": 4}, {}):
        write_records(file, Layout("rows", 3, 8, about), [bytes(24)])
        with pytest.raises(StorageError, match=r"header of .* contradicts itself.*; store the ta"):
            StoredTable(file)


def test_a_file_is_as_its_format_says(file):
    data = file.read_bytes()
    head = json.loads(data[8:4088].rstrip(b"\0"))
    assert (data[:8], head["kind"], head["count"], head["group"]) == (b"mnemerec", "rows", 50, 4096)
    assert (head["about"], head["stride"]) == ({"dim": 5, "bits": 4}, 8)
    rows = data[head["records"] :]
    assert data[4104:4112] == xxhash.xxh3_64_digest(rows)[::-1]
    scale = normal(50, 5).abs().amax(1) / 7
    assert np.array_equal(np.frombuffer(rows, "<f4")[::2], scale.numpy())


def test_a_flipped_bit_of_a_row_is_found_by_verify(tmp_path):
    path, rows = tmp_path / "t.table", GROUP_ROWS + 100
    write_table(path, normal(rows, 3), bits=8)
    StoredTable(path).file.verify()
    damaged(path, 8192 + (GROUP_ROWS + 5) * RowFormat(3, 8).record_bytes + 4)
    with pytest.raises(StorageError, match=f"damaged in rows {GROUP_ROWS} to {rows - 1}"):
        StoredTable(path).file.verify()


def test_the_checksum_tells_tables_of_one_shape_apart(tmp_path):
    def checksum(weight: torch.Tensor) -> int:
        write_table(tmp_path / "t.table", weight, bits=8)
        return StoredTable(tmp_path / "t.table").file.checksum

    weight = normal(GROUP_ROWS + 9, 3)
    first = checksum(weight)
    assert checksum(weight) == first
    weight[-1, 0] += 1
    assert checksum(weight) != first


def test_the_file_is_as_large_as_its_layout_says(tmp_path):
    for bits, dim, record in [(8, 5, 12), (4, 5, 8), (4, 64, 36), (8, 64, 68)]:
        write_table(tmp_path / "t.table", normal(3, dim), bits=bits)
        assert (tmp_path / "t.table").stat().st_size == 8192 + 3 * record


def test_a_writer_that_fails_half_way_leaves_the_older_file(tmp_path):
    path, weight = tmp_path / "t.table", normal(2 * GROUP_ROWS, 3)
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
    with pytest.raises(StorageError, match="16 rows of 8 values; the layer reads 25 of 8"):
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
