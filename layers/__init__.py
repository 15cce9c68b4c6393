"""Layers: every memory and its company behind one protocol (see `mneme.layers.protocol`).

An import line here is what puts a layer on the map.
"""

if __name__ != "mneme.layers":  # under two names, it would be two packages
    raise ImportError("import mneme.layers, not layers")


from mneme.layers.attention.softmax_attention import SoftmaxAttention
from mneme.layers.bank.hierarchical_ffn import HierarchicalFFN
from mneme.layers.bank.memory_bank import (
    GENERIC,
    Bank,
    BankOptions,
    BankReader,
    BankShape,
    MemoryBank,
)
from mneme.layers.combinators import Parallel, Residual, Sequential
from mneme.layers.feed_forward import MLP, SwiGLU
from mneme.layers.hybrid.bmojo import BMojo
from mneme.layers.hybrid.cross_decoder import CrossDecoder
from mneme.layers.hybrid.gated_memory_unit import GatedMemoryUnit
from mneme.layers.hybrid.memory_as_context import MemoryAsContext
from mneme.layers.hybrid.memory_with_attention import MemoryAsGate, MemoryAsLayer
from mneme.layers.matrix.delta_net import DeltaNet
from mneme.layers.matrix.gated_delta_net import GatedDeltaNet
from mneme.layers.matrix.gated_linear_attention import GatedLinearAttention
from mneme.layers.matrix.linear_attention import LinearAttention
from mneme.layers.matrix.mamba2 import Mamba2
from mneme.layers.matrix.matrix_memory import MatrixMemory, MatrixState, Operands
from mneme.layers.matrix.mixture_of_memories import MixtureOfMemories, MixtureState
from mneme.layers.matrix.prefix_linear_attention import PrefixLinearAttention
from mneme.layers.matrix.retention import Retention
from mneme.layers.parts.rotary import RopeScaling
from mneme.layers.parts.shared import (
    NO_ROUTE,
    Fetched,
    RoutedPart,
    SharedPart,
    bind_part,
    bind_shared_parts,
    own_part,
    shared_places,
)
from mneme.layers.parts.short_convolution import ShortConvolution
from mneme.layers.parts.telemetry import Record, observe, observing, recording
from mneme.layers.protocol import (
    Layer,
    LayerFactory,
    LayerList,
    Memory,
    Output,
    ParamOptions,
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
from mneme.layers.recurrent.gated_convolution import GatedConvolution
from mneme.layers.recurrent.long_conv import LongConv
from mneme.layers.recurrent.mamba import Mamba
from mneme.layers.recurrent.s4d import S4D
from mneme.layers.recurrent.slstm import SLSTM
from mneme.layers.registry import LAYERS, Entry, register
from mneme.layers.sparse.block_ffn import BlockFFN
from mneme.layers.sparse.chunk_mixture_of_experts import ChunkMixtureOfExperts, ChunkState
from mneme.layers.sparse.discrete_bottleneck import DiscreteKeyValueBottleneck
from mneme.layers.sparse.mixture_of_experts import MixtureOfExperts
from mneme.layers.sparse.peer import PEER
from mneme.layers.sparse.product_key_memory import ProductKeyMemory
from mneme.layers.sparse.stored_table import StoredTable, replace_tables, store_tables
from mneme.layers.sparse.table import TableOptions
from mneme.layers.sparse.ultra_mem import UltraMem, UltraMemV2
from mneme.layers.sparse.ultra_mem_keys import TuckerScores
from mneme.layers.sparse.usage import Usage, UsageMeter, metering, reads_tables, with_shared_tables
from mneme.layers.test_time.test_time_memory import TestTimeMemory
from mneme.layers.test_time.test_time_parts import Features, ForgetGate, Learner, Readout
