"""SoftmaxAttention against the attention of Llama and Mistral in transformers."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

from mneme.layers import SoftmaxAttention
from tests.peers.compare import InDouble, assert_same, peer
from tests.peers.mappings.transformers_attention import attention_options, attention_weights

WIDTH, LENGTH = 24, 13
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 30,
}


def x():
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def compare(config, attention, rotary, mask, **options):
    """The peer runs as its model runs it, with the model's own positions and mask."""
    theirs = peer(lambda: attention(config, layer_idx=0))
    with InDouble():
        embedding = rotary(config)

    def run(x):
        positions = torch.arange(x.shape[1])[None]
        seen = mask(config, x, attention_mask=None, past_key_values=None, position_ids=positions)
        return theirs(x, position_embeddings=embedding(x, positions), attention_mask=seen)[0]

    ours = SoftmaxAttention(WIDTH, **attention_options(config))
    assert_same(ours, theirs, attention_weights, x(), run=run, **options)


def compare_llama(kind="eager", in_double=True, tolerance=1e-10, **options):
    config = LlamaConfig(**SIZES, **options)
    config._attn_implementation = kind
    precision = {"in_double": in_double, "tolerance": tolerance}
    compare(config, LlamaAttention, LlamaRotaryEmbedding, create_causal_mask, **precision)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_with_grouped_heads(kv_heads, kind):
    compare_llama(kind, num_key_value_heads=kv_heads)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True},
        {"head_dim": 10, "num_key_value_heads": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
        {"rope_parameters": LLAMA3, "head_dim": 20},
    ],
    ids=str,
)
def test_llama_with_what_released_weights_need(options):
    compare_llama(**options)


def test_llama_as_it_is():
    compare_llama(in_double=False, tolerance=1e-5)  # positions and softmax are in fp32


@pytest.mark.parametrize("window", [1, 4, 12, 13, 50, None])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_mistral_with_windows_shorter_and_longer_than_the_text(window, kind):
    config = MistralConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=window)
    config._attn_implementation = kind
    mask = create_causal_mask if window is None else create_sliding_window_causal_mask
    compare(config, MistralAttention, MistralRotaryEmbedding, mask)


def test_positions_without_a_counterpart_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    with pytest.raises(ValueError, match="'dynamic' have no counterpart"):
        attention_options(LlamaConfig(**SIZES, rope_parameters=rope))
