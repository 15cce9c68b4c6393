"""Reports of layers: kept only while somebody records, joined along time."""

from functools import partial

import pytest
import torch
from torch import nn

from mneme.layers import MemoryAsGate, TestTimeMemory, observe, observing, recording
from mneme.models import LanguageModel

CUTS = (1, 16, 5, 26)  # within chunks of 16 and at their ends


@pytest.fixture
def model():
    memory = partial(TestTimeMemory, heads=2)
    gated = partial(MemoryAsGate, memory=memory, heads=2, window=5, persistent=3)
    return LanguageModel(16, vocab_size=11, n_layers=2, pattern=[[memory], [gated]]).eval()


def reports(model, tokens, cuts):
    """What is recorded when the tokens are read in pieces of those lengths."""
    state = model.init_state(len(tokens))
    with torch.no_grad(), recording() as record:
        for piece in tokens.split(cuts, 1):
            _, state, _ = model(piece, state)
    return record.by_layer(model)


def test_pieces_report_what_the_whole_reports(model):
    tokens = torch.randint(11, (3, sum(CUTS)))
    whole, pieces = reports(model, tokens, sum(CUTS)), reports(model, tokens, CUTS)
    assert list(whole) == list(pieces) == [
        "blocks.0.parts.0.parts.0", "blocks.1.parts.0.parts.0.memory"
    ]  # fmt: skip
    for layer, named in whole.items():
        assert set(named) == {"surprise", "inner_lr", "forget", "momentum", "memory_norm"}
        for name, value in named.items():
            assert value.shape == (3, sum(CUTS), 2)
            if name != "memory_norm":
                torch.testing.assert_close(pieces[layer][name], value, rtol=1e-4, atol=1e-5)
        norm, after = pieces[layer]["memory_norm"], torch.tensor(CUTS).cumsum(0) - 1
        known = (~norm.isnan()).all(0).all(-1).nonzero().flatten()
        assert torch.equal(known, after), "one value a call, at its last token"
        assert norm.isnan().sum() == 3 * 2 * (sum(CUTS) - len(CUTS))
        torch.testing.assert_close(norm[:, -1], named["memory_norm"][:, -1], rtol=1e-4, atol=1e-5)


def test_persistent_tokens_are_no_part_of_the_record(model):
    with torch.no_grad(), recording() as record:
        model(torch.randint(11, (3, 7)))
    for named in record.by_layer(model).values():
        assert named["surprise"].shape == (3, 7, 2)


def test_the_norm_is_that_of_the_weights_of_each_head():
    layer = TestTimeMemory(8, heads=2)
    with recording() as record:
        _, state, _ = layer(torch.randn(3, 16, 8))
    expected = torch.stack([
        torch.stack([torch.cat([w[b, h].flatten() for w in state.fast.weights]).norm()
                     for h in range(2)])
        for b in range(3)
    ])  # fmt: skip
    norm = record.by_layer(nn.ModuleList([layer]))["0"]["memory_norm"]
    torch.testing.assert_close(norm[:, -1], expected.detach())


def test_nothing_is_recorded_unless_somebody_records(model):
    tokens = torch.randint(11, (1, 4))
    with recording() as before:
        assert observing()
    assert not observing()
    model(tokens)
    with recording() as after:
        pass
    assert before.by_layer(model) == after.by_layer(model) == {}


def test_a_block_that_fails_ends_its_recording():
    def failing():
        with recording():
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        failing()
    assert not observing()


def test_the_innermost_recording_gets_the_report():
    layer = nn.Identity()
    with recording() as outer:
        with recording() as inner:
            observe(layer, "seen", torch.ones(1, 2))
        observe(layer, "seen", torch.zeros(1, 1))
    assert inner.by_layer(layer)[""]["seen"].tolist() == [[1, 1]]
    assert outer.by_layer(layer)[""]["seen"].tolist() == [[0]]


def test_reports_hold_no_history():
    layer, value = nn.Identity(), torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    with recording() as record:
        observe(layer, "seen", value * 2)
    (kept,) = record.by_layer(layer)[""].values()
    assert not kept.requires_grad
    assert kept.dtype == torch.float32


def test_recording_changes_no_output(model):
    tokens = torch.randint(11, (2, 20))
    with torch.no_grad():
        quiet = model(tokens).y
        with recording():
            assert torch.equal(model(tokens, model.init_state(2)).y, quiet)
