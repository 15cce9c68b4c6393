"""Layers: every memory and its company behind one protocol (see `layers.protocol`).

An import line here is what puts a layer on the map.
"""

from layers.combinators import Parallel, Residual, Sequential
from layers.feed_forward import MLP, SwiGLU
from layers.gated_convolution import GatedConvolution
from layers.gated_delta_net import GatedDeltaNet
from layers.protocol import (
    Layer,
    LayerList,
    Output,
    Recipe,
    State,
    detach_state,
    is_loss,
    join_aux,
    load_state,
    map_state,
    require_at_least,
    save_state,
    select_state,
    state_tensors,
)
from layers.registry import LAYERS, Entry, register
from layers.short_convolution import ShortConvolution
from layers.softmax_attention import SoftmaxAttention
