"""Layers: every memory and its company behind one protocol (see `mneme.layers.protocol`).

An import line here is what puts a layer on the map.
"""

if __name__ != "mneme.layers":  # under two names, it would be two packages
    raise ImportError("import mneme.layers, not layers")


from mneme.layers.block_ffn import BlockFFN
from mneme.layers.bmojo import BMojo
from mneme.layers.chunk_mixture_of_experts import ChunkMixtureOfExperts, ChunkState
from mneme.layers.combinators import Parallel, Residual, Sequential
from mneme.layers.cross_decoder import CrossDecoder
from mneme.layers.delta_net import DeltaNet
from mneme.layers.discrete_bottleneck import DiscreteKeyValueBottleneck
from mneme.layers.feed_forward import MLP, SwiGLU
from mneme.layers.gated_convolution import GatedConvolution
from mneme.layers.gated_delta_net import GatedDeltaNet
from mneme.layers.gated_linear_attention import GatedLinearAttention
from mneme.layers.gated_memory_unit import GatedMemoryUnit
from mneme.layers.hierarchical_ffn import HierarchicalFFN
from mneme.layers.linear_attention import LinearAttention
from mneme.layers.long_conv import LongConv
from mneme.layers.mamba import Mamba
from mneme.layers.mamba2 import Mamba2
from mneme.layers.matrix_memory import MatrixMemory, MatrixState, Operands
from mneme.layers.memory_as_context import MemoryAsContext
from mneme.layers.memory_as_gate import MemoryAsGate
from mneme.layers.memory_as_layer import MemoryAsLayer
from mneme.layers.memory_bank import (
    GENERIC,
    Bank,
    BankOptions,
    BankReader,
    BankShape,
    Fetched,
    MemoryBank,
    bind_bank,
)
from mneme.layers.mixture_of_experts import MixtureOfExperts
from mneme.layers.mixture_of_memories import MixtureOfMemories, MixtureState
from mneme.layers.peer import PEER
from mneme.layers.prefix_linear_attention import PrefixLinearAttention
from mneme.layers.product_key_memory import ProductKeyMemory
from mneme.layers.protocol import (
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
from mneme.layers.registry import LAYERS, Entry, register
from mneme.layers.retention import Retention
from mneme.layers.rotary import RopeScaling
from mneme.layers.s4d import S4D
from mneme.layers.short_convolution import ShortConvolution
from mneme.layers.slstm import SLSTM
from mneme.layers.softmax_attention import SoftmaxAttention
from mneme.layers.stored_table import StoredTable, replace_tables, store_tables
from mneme.layers.table import TableOptions, bind_shared_tables
from mneme.layers.telemetry import Record, observe, observing, recording
from mneme.layers.test_time_memory import TestTimeMemory
from mneme.layers.test_time_parts import Features, Forgetting, Learner, Readout
from mneme.layers.ultra_mem import UltraMem, UltraMemV2
from mneme.layers.ultra_mem_keys import TuckerScores
from mneme.layers.usage import Usage, UsageMeter, metering, reads_tables, with_shared_tables
