"""`titans_pytorch.NeuralMemory` as `mneme.layers.TestTimeMemory`.

Two of its ways to cut a sequence are ours:

* `chunk_size=1`: gates of every token, gradients at the weights of the last refresh, every
  `batch_size` tokens. That is Titans (arXiv 2501.00663) with our `chunk_size` for `batch_size`.
* `chunk_size=batch_size`: one step a chunk, `Learner(update="chunk")`, if the gates of decay and
  momentum are constants: it makes them of the chunk's mean token, we take the mean of its tokens'.
  Tokens read the weights of the chunk's start; there, the last token of a chunk reads its end.

The steps of a loss that is a mean over `dim_head` numbers are 2 / dim_head of ours.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers import Features, ForgetGate, Learner, Readout
from mneme.ops.test_time import MLP


def neural_memory_options(
    *,
    dim: int,
    chunk_size: int = 1,
    batch_size: int | None = None,
    dim_head: int | None = None,
    heads: int = 1,
    default_step_transform_max_lr: float = 1.0,
    momentum: bool = True,
    pre_rmsnorm: bool = True,
    post_rmsnorm: bool = False,
    qk_rmsnorm: bool = False,
    activation: nn.Module | None = None,
    spectral_norm_surprises: bool = False,
    mem_model_norm_add_residual: bool = True,
    per_head_learned_parameters: bool = True,
    default_model_kwargs: Mapping[str, Any] | None = None,
    residual_norm: bool = False,
) -> dict[str, Any]:
    """Arguments of `mneme.layers.TestTimeMemory(dim, ...)` from those of `NeuralMemory(dim, ...)`.

    With `pre_rmsnorm`, our layer is to be given `rms_norm(x)` without gain, which
    `neural_memory_weights` folds into what reads it. With `batch_size=None` all gradients are taken
    at the initial weights, whatever the length: no chunk of ours ends before a million tokens.

    Args:
        residual_norm: whether its `model` is `x + layer_norm(MemoryMLP(x))` with an epsilon of 1e-6
            and no gain, rather than `MemoryMLP`.
        default_model_kwargs: of its `MemoryMLP`.
        others: as there.

    Raises:
        ValueError: what ours cannot be.
    """
    width = dim if dim_head is None else dim_head
    network = {"depth": 2, "expansion_factor": 4.0} | dict(default_model_kwargs or {})
    once = chunk_size > 1
    single = network["depth"] == 1 and not residual_norm
    silu = isinstance(activation, nn.SiLU)
    for wrong, message in [
        (width * heads != dim, f"dim_head ({width}) times heads ({heads}) must be dim ({dim})"),
        (not post_rmsnorm, "post_rmsnorm must be true: our reads are always normalized"),
        (
            mem_model_norm_add_residual,
            "mem_model_norm_add_residual must be false: its gain is one more fast weight",
        ),
        (activation is not None and not silu, "activation must be SiLU or None"),
        (
            once and chunk_size != batch_size,
            f"chunk_size must be 1 or batch_size ({batch_size}), got {chunk_size}",
        ),
        (
            qk_rmsnorm and not single,
            "qk_rmsnorm needs a model of depth 1: keys have norm dim_head**0.5 there and 1 here, "
            "which the weights and steps of a single map make up for",
        ),
        (
            spectral_norm_surprises and not once,
            "spectral_norm_surprises needs one step a chunk, chunk_size=batch_size above 1",
        ),
    ]:
        if wrong:
            raise ValueError(message)
    scale = width if qk_rmsnorm else 1
    return {
        "heads": heads,
        "chunk_size": 2**20 if batch_size is None else batch_size,
        "memory": MLP(
            residual=residual_norm,
            norm=residual_norm,
            depth=network["depth"],
            expand=network["expansion_factor"],
        ),
        "forget_gate": ForgetGate("head"),
        "learner": Learner(
            max_inner_lr=2 / width * default_step_transform_max_lr * scale,
            momentum=momentum,
            update="chunk" if once else "token",
            orthogonal=spectral_norm_surprises,
        ),
        "read_before": once,
        "features": Features(conv_size=1, silu=silu, normalize=qk_rmsnorm),
        "readout": Readout(gate=False),
    }


def neural_memory_weights(
    state: Mapping[str, Tensor], *, chunk_size: int = 1, residual_norm: bool = False
) -> dict[str, Tensor]:
    """State dict of `mneme.layers.TestTimeMemory` from that of a `NeuralMemory`.

    Args:
        state: of the other.
        chunk_size, residual_norm: as for `neural_memory_options`.

    Raises:
        ValueError: reads have a gate, a chunk's gates are functions of its tokens, or queries and
            keys have a gain.
    """
    if "retrieve_gate.0.weight" in state:
        raise ValueError("reads of several heads have no gate in ours: set retrieve_gate to None")
    heads = len(state["multihead_rmsnorm.gamma"])
    dim = state["to_decay_factor.0.weight"].shape[1]
    one = state["multihead_rmsnorm.gamma"].new_ones(())
    query_gain = state.get("retrieve_norm.weight", one)
    store_gain = state.get("store_norm.weight", one)
    qkv = [
        _map(state, "to_queries") * query_gain,
        _map(state, "to_keys") * store_gain,
        _map(state, "to_values") * store_gain,
    ]
    gates = [_gate(state, "to_adaptive_step"), _gate(state, "to_decay_factor")]
    if "to_momentum.0.weight" in state:
        gates.append(_gate(state, "to_momentum"))
    if chunk_size > 1:
        gates[1:] = [_constant(*gate) for gate in gates[1:]]
        gates[1] = _spread(*gates[1], chunk_size)
    read_gain = 1 + rearrange(state["multihead_rmsnorm.gamma"], "h 1 v -> (h v)")
    out = state.get("combine_heads.weight", torch.eye(dim).to(read_gain))
    ours = {
        "qkv_proj.weight": torch.cat(qkv),
        "conv.weight": one.expand(3 * dim, 1),
        "gates_proj.weight": torch.stack([w for w, _ in gates], 1).flatten(0, 1) * store_gain,
        "gates_proj.bias": torch.stack([b for _, b in gates], 1).flatten(),
        "norm.weight": one.expand(dim // heads),
        "out_proj.weight": out * read_gain,
    }
    if residual_norm:
        ours["memory_norm_weight"] = one.expand(heads, dim // heads)
        ours["memory_norm_bias"] = torch.zeros_like(ours["memory_norm_weight"])
    return ours | _initial(state, heads)


def _map(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A projection, alone or before an activation."""
    return state[f"{name}.weight" if f"{name}.weight" in state else f"{name}.0.weight"]


