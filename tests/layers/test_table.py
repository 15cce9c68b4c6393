"""Tables: who owns them, and what the optimizer is told."""

from copy import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mneme.layers import LAYERS, MLP, ProductKeyMemory, TableOptions, bind_shared_parts
from mneme.layers.sparse.table import Table, make_table
from mneme.models import LanguageModel, budget, make_optimizer
from tests.helpers import assert_close, assert_order_of_tokens_means_nothing

SHARED = TableOptions(share="facts", update="dense")
small = partial(ProductKeyMemory, heads=2, top_k=3, sub_keys=4)


def model(*layers) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(8, vocab_size=11, n_layers=len(layers), pattern=[[x] for x in layers])


def test_layers_that_share_a_name_read_one_table_which_the_model_owns():
    shared = model(*[partial(small, table=SHARED)] * 3)
    names = [name for name, _ in shared.named_parameters() if "weight" in name and "tables" in name]
    assert names == ["tables.facts.weight"]
    assert sum(p.shape == (16, 8) for p in shared.parameters()) == 1
    assert [name for name in shared.state_dict() if "values" in name] == []


def shared_and_apart(update) -> tuple[LanguageModel, torch.Tensor]:
    """A model of two layers with one table after a backward pass, and the sum of both gradients.

    The sum is of the tables of a model whose layers have a copy each.
    """
    options = TableOptions(update=update)
    shared = model(*[partial(small, table=replace(options, share="facts"))] * 2).double()
    apart = model(*[partial(small, table=options)] * 2).double()
    own = [m.values for m in apart.modules() if isinstance(m, ProductKeyMemory)]
    weights = {n: p for n, p in shared.state_dict().items() if not n.startswith("tables")}
    apart.load_state_dict(weights, strict=False)
    for table in own:
        table.weight.data.copy_(shared.tables["facts"].weight.data)
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    for m in (shared, apart):
        m(tokens).y.square().sum().backward()
    assert all(table.weight.grad.to_dense().any() for table in own)
    return shared, own[0].weight.grad.to_dense() + own[1].weight.grad.to_dense()


@pytest.mark.parametrize("update", ["lazy", "rowwise", "dense"])
def test_gradient_of_a_shared_table_is_the_sum_over_its_layers(update):
    shared, summed = shared_and_apart(update)
    assert_close(shared.tables["facts"].weight.grad, summed, "gradient", 1e-13)


def test_an_optimizer_lists_a_shared_table_once_and_steps_by_the_summed_gradient():
    shared, summed = shared_and_apart("lazy")
    # with a large eps, as the first step of Adam would not depend on the size of gradients
    optimizer = make_optimizer(shared, partial(torch.optim.AdamW, lr=0.1, eps=1.0))
    table = shared.tables["facts"].weight
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p is table for p in listed) == 1
    assert len(listed) == len(list(shared.parameters()))
    alone = nn.Parameter(table.detach().clone())
    alone.grad = summed
    torch.optim.AdamW([alone], lr=0.1, eps=1.0, weight_decay=0.0).step()
    optimizer.step()
    assert_close(table, alone, "table", 1e-13)


def test_two_models_do_not_share():
    a, b = model(partial(small, table=SHARED)), model(partial(small, table=SHARED))
    assert a.tables["facts"].weight.data_ptr() != b.tables["facts"].weight.data_ptr()


def test_state_dict_holds_a_shared_table_once_and_loads_it_tied():
    saved = model(*[partial(small, table=SHARED)] * 2)
    loaded = model(*[partial(small, table=SHARED)] * 2)
    with torch.no_grad():
        saved.tables["facts"].weight.add_(1)
    loaded.load_state_dict(saved.state_dict())
    tokens = torch.arange(6)[None]
    assert torch.equal(loaded(tokens).y, saved(tokens).y)
    with torch.no_grad():
        loaded.tables["facts"].weight.zero_()
    for layer in loaded.modules():
        if isinstance(layer, ProductKeyMemory):
            assert not layer.values.sum_rows(torch.tensor([[1]]), torch.ones(1, 1)).any()


def test_layers_that_ask_for_different_tables_under_one_name_are_refused():
    faster = replace(SHARED, lr_multiplier=2.0)
    message = "'facts' ask for different ones: rows 16 and 25, lr_multiplier 1.0 and 2.0$"
    with pytest.raises(ValueError, match=message):
        model(partial(small, table=SHARED), partial(small, table=faster, sub_keys=5))


