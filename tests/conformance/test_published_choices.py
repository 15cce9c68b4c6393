"""What each shipped config chooses, against what its paper says, written down by hand.

Left out is what the papers leave open: number of heads, widths, chunks of this scale.
"""

from operator import attrgetter

import pytest

from mneme import layers
from mneme.harness.config.build import build
from mneme.harness.config.compose import CONFIG_DIR, compose_checked, compose_group
from mneme.ops import test_time

MIXERS = {
    # a row: the class, and attributes of the layer by dotted name
    "attention": (layers.SoftmaxAttention, {"window": None, "rope_base": 10_000.0}),  # RoFormer
    "sliding_window": (layers.SoftmaxAttention, {"window": 16}),
    "linear_attention": (  # elu + 1, with a normalizer and no convolution
        layers.LinearAttention,
        {"feature_map": "elu", "conv": None, "norm": None, "gate_proj": None},
    ),
    "based": (layers.LinearAttention, {"feature_map": "taylor", "norm": None}),
    "retention": (layers.Retention, {"conv": None, "silu": False, "rotary_base": 10_000.0}),
    "gla": (layers.GatedLinearAttention, {"key_dim": 16, "value_dim": 32, "conv": None}),
    "deltanet": (  # short convolutions of 4, SiLU, unit keys, no output gate
        layers.DeltaNet,
        {"conv.weight.shape": (192, 4), "silu": True, "gate_proj": None, "max_beta": 1.0},
    ),
    "gated_deltanet": (
        layers.GatedDeltaNet,
        {"conv.weight.shape": (192, 4), "silu": True, "gate_proj.bias": None, "max_beta": 1.0},
    ),
    "mamba": (layers.Mamba, {"conv.weight.shape": (128, 4), "A_log.shape": (128, 16)}),
    "mamba2": (layers.Mamba2, {"groups": 1, "silu": True}),
    "mom": (  # four memories, two of them for a token, and a shared one; of Gated DeltaNet
        layers.MixtureOfMemories,
        {"top_k": 2, "shared": True, "base.__class__": layers.GatedDeltaNet, "router.bias": None},
    ),
    "bmojo": (layers.BMojo, {"memory.__class__": layers.GatedDeltaNet}),
    "s4d": (layers.S4D, {}),
    "slstm": (layers.SLSTM, {"cell": "slstm", "conv.weight.shape": (64, 4)}),
    "titans_lmm": (  # two layers, squared error, momentum, a forget gate
        layers.TestTimeMemory,
        {
            "rule.memory": test_time.MLP(depth=2, expand=4),
            "rule.objective": test_time.SquaredError(),
            "rule.momentum": True,
            "rule.decay": "head",
            "rule.update": "token",
            "rule.orthogonal": False,
            "rule.window": 1,
            "rule.read_before": False,
            "features.silu": True,
            "features.normalize": True,
            "features.rope": None,
            "conv.weight.shape": (192, 4),
        },
    ),
    "titans_linear": (
        layers.TestTimeMemory,
        {
            "rule.memory": test_time.Matrix(),
            "rule.gradient_reference": "token",
            "rule.momentum": True,
        },
    ),
    "ttt_linear": (  # steps averaged over the chunk so far, nothing forgotten, positions in a chunk
        layers.TestTimeMemory,
        {
            "rule.memory": test_time.MLP(depth=1, bias=True),
            "rule.update": "average",
            "rule.momentum": False,
            "rule.decay": "none",
            "rule.chunk": 16,
            "features.rope": "chunk",
            "features.silu": False,
            "norm.normalized_shape": (64,),
            "gate_proj": None,
        },
    ),
    "ttt_mlp": (
        layers.TestTimeMemory,
        {
            "rule.memory": test_time.MLP(depth=2, expand=4, bias=True),
            "rule.update": "average",
            "rule.momentum": False,
            "rule.decay": "none",
            "rule.chunk": 16,
        },
    ),
    "lact": (layers.Parallel, {"parts.0.__class__": layers.SoftmaxAttention}),
    "moneta": (  # l_3 errors, an l_4 norm of the weights
        layers.TestTimeMemory,
        {
            "rule.objective": test_time.LpError(p=3),
            "rule.boundary": test_time.LqNorm(q=4),
            "rule.decay": "channel",
            "rule.momentum": False,
        },
    ),
    "yaad": (
        layers.TestTimeMemory,
        {
            "rule.objective.__class__": test_time.Huber,
            "rule.decay": "channel",
            "rule.momentum": False,
        },
    ),
    "memora": (
        layers.TestTimeMemory,
        {"rule.boundary.__class__": test_time.Softmax, "rule.momentum": False},
    ),
    "omeganet": (  # a window of tokens on polynomial features, without momentum
        layers.TestTimeMemory,
        {"rule.window": 4, "features.degree": 2, "rule.momentum": False, "rule.orthogonal": False},
    ),
    "atlas": (  # OmegaNet with momentum and Newton-Schulz
        layers.TestTimeMemory,
        {
            "rule.window": 4,
            "features.degree": 2,
            "rule.momentum": True,
            "rule.orthogonal": True,
            "rule.outer_lr": True,
        },
    ),
    "titans_mac": (layers.MemoryAsContext, {"memory.rule.memory": test_time.MLP(depth=2)}),
    "titans_mag": (layers.MemoryAsGate, {"memory.rule.memory": test_time.MLP(depth=2)}),
    "titans_mal": (layers.MemoryAsLayer, {"memory.rule.memory": test_time.MLP(depth=2)}),
}
for form in ("decode", "encode", "similarity"):
    MIXERS[f"lattice_{form}"] = (
        layers.TestTimeMemory,
        {"rule.memory.form": form, "rule.boundary.__class__": test_time.UnitSlots},
    )


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_is_what_its_paper_says(name):
    cls, choices = MIXERS[name]
    layer = build(compose_group("mixer", [f"mixer={name}"]))(64)
    assert type(layer) is cls
    found = {choice: attrgetter(choice)(layer) for choice in choices}
    assert found == choices


