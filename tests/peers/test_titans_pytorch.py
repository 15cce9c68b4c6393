"""`TestTimeMemory` is the memory of titans-pytorch 0.5.5, where the two can mean the same."""

from functools import partial

import pytest
import torch
from titans_pytorch import MemoryMLP, NeuralMemory
from torch import nn
from torch.nn import functional as F

from mneme.layers import TestTimeMemory
from mneme.layers.parts.norm import L2_NORM_EPS
from tests.helpers import assert_close, run_in_pieces
from tests.peers.compare import assert_same, peer
from tests.peers.mappings.titans_pytorch import neural_memory_options, neural_memory_weights

EPS = torch.finfo(torch.float64).eps  # of norms in torch that are given none
OURS = {"post_rmsnorm": True, "mem_model_norm_add_residual": False}  # not so by default


def network(depth, expansion_factor=4.0):
    return {"default_model_kwargs": {"depth": depth, "expansion_factor": expansion_factor}}


CASES = {
    "two layers": {"dim": 6, "batch_size": 4},
    "one layer": {"dim": 5, "batch_size": 3} | network(1),
    "three layers, silu": {
        "dim": 4,
        "batch_size": 5,
        "activation": nn.SiLU(),
        "default_step_transform_max_lr": 0.3,
    }
    | network(3, 1.5),
    "never refreshed": {"dim": 6},
    "refreshed every token": {"dim": 6, "batch_size": 1},
    "no momentum": {"dim": 6, "batch_size": 4, "momentum": False},
    "one layer, no momentum, no norm before": {
        "dim": 7,
        "batch_size": 4,
        "momentum": False,
        "pre_rmsnorm": False,
    }
    | network(1),
    "heads": {"dim": 9, "heads": 3, "dim_head": 3, "batch_size": 4},
    "heads that start alike": {
        "dim": 8,
        "heads": 2,
        "dim_head": 4,
        "batch_size": 16,
        "per_head_learned_parameters": False,
    },
    "norm of queries and keys": {
        "dim": 8,
        "heads": 2,
        "dim_head": 4,
        "batch_size": 4,
        "qk_rmsnorm": True,
    }
    | network(1),
    "norm and residual path in the memory": {"dim": 6, "batch_size": 4, "residual_norm": True},
}
ONCE_A_CHUNK = {
    "two layers": {"dim": 6, "batch_size": 4, "chunk_size": 4},
    "one layer, no momentum": {"dim": 5, "batch_size": 3, "chunk_size": 3, "momentum": False}
    | network(1),
    "heads": {"dim": 8, "heads": 2, "dim_head": 4, "batch_size": 5, "chunk_size": 5},
    "orthogonal": {"dim": 6, "batch_size": 4, "chunk_size": 4, "spectral_norm_surprises": True},
}


