"""BlockFFN: many small experts, and a router that decides how many of them a token goes to."""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.parts.norm import RMSNorm
from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.parts.telemetry import observe
from mneme.layers.protocol import Layer, Output, State, require_at_least
from mneme.layers.registry import register
from mneme.layers.sparse.experts import Experts
from mneme.ops.contract import uncompiled
from mneme.ops.routing import mean_over_tokens, router_logits

_STEEP = 100.0  # of the sigmoid that takes a logit for active or not, as in the released code


@register(
    default={"experts": 6, "expert_dim": 4, "chunk": 4},
    without_losses={"experts": 4, "expert_dim": 3, "chunk_loss": 0.0, "locality_loss": 0.0},
)
class BlockFFN(Layer):
    """BlockFFN (arXiv 2507.08771): experts weighted by a ReLU, those that it leaves at zero unused.

        a = ReLU(W_r x),    g = RMSNorm(a),    y = sum_{e: a_e > 0} g_e W_out_e silu(W_in_e x)

    The router has a gradient at every active expert and no number of choices is set; training makes
    it sparse by two losses, which have the forms of the released code:

    * `loss_chunk = mean_{c,e} 1 - prod_{t in c} (1 - a_te / sum_i a_ti)`: how likely each expert is
      in use anywhere in a chunk c, if a token chose one expert by its share;
    * `loss_locality = mean BCE(sigmoid(s r_t), sigmoid(s r_{t+1}))` with logits r = W_r x and s =
      100: neighbors are to activate the same experts.

    Tokens are sorted by expert as in `MixtureOfExperts`. The layer has no state; the losses look
    along time within one call, outputs do not.

    Args:
        d_model: width D.
        experts: E; default 32.
        expert_dim: hidden width of one expert; by default 4 D over half of the experts, those that
            are active at the start, rounded up to a multiple of 8: a token then costs what it does
            in an `MLP`, and less as the router becomes sparse.
        chunk_loss: weight of the first loss; default 0.01.
        locality_loss: weight of the second; default 0.001.
        chunk: tokens of a chunk, in the first loss and in telemetry; default 8.

    Telemetry: `active` and `active_chunk`, the share of experts that a token and a chunk use;
    `load_max` and `load_min`, the share of tokens that the fullest and the emptiest expert get;
    `route`, the weights of all experts.

    A budget counts half of the experts as active, before training as well as after it: how many
    there are depends on the data. An expert whose logit is well below zero for all tokens gets no
    gradient, and returns only if the inputs change.

    Where we differ: the weights of the losses are our choice. Output maps start smaller by
    sqrt(E), as slices of one dense map: weights with a root mean square of one would make the sum
    of E experts that much larger.
    """

    def __init__(
        self,
        d_model: int,
        *,
        experts: int = 32,
        expert_dim: int | None = None,
        chunk_loss: float = 0.01,
        locality_loss: float = 0.001,
        chunk: int = 8,
    ) -> None:
        super().__init__()
        require_at_least(1, experts=experts, chunk=chunk)
        require_at_least(0, chunk_loss=chunk_loss, locality_loss=locality_loss)
        if expert_dim is None:
            expert_dim = 8 * -(-d_model // experts)
        self.chunk_loss, self.locality_loss, self.chunk = chunk_loss, locality_loss, chunk
        self.router = nn.Linear(d_model, experts, bias=False)
        self.norm = RMSNorm(experts)
        self.experts = Experts(d_model, experts=experts, hidden=expert_dim, gated=False)
        with torch.no_grad():
            self.experts.out_proj.weight.div_(experts**0.5)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Transforms each position by its active experts."""
        return self.routed(x, x)

    def routed(self, x: Float[Tensor, "b t d"], seen: Float[Tensor, "b t d"]) -> Output:
        """Transforms each position by the experts that are active for what the router sees."""
        logits = router_logits(seen, self.router.weight)
        weight = at_least_fp32(self.norm.weight)
        gates = F.rms_norm(logits.relu(), logits.shape[-1:], weight, self.norm.eps)
        active = logits.relu() != 0  # what is not a number is active, and is seen
        observe(self, "route", gates)
        return Output(self._mixed(x, gates, active), aux=self._aux(logits, active))

    def active_parameters(self) -> int:
        """All but half of the experts."""
        routed = sum(p.numel() for p in self.experts.parameters())
        held = sum(p.numel() for p in self.parameters())
        return held - routed + self.experts.parameters_of(self.experts.experts / 2)

    @uncompiled  # how many experts are active is data
    def _mixed(self, x: Tensor, gates: Tensor, active: Tensor) -> Tensor:
        """What each token's active experts make of it, weighted."""
        gates, active = gates.flatten(0, 1), active.flatten(0, 1)
        if active.is_meta:  # no numbers: half of the experts, as many for each token
            copies = active.new_zeros(len(active), dtype=torch.long)
            expert = copies.new_zeros(active.numel() // 2)
            weight = gates.new_zeros(len(expert))
        else:
            token, expert = active.nonzero(as_tuple=True)
            copies, weight = active.sum(-1), gates[token, expert]
        return self.experts(x.flatten(0, 1), expert, copies, weight).view(x.shape)

    def _aux(self, logits: Tensor, active: Tensor) -> dict[str, Tensor]:
        load = mean_over_tokens(active.to(logits.dtype))
        together = mean_over_tokens(_chunks(active, self.chunk).any(2).to(logits.dtype))
        aux = {
            "active": load.mean(),
            "active_chunk": together.mean(),
            "load_max": load.max(),
            "load_min": load.min(),
        }
        if self.chunk_loss:
            aux["loss_chunk"] = self.chunk_loss * _in_use(logits, self.chunk)
        if self.locality_loss:
            aux["loss_locality"] = self.locality_loss * _disagreement(logits)
        return aux


def _in_use(logits: Float[Tensor, "b t e"], chunk: int) -> Tensor:
    """The mean probability that an expert is in use in a chunk, a token choosing one by share."""
    weight = logits.relu()
    share = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    return mean_over_tokens(1 - (1 - _chunks(share, chunk)).prod(2)).mean()


def _disagreement(logits: Float[Tensor, "b t e"]) -> Tensor:
    """Cross entropy of which experts a token activates, given those of the next; 0 for one."""
    before, after = _STEEP * logits[:, :-1], _STEEP * logits[:, 1:]
    total = F.binary_cross_entropy_with_logits(before, after.sigmoid(), reduction="sum")
    return total / max(before.numel(), 1)


def _chunks(x: Num[Tensor, "b t e"] | Bool[Tensor, "b t e"], chunk: int) -> Tensor:
    """`[B, chunks, chunk, E]`, with zeros after the end."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % chunk)).unflatten(1, (-1, chunk))