def _gate(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.0.weight"], state[f"{name}.0.bias"]


def _constant(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if weight.any():
        raise ValueError(
            "with chunks, the weights of decay and momentum must be zero: theirs are functions of "
            "a chunk's mean token, ours means of functions of its tokens"
        )
    return weight, bias


def _spread(weight: Tensor, bias: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """A gate of which each token of a chunk forgets its part.

    The weight, which is zero, is scaled as the bias is, so that its gradient is right.
    """
    forgotten = F.softplus(bias) / chunk_size
    spread = forgotten.expm1().log()
    slope = bias.sigmoid() / chunk_size / -(-forgotten).expm1()
    return weight * slope[:, None], spread


def _initial(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The initial fast weights of each head."""
    scale = 1.0
    if "q_norm.gamma" in state:
        if state["q_norm.gamma"].any() or state["k_norm.gamma"].any():
            raise ValueError("queries and keys have no gain in ours: their gammas must be zero")
        scale = state["q_norm.gamma"].shape[-1] ** 0.5
    shared = state["memory_model_parameters.0"].ndim == 2  # another name of memory_model's
    prefix = "memory_model." if shared else "memory_model_parameters."
    maps = [tensor for name, tensor in state.items() if name.startswith(prefix)]
    return {
        f"initial.{i}": scale * (w.expand(heads, *w.shape) if shared else w)
        for i, w in enumerate(maps)
    }