def test_lact_has_a_gated_memory_beside_attention_of_a_chunk():
    attention, memory = build(compose_group("mixer", ["mixer=lact"]))(64).parts
    assert attention.window == memory.rule.chunk
    assert memory.rule.memory == test_time.SwiGLU()
    assert memory.rule.objective == test_time.DotProduct()
    assert memory.rule.boundary == test_time.RowNorm()
    assert (memory.rule.update, memory.rule.read_before) == ("chunk", True)
    assert (memory.rule.decay, memory.rule.momentum) == ("none", True)


ROWS = {"table": {"update": "lazy", "lr_multiplier": 1.0}}
PKM = {"heads": 4, "top_k": 32, "sub_keys": 128}  # arXiv 1907.05242: 4 heads, 32 keys of each
FFNS = {  # what a file chooses, besides the defaults of its class; sizes are those of small models
    "bank": {"bank": {"branching": 4, "hidden": [16, 8, 8], "kind": "ffn", "update": "lazy"}},
    "blockffn": {"experts": 32},
    "dkvb": {"codebooks": 64, "keys": 256, "key_dim": 8, **ROWS},
    "memory_plus": {**PKM, "table": {**ROWS["table"], "share": "memory_plus"}},
    "moe": {"experts": 8, "top_k": 2, "renormalize": False},  # OLMoE: weights as they are
    "moe_chunk": {"chunk": 32, "mixture": {"experts": 4, "top_k": 2, "renormalize": True}},
    "peer": {"heads": 8, "top_k": 16, "sub_keys": 128, **ROWS},  # arXiv 2407.04153
    "pkm": {**PKM, **ROWS},
    "pkm_parallel": {"layers": [{}, {**PKM, **ROWS}]},
    "ultramem": {
        "heads": 2,
        "top_k": 32,
        "sub_keys": 128,
        "expansion": 4,  # arXiv 2411.12364: virtual values for 4 blocks
        "scoring": {"rank": 2, "cores": 2, "tail_loss": 0.001},
        **ROWS,
    },
    "ultramem_v2": {
        "layers": [
            {},
            {"heads": 1, "top_k": 32, "scoring": {"rank": 2, "query_per_rank": True}, **ROWS},
        ]
    },
}
MODELS = {"recall": (64, 2), "facts": (64, 2), "lm": (128, 4)}  # arXiv 2312.04927 has two layers