@pytest.mark.parametrize("name", ["values", "keys", "items", "pop", "class", "größe"])
def test_any_word_may_name_a_shared_table(name):
    options = replace(SHARED, share=name)
    saved, loaded = (model(*[partial(small, table=options)] * 2) for _ in range(2))
    assert f"tables.{name}.weight" in saved.state_dict()
    assert list(saved.tables) == [name]
    with torch.no_grad():
        saved.tables[name].weight.add_(1)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.get_submodule(f"tables.{name}").weight, saved.tables[name].weight)


@pytest.mark.parametrize("name", ["", "a.b", "two words", "1st"])
def test_a_share_that_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match=f"share must be a name of letters.*; got '{name}'"):
        TableOptions(share=name)


@pytest.mark.parametrize("name", ["train", "type", "training", "_modules", "__iter__"])
def test_a_share_that_a_module_has_already_is_refused(name):
    with pytest.raises(ValueError, match=f"than '{name}', .* take '{name}_table', say"):
        TableOptions(share=name)
    model(partial(small, table=replace(SHARED, share=f"{name}_table")))


def test_a_shared_table_without_a_model_says_what_to_do():
    layer = small(8, table=SHARED)
    with pytest.raises(ValueError, match="'facts' is shared, and no model owns it yet"):
        layer(torch.randn(1, 2, 8))
    holder = nn.ModuleList([layer])
    tables = bind_shared_parts(holder)
    assert list(tables) == ["tables.facts"]
    assert layer(torch.randn(1, 2, 8)).y.shape == (1, 2, 8)


def test_budget_counts_a_shared_table_once_and_the_rows_that_a_token_reads():
    one, two = (model(*[partial(small, table=SHARED)] * n) for n in (1, 2))
    per_layer = sum(p.numel() for p in small(8, table=SHARED).parameters())
    assert budget(two, 4).parameters - budget(one, 4).parameters == per_layer + 8  # and a norm
    read = 2 * 3 * 8
    assert two.active_parameters() - one.active_parameters() == per_layer + read + 8


def test_active_parameters_of_a_dense_model_are_all_of_a_tied_one():
    dense = model(partial(MLP, expand=2))
    assert dense.active_parameters() == sum(p.numel() for p in dense.parameters())


def test_policy_says_how_rows_are_written():
    options = TableOptions(update="rowwise", lr_multiplier=4.0, weight_decay=0.1)
    policy = Table(3, 2, std=1.0, options=options).param_options["weight"]
    assert (policy.update, policy.lr_multiplier, policy.weight_decay) == ("rowwise", 4.0, 0.1)
    assert policy.clip_group == "tables"


def test_an_update_that_does_not_exist_is_refused_by_name():
    options = copy(SHARED)
    object.__setattr__(options, "update", "sparse")
    message = "update must be one of 'lazy', 'rowwise', 'dense'; got 'sparse'"
    with pytest.raises(ValueError, match=message):
        options.__post_init__()  # which no constructor reaches where types are checked at run time


@pytest.mark.parametrize("bad", [{"lr_multiplier": 0.0}, {"weight_decay": -0.1}])
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TableOptions(**bad)


@pytest.mark.parametrize("update", ["lazy", "rowwise"])
def test_rows_updated_alone_have_sparse_gradients(update):
    table = make_table(6, 3, std=1.0, options=TableOptions(update=update))
    table.sum_rows(torch.tensor([[4, 1]]), torch.ones(1, 2)).sum().backward()
    (table.dot_rows(torch.tensor([[4, 2]]), torch.ones(1, 3))).sum().backward()
    gradient = table.weight.grad
    assert gradient.is_sparse
    assert gradient.coalesce().indices().tolist() == [[1, 2, 4]]
    assert gradient.to_dense()[4].tolist() == [2.0] * 3


READERS = ("ProductKeyMemory", "PEER", "UltraMem", "UltraMemV2", "DiscreteKeyValueBottleneck")


@pytest.mark.parametrize(("name", "example"), [(n, e) for n in READERS for e in LAYERS[n].examples])
def test_layers_that_read_a_table_read_it_for_each_token_alone(name, example):
    assert_order_of_tokens_means_nothing(name, example)