class NormedResidual(nn.Module):
    """A memory model whose norm has no gain: theirs is a fast weight, ours is not."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return x + F.layer_norm(self.model(x), x.shape[-1:], eps=1e-6)


def neural_memory(residual_norm=False, **arguments):
    """Theirs, with what ours cannot be left out."""
    if residual_norm:
        arguments["model"] = NormedResidual(MemoryMLP(arguments["dim"], 2, 4.0))
    theirs = NeuralMemory(**arguments | OURS)
    theirs.retrieve_gate = None  # of several heads
    for initial in theirs.memory_model_parameters:
        initial.data = initial.data.contiguous()  # those of all heads are one piece of memory
    return theirs


def pair(arguments):
    """Theirs, ours, and the mapping."""
    theirs = peer(lambda: neural_memory(**arguments))
    ours = TestTimeMemory(arguments["dim"], **neural_memory_options(**arguments | OURS))
    ours.norm.eps = EPS
    if arguments.get("pre_rmsnorm", True):
        width = (arguments["dim"],)
        ours.register_forward_pre_hook(lambda _, given: (F.rms_norm(given[0], width), *given[1:]))
    known = {name: arguments[name] for name in ("chunk_size", "residual_norm") if name in arguments}
    return ours, theirs, partial(neural_memory_weights, **known)


def freeze_at_zero(module, *names):
    for name in names:
        with torch.no_grad():
            module.get_parameter(name).zero_().requires_grad_(False)


def tokens(width, length, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_gates_of_every_token(arguments):
    ours, theirs, mapping = pair(arguments)
    if "qk_rmsnorm" in arguments:
        freeze_at_zero(theirs, "q_norm.gamma", "k_norm.gamma")  # ours have no gain
        for norm in (theirs.q_norm, theirs.k_norm):
            norm.rmsnorm.eps = L2_NORM_EPS / arguments["dim_head"]  # of the mean, not the sum
    x = tokens(arguments["dim"], 11)
    assert_same(ours, theirs, mapping, x, run=lambda x: theirs(x)[0], in_double=False)


@pytest.mark.parametrize("case", ["two layers", "one layer", "no momentum", "heads"])
def test_states_carried_from_call_to_call(case):
    ours, theirs, mapping = pair(CASES[case])
    ours.double().load_state_dict(mapping(theirs.state_dict()))
    x, sizes = tokens(CASES[case]["dim"], 15), [3, 1, 6, 1, 4]
    y, state, _ = run_in_pieces(ours, x, sizes)
    their_state, outputs = None, []
    for piece in x.split(sizes, 1):
        output, their_state = theirs(piece, state=their_state)
        outputs.append(output)
    assert_close(y, torch.cat(outputs, 1), "output")
    weights, momentum = their_state.states
    for theirs_now, ours_now in zip(weights.values(), state.fast.weights, strict=True):
        assert_close(ours_now.flatten(0, 1), theirs_now, "weights")
    for theirs_now, ours_now in zip(momentum.values(), state.fast.momentum, strict=False):
        assert_close(ours_now.flatten(0, 1), theirs_now[0], "momentum")


@pytest.mark.parametrize("arguments", ONCE_A_CHUNK.values(), ids=ONCE_A_CHUNK.keys())
def test_one_step_a_chunk(arguments):
    """Tokens of ours read the weights of the chunk's start; the last of theirs those of its end."""
    ours, theirs, mapping = pair(arguments)
    with torch.no_grad():
        theirs.to_decay_factor[0].weight.zero_()
        if arguments.get("momentum", True):
            theirs.to_momentum[0].weight.zero_()

    def run(x):
        first, later = theirs(x[:, :1])[0], theirs(x[:, 1:], store_seq=x)[0]
        return torch.cat([first, later], 1)

    x = tokens(arguments["dim"], 3 * arguments["chunk_size"] + 2)
    assert_same(ours, theirs, mapping, x, run=run, in_double=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 2}, r"dim_head \(8\) times heads \(2\) must be dim \(8\)"),
        ({"post_rmsnorm": False}, "post_rmsnorm must be true"),
        ({"mem_model_norm_add_residual": True}, "mem_model_norm_add_residual must be false"),
        ({"activation": nn.ReLU()}, "activation must be SiLU or None"),
        ({"chunk_size": 2, "batch_size": 4}, r"must be 1 or batch_size \(4\), got 2"),
        ({"qk_rmsnorm": True}, "qk_rmsnorm needs a model of depth 1"),
        ({"spectral_norm_surprises": True}, "needs one step a chunk"),
    ],
)
def test_what_ours_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        neural_memory_options(**{"dim": 8} | OURS | arguments)


def test_weights_that_ours_cannot_have_are_refused():
    chunks = {"dim": 4, "batch_size": 2, "chunk_size": 2}
    with pytest.raises(ValueError, match="decay and momentum must be zero"):
        neural_memory_weights(neural_memory(**chunks).state_dict(), chunk_size=2)
    normed = neural_memory(dim=4, qk_rmsnorm=True)
    normed.q_norm.gamma.data += 1
    with pytest.raises(ValueError, match="gammas must be zero"):
        neural_memory_weights(normed.state_dict())
    heads = NeuralMemory(8, heads=2, dim_head=4, **OURS)
    with pytest.raises(ValueError, match="set retrieve_gate to None"):
        neural_memory_weights(heads.state_dict())