def part_of(expected, found) -> bool:
    """Whether all that is expected is found, entry by entry."""
    if isinstance(expected, dict):
        return all(key in found and part_of(expected[key], found[key]) for key in expected)
    if isinstance(expected, list):
        pairs = zip(expected, found, strict=True)
        return all(part_of(wanted, got) for wanted, got in pairs)
    return expected == found


@pytest.mark.parametrize("name", FFNS)
def test_a_feed_forward_is_of_the_size_that_was_chosen(name):
    found = compose_group("ffn", [f"ffn={name}"])
    assert part_of(FFNS[name], found), found


def test_every_feed_forward_with_choices_is_in_the_table():
    files = {file.stem for file in (CONFIG_DIR / "ffn").glob("*.yaml")}
    assert files - {"none", "mlp", "swiglu"} == set(FFNS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_of_the_size_that_was_chosen(name):
    found = compose_group("model", [f"model={name}"])
    assert (found["d_model"], found["n_layers"]) == MODELS[name]
    assert (found["tie_embeddings"], found["dropout"]) == (True, 0.0)
    assert not found["checkpoint_blocks"]


@pytest.mark.parametrize(
    ("name", "attends"), [("hybrid", [0, 0, 0, 1]), ("griffin", [0, 0, 1]), ("samba", [0, 1])]
)
def test_a_hybrid_attends_in_the_blocks_that_its_paper_says(name, attends):
    pattern = compose_group("model", [f"model={name}"])["pattern"]
    mixers = [block[0]["_target_"] for block in pattern]
    assert [int(mixer == "mneme.layers.SoftmaxAttention") for mixer in mixers] == attends


TRAINING = {  # what all runs share: clipping, decay and floor as GPT-3's (arXiv 2005.14165)
    ("trainer", "default"): {
        "max_steps": 1000,
        "val_check_interval": 200,
        "accumulate_grad_batches": 1,
        "gradient_clip_val": 1.0,
        "precision": "32-true",
    },
    ("optimizer", "adamw"): {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
    ("schedule", "constant"): {"warmup": 0.05},
    ("schedule", "cosine"): {"warmup": 0.05, "floor": 0.1},
    ("schedule", "wsd"): {"warmup": 0.05, "decay": 0.2, "floor": 0.0},  # arXiv 2404.06395
}
EXPERIMENTS = {"demo": (900, 1e-2), "facts": (1000, 3e-3), "rare_facts": (1000, 3e-3)}


@pytest.mark.parametrize(("group", "name"), TRAINING)
def test_runs_are_trained_by_the_recipe_that_was_chosen(group, name):
    found = compose_group(group, [f"{group}={name}"])
    assert part_of(TRAINING[group, name], found), found


def test_every_schedule_and_optimizer_is_in_the_table():
    files = {(g, file.stem) for g in ("trainer", "optimizer", "schedule")
             for file in (CONFIG_DIR / g).glob("*.yaml")}  # fmt: skip
    assert files == set(TRAINING)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_as_long_as_their_pages_say(name):
    config = compose_checked([f"experiment={name}"]).config
    assert (config["trainer"]["max_steps"], config["optimizer"]["lr"]) == EXPERIMENTS[name]


def test_the_second_phase_is_half_of_the_experiment():
    config = compose_checked(["experiment=facts", "task=facts_two_phases"]).config
    assert 2 * config["task"]["second_phase_after"] == config["trainer"]["max_steps"]
