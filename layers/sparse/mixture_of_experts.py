"""Mixture of experts: several feed-forward layers, of which each token goes to a few."""

from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.feed_forward import SwiGLU
from mneme.layers.parts.telemetry import observe
from mneme.layers.protocol import Layer, Output, State, require_at_least
from mneme.layers.registry import register
from mneme.layers.sparse.experts import Experts
from mneme.ops.options import scaled_width
from mneme.ops.routing import (
    Routes,
    balance_loss,
    route,
    router_logits,
    router_telemetry,
    spread,
    z_loss,
)


@register(
    default={"experts": 4, "expand": 1},
    one_choice={"experts": 3, "top_k": 1, "expand": 1, "z_loss": 1e-3},
    with_shared={
        "experts": 4,
        "top_k": 3,
        "renormalize": True,
        "shared_experts": 1,
        "multiple_of": 2,
    },
)
class MixtureOfExperts(Layer):
    """Token-choice mixture of SwiGLU experts, without a capacity (as in OLMoE, arXiv 2409.02060).

    A router `p = softmax(W_r x)`, in fp32, sends each token to its k likeliest experts I:

        y = sum_{e in I} p_e FFN_e(x) + FFN_shared(x)

    Every token is computed by all k of its experts, however many choose the same: tokens are sorted
    by expert, and each expert is one product over its own (MegaBlocks, arXiv 2211.15841, has it in
    one kernel). The layer has no state, and a token's output depends on that token alone.

    Args:
        d_model: width D.
        experts: E; default 8.
        top_k: k; default 2.
        expand: hidden width of one expert over D; by default 8/3 over the experts that a token goes
            to, shared ones included, so that a token costs what it does in a dense SwiGLU.
        multiple_of: the hidden width is rounded up to a multiple of this; default 8.
        renormalize: divide the weights of the chosen by their sum, as in Mixtral (arXiv
            2401.04088); default False, as in OLMoE. With k = 1 all weights are then one, and the
            router learns from its losses alone.
        shared_experts: experts that every token goes to, with weight one, as one SwiGLU of that
            many times the width (DeepSeekMoE, arXiv 2401.06066); default 0.
        balance_loss: weight alpha of `alpha E sum_e f_e P_e`, with f_e the share of all choices
            that fall on e and P_e its mean probability; alpha if loads are even; default 0.01.
        z_loss: weight of the mean squared log partition of the router's logits; default 0.001.

    Telemetry: `load_max`, `load_min` and `router_entropy`; `route`, the weights of all experts.

    f_e is divided by k, as in MegaBlocks, with which OLMoE was trained; its port in transformers
    does not divide, and neither does `MixtureOfMemories`, which follows its paper.

    Where we differ: a model adds up its layers' losses, and MegaBlocks takes their mean.

    Raises:
        ValueError: more choices than experts.
    """

    def __init__(
        self,
        d_model: int,
        *,
        experts: int = 8,
        top_k: int = 2,
        expand: float | None = None,
        multiple_of: int = 8,
        renormalize: bool = False,
        shared_experts: int = 0,
        balance_loss: float = 0.01,
        z_loss: float = 0.001,
    ) -> None:
        super().__init__()
        require_at_least(1, experts=experts, top_k=top_k, multiple_of=multiple_of)
        require_at_least(0, shared_experts=shared_experts, balance_loss=balance_loss, z_loss=z_loss)
        if top_k > experts:
            raise ValueError(f"top_k ({top_k}) must be at most experts ({experts})")
        if expand is None:
            expand = 8 / 3 / (top_k + shared_experts)
        self.top_k, self.renormalize = top_k, renormalize
        self.balance_loss, self.z_loss = balance_loss, z_loss
        hidden = scaled_width(d_model, expand, multiple_of=multiple_of)
        self.router = nn.Linear(d_model, experts, bias=False)
        self.experts = Experts(d_model, experts=experts, hidden=hidden)
        self.shared = None
        if shared_experts:
            self.shared = SwiGLU(d_model, expand=shared_experts * expand, multiple_of=multiple_of)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Transforms each position by its experts."""
        return self.routed(x, x)

    def routed(self, x: Float[Tensor, "b t d"], seen: Float[Tensor, "b t d"]) -> Output:
        """Transforms each position by the experts that the router chooses for what it sees."""
        logits = router_logits(seen, self.router.weight)
        routes = route(logits, self.top_k, renormalize=self.renormalize)
        y = mixed(self.experts, x, routes)
        if self.shared is not None:
            y = y + self.shared(x).y
        observe(self, "route", spread(routes))
        aux = router_aux(routes, logits, balance=self.balance_loss, z=self.z_loss)
        return Output(y, aux=aux)

    def active_parameters(self) -> int:
        """All but the experts that a token does not go to."""
        routed = sum(p.numel() for p in self.experts.parameters())
        held = sum(p.numel() for p in self.parameters())
        return held - routed + self.experts.parameters_of(self.top_k)


def mixed(experts: Experts, x: Float[Tensor, "b t d"], routes: Routes) -> Float[Tensor, "b t d"]:
    """What each token's routed experts make of it."""
    copies = routes.memory.new_full((x.shape[0] * x.shape[1],), routes.memory.shape[-1])
    y = experts(x.flatten(0, 1), routes.memory.flatten(), copies, routes.weight.flatten())
    return y.view(x.shape)


def router_aux(
    routes: Routes, logits: Float[Tensor, "b t m"], *, balance: float, z: float
) -> dict[str, Tensor]:
    """Losses of a router that chooses experts, by their weights, and its telemetry."""
    aux = router_telemetry(routes)
    if balance:
        aux["loss_balance"] = balance * balance_loss(routes) / routes.memory.shape[-1]
    if z:
        aux["loss_z"] = z * z_loss(logits)
    return aux
