"""Sampling with carried state: the prompt is read once, then each token costs one step.

Of equal logits that of the lower token counts as the likelier, in greedy decoding as in filters.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mneme.layers import Output, State
from mneme.models.language_model import LanguageModel


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Int[Tensor, "b t"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    state: State = None,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "b n"], State]:
    """Continues each prompt by `max_new_tokens` tokens.

    Args:
        model: any language model; put it in eval mode first.
        prompt: `[B, T]`, at least one token.
        max_new_tokens: how many tokens to add, from 0.
        temperature: 0 for greedy decoding; above 0, however little, divides the logits; default 1.
        top_k: sample among the k most likely tokens only, never more.
        top_p: sample among the fewest tokens whose probabilities sum to at least this
            (arXiv 1904.09751).
        state: where an earlier call ended, to go on with a conversation.
        generator: source of randomness; the global one by default.

    Returns:
        The new tokens `[B, max_new_tokens]`, and the state before the last of them was read.

    Raises:
        ValueError: an empty prompt or an option outside its range.
    """
    _check_options(prompt, max_new_tokens, temperature, top_k, top_p)
    new, tokens = [], prompt
    for _ in range(max_new_tokens):
        output: Output = model(tokens, state)
        state = output.state
        tokens = _pick(output.y[:, -1].float(), temperature, top_k, top_p, generator)
        new.append(tokens)
    return torch.cat([prompt[:, :0], *new], dim=1), state


def _check_options(
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token to start from")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    if temperature < 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be 0 (greedy) or a number above, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def _pick(
    logits: Float[Tensor, "b v"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, "b 1"]:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # Before the largest is 0, a tiny temperature would make infinities of several.
    logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)
    logits = filter_logits(logits, top_k, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def filter_logits(
    logits: Float[Tensor, "b v"], top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "b v"]:
    """Sets the logits that top-k and then nucleus sampling leave out to minus infinity."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        above, equal = logits > least, logits == least
        room = top_k - above.sum(-1, keepdim=True)
        logits = logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room))), -torch.inf)
    if top_p is not None:
        ranked, order = logits.sort(descending=True, stable=True)
        before = ranked.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0  # the most likely token always stays
        ranked = ranked.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ranked)
    return logits
