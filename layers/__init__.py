"""Layers: every memory and its company behind one protocol (see `layers.protocol`).

An import line here is what puts a layer on the map.
"""

from layers.block_ffn import BlockFFN
from layers.bmojo import BMojo
from layers.chunk_mixture_of_experts import ChunkMixtureOfExperts, ChunkState
from layers.combinators import Parallel, Residual, Sequential
from layers.cross_decoder import CrossDecoder
from layers.delta_net import DeltaNet
from layers.discrete_bottleneck import DiscreteKeyValueBottleneck
from layers.feed_forward import MLP, SwiGLU
from layers.gated_convolution import GatedConvolution
from layers.gated_delta_net import GatedDeltaNet
from layers.gated_linear_attention import GatedLinearAttention
from layers.gated_memory_unit import GatedMemoryUnit
from layers.hierarchical_ffn import HierarchicalFFN
from layers.linear_attention import LinearAttention
from layers.long_conv import LongConv
from layers.mamba import Mamba
from layers.mamba2 import Mamba2
from layers.matrix_memory import MatrixMemory, MatrixState, Operands
from layers.memory_as_context import MemoryAsContext
from layers.memory_as_gate import MemoryAsGate
from layers.memory_as_layer import MemoryAsLayer
from layers.memory_bank import (
    GENERIC,
    Bank,
    BankOptions,
    BankReader,
    BankShape,
    Fetched,
    MemoryBank,
    bind_bank,
)
from layers.mixture_of_experts import MixtureOfExperts
from layers.mixture_of_memories import MixtureOfMemories, MixtureState
from layers.peer import PEER
from layers.prefix_linear_attention import PrefixLinearAttention
from layers.product_key_memory import ProductKeyMemory
from layers.protocol import (
    Layer,
    LayerList,
    Memory,
    Output,
    Policy,
    Recipe,
    RoutedLayer,
    SavingLayer,
    State,
    detach_state,
    is_loss,
    join_aux,
    load_state,
    map_state,
    require_at_least,
    save_state,
    select_state,
    start_state,
    state_tensors,
)
from layers.registry import LAYERS, Entry, register
from layers.retention import Retention
from layers.rotary import RopeScaling
from layers.s4d import S4D
from layers.short_convolution import ShortConvolution
from layers.slstm import SLSTM
from layers.softmax_attention import SoftmaxAttention
from layers.stored_table import StoredTable, replace_tables, store_tables
from layers.table import TableOptions, bind_shared_tables
from layers.telemetry import Record, observe, observing, recording
from layers.test_time_memory import TestTimeMemory
from layers.test_time_parts import Features, Forgetting, Learner, Readout
from layers.ultra_mem import UltraMem, UltraMemV2
from layers.ultra_mem_keys import TuckerScores
from layers.usage import Usage, UsageMeter, metering, reads_tables, with_shared_tables
