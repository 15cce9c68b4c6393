"""Banks on models of transformers: tiny ones with random weights, of three architectures."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from mneme.harness.run.run_directory import RunError
from mneme.layers import BankOptions, MemoryBank
from mneme.layers.bank.memory_bank import GENERIC
from mneme.models import make_optimizer
from mneme.models.bank import model_hash
from mneme.models.bank.attach import attach_bank, attach_saved, attach_stored
from mneme.routers import HashedTfidf, Router
from mneme.storage.files import StorageError
from scripts import attach_bank as attach_bank_program
from tests.helpers import assert_close

transformers = pytest.importorskip(
    "transformers", reason="banks on pretrained models need requirements-hf.txt"
)

tokenizers = pytest.importorskip("tokenizers")

OPTIONS = BankOptions(branching=3, hidden=(4, 2), generic_probability=0.0)
ROUTE = torch.tensor([0, 5, GENERIC])
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # with the usual 0.02, a model of this size says next to nothing
    "pad_token_id": 0,
    "eos_token_id": None,
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def tiny(family="llama", seed=0, dtype=torch.float32):
    config, model = (getattr(transformers, name) for name in FAMILIES[family])
    torch.manual_seed(seed)
    return model(config(**SIZES)).eval().to(dtype)


def filled(model, **options):
    """A bank whose blocks all add something."""
    attached = attach_bank(model, OPTIONS, **options).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in attached.bank.parameters():
            parameter.normal_(0, 0.3)
    return attached


def prompts(rows=3, length=6):
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(2))


def continued(attached, tokens, **options):
    mask = torch.ones_like(tokens)
    return attached.generate(tokens, attention_mask=mask, do_sample=False, **options)


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_bank_changes_no_bit(family, dtype):
    model, tokens = tiny(family, dtype=dtype), prompts()
    alone, text = model(tokens).logits, continued(model, tokens, max_new_tokens=3)
    attached = attach_bank(model, OPTIONS).eval()
    assert torch.equal(attached(tokens, route=ROUTE).logits, alone)
    assert torch.equal(continued(attached, tokens, route=ROUTE, max_new_tokens=3), text)


@every_family
def test_a_bank_is_the_model_with_wider_feed_forwards(family):
    model, wide = tiny(family, dtype=torch.float64), tiny(family, dtype=torch.float64)
    attached, tokens = filled(model), prompts()
    blocks = attached.bank.fetch(torch.tensor([5]))[0].double()
    for layer, block in zip(wide.get_decoder().layers, blocks, strict=True):
        gate, up, out = block.detach().chunk(3, dim=-1)
        mlp = layer.mlp
        mlp.gate_proj.weight = nn.Parameter(torch.cat([mlp.gate_proj.weight, gate]))
        mlp.up_proj.weight = nn.Parameter(torch.cat([mlp.up_proj.weight, up]))
        mlp.down_proj.weight = nn.Parameter(torch.cat([mlp.down_proj.weight, out.T], dim=1))
    logits = attached(tokens, route=torch.full((3,), 5)).logits
    assert_close(logits, wide(tokens).logits, "logits", 1e-12)
    assert not torch.allclose(logits, model(tokens).logits)


@every_family
def test_generating_with_a_cache_gives_the_logits_of_a_forward_pass(family):
    attached, tokens = filled(tiny(family, dtype=torch.float64)), prompts()
    options = {"output_logits": True, "return_dict_in_generate": True}
    text = continued(attached, tokens, route=ROUTE, max_new_tokens=5, **options)
    whole = attached(text.sequences[:, :-1], route=ROUTE).logits[:, -5:]
    assert_close(torch.stack(text.logits, dim=1), whole.float(), "logits", 1e-7)


def test_beams_have_the_blocks_of_their_prompt():
    attached, tokens = filled(tiny(dtype=torch.float64)), prompts()
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    together = continued(attached, tokens, route=ROUTE, **beams)
    alone = [
        continued(attached, tokens[i : i + 1], route=ROUTE[i : i + 1], **beams) for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_outside_of_a_route_the_model_is_its_base_model():
    model, tokens = tiny(), prompts()
    alone, names = model(tokens).logits, list(model.state_dict())
    attached = filled(model)
    widened = attached(tokens, route=ROUTE).logits
    with attached.routed(ROUTE):
        assert torch.equal(model(tokens).logits, widened)
        with pytest.raises(ValueError, match="3 sequences, with routes for 2"):
            attached(tokens, route=ROUTE[:2])
        assert torch.equal(model(tokens).logits, widened)
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(model(tokens).logits))
        thread.start()
        thread.join()
    assert torch.equal(elsewhere[0], alone)
    assert torch.equal(model(tokens).logits, alone)
    assert list(model.state_dict()) == names


def test_two_banks_of_a_model_add_up_and_come_off_one_by_one():
    model, tokens = tiny(), prompts()
    first, second = filled(model), filled(model, layers=[1])
    alone = [bank(tokens, route=ROUTE).logits for bank in (first, second)]
    with first.routed(ROUTE):
        both = second(tokens, route=ROUTE).logits
        assert not any(torch.equal(both, one) for one in alone)
        second.detach()
        assert torch.equal(model(tokens).logits, alone[0])


def test_detaching_gives_the_model_back():
    model, tokens = tiny(), prompts()
    model.lm_head.requires_grad_(False)
    alone = model(tokens).logits
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    attached = filled(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert attached.detach() is model
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(model(tokens).logits, alone)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="was detached"):
        attached(tokens, route=ROUTE)


def test_layers_are_chosen_and_others_left_alone():
    model, tokens = tiny(), prompts()
    attached = filled(model, layers=[1])
    assert attached.layers == (1,)
    assert attached.bank.shape.places == 1
    hidden, widened = (
        call(tokens, output_hidden_states=True).hidden_states
        for call in (model, partial(attached, route=ROUTE))
    )
    assert torch.equal(hidden[1], widened[1])
    assert not torch.equal(hidden[2], widened[2])


def train(attached, tokens, route, steps):
    optimizer = make_optimizer(attached, partial(torch.optim.AdamW, lr=1e-2))
    for _ in range(steps):
        optimizer.zero_grad()
        attached(tokens, labels=tokens, route=route).loss.backward()
        optimizer.step()


def test_two_routes_learn_contradicting_continuations_of_one_prompt():
    model = tiny()
    before = bits(model)
    attached = attach_bank(model, OPTIONS)
    untrained = bits(attached.bank)
    tokens, route = torch.tensor([[5, 6, 7, 10, 11], [5, 6, 7, 20, 21]]), torch.tensor([0, 5])
    train(attached, tokens, route, steps=40)
    text = continued(attached.eval(), tokens[:, :3], route=route, max_new_tokens=2)
    assert torch.equal(text, tokens)
    assert_same_bits(bits(model), before)
    touched = {"generic": [], "level1": [0, 1], "level2": [0, 5]}
    for name, rows in touched.items():
        changed = (bits(attached.bank)[name] != untrained[name]).flatten(1).any(1)
        assert changed.nonzero()[:, 0].tolist() == rows, name


def test_a_base_model_is_trained_too_if_asked():
    model = tiny()
    before = bits(model)
    train(attach_bank(model, OPTIONS, freeze=False), prompts(), ROUTE, steps=1)
    assert not torch.equal(bits(model)["lm_head.weight"], before["lm_head.weight"])


def test_recomputed_activations_have_their_blocks():
    model, tokens = tiny(), prompts()
    attached = filled(model)
    model.train()

    def gradients():
        attached.zero_grad()
        loss = attached(tokens, labels=tokens, route=ROUTE).loss
        with ThreadPoolExecutor(1) as other:  # as autograd runs backward for a GPU
            other.submit(loss.backward).result()
        return [p.grad.to_dense() for p in attached.bank.parameters()]

    kept = gradients()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="call enable_checkpointing"):
        attached(tokens, route=ROUTE)
    attached.enable_checkpointing()
    assert all(map(torch.equal, gradients(), kept))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_bank_gives_the_same_bits_from_memory_and_from_disk(tmp_path, dtype):
    model, tokens = tiny(dtype=getattr(torch, dtype)), prompts()
    attached = filled(model, layers=[1])
    logits = attached(tokens, route=ROUTE).logits
    attached.save(tmp_path, router="abc", dtype=dtype)
    attached.detach()
    again = attach_saved(model, tmp_path, router="abc")
    assert isinstance(again.bank, MemoryBank)
    assert (again.layers, again.bank.options) == ((1,), OPTIONS)
    assert torch.equal(again.eval()(tokens, route=ROUTE).logits, logits)
    again.detach()
    served = attach_stored(model, tmp_path, router="abc", read="pread")
    assert torch.equal(served(tokens, route=ROUTE).logits, logits)
    assert served.bank.reads.misses == 4
    with pytest.raises(ValueError, match="copy its folder"):
        served.save(tmp_path / "other")
    served.bank.close()


def test_a_bank_goes_with_its_model_and_router_only(tmp_path):
    model = tiny()
    attached = attach_bank(model, OPTIONS)
    attached.save(tmp_path, router="abc")
    assert attached.save(tmp_path, router="abc").base_model == model_hash(attached.detach())
    for attach in (attach_saved, attach_stored):
        with pytest.raises(StorageError, match="use the weights of that base model"):
            attach(tiny(seed=1), tmp_path)
        with pytest.raises(StorageError, match="route with that router"):
            attach(model, tmp_path, router="abd")
    assert not any(module._forward_hooks for module in model.modules())


def test_what_has_no_gated_feed_forward_is_refused():
    experts = transformers.Qwen2MoeConfig(**SIZES, num_experts=2, mlp_only_layers=[0])
    mixture = transformers.Qwen2MoeForCausalLM(experts)
    with pytest.raises(ValueError, match=r"layer 1 is a mixture of experts.*widened: \[1\]"):
        attach_bank(mixture, OPTIONS)
    assert attach_bank(mixture, OPTIONS, layers=[0]).layers == (0,)
    plain = transformers.GPTNeoXConfig(**SIZES)
    with pytest.raises(ValueError, match="layer 0 has none"):
        attach_bank(transformers.GPTNeoXForCausalLM(plain), OPTIONS)
    with pytest.raises(ValueError, match="Linear is no language model"):
        attach_bank(nn.Linear(2, 2), OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": BankOptions(kind="kv")}, "has the kind \"ffn\", not 'kv'"),
        ({"layers": [0, 2]}, r"from 0 to 1, each once; got \[0, 2\]"),
        ({"layers": [1, 1]}, r"each once; got \[1, 1\]"),
        ({"layers": []}, r"each once; got \[\]"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        attach_bank(tiny(), **{"options": OPTIONS, **changes})


def test_routes_that_make_no_sense():
    attached, tokens = attach_bank(tiny(), OPTIONS).eval(), prompts()
    with pytest.raises(ValueError, match="3 prompts and 1 routes"):
        continued(attached, tokens, route=ROUTE[:1])
    with pytest.raises(ValueError, match="routes must be from 0 to 8"):
        attached(tokens, route=torch.tensor([0, 1, 9]))
    with attached.routed(ROUTE[:1]), pytest.raises(ValueError, match="call generate of the attach"):
        continued(attached.base_model, tokens[:1], num_beams=2, max_new_tokens=1)


PLACES = ("harbour", "forest", "market", "desert")


@pytest.fixture
def files(tmp_path):
    """A model with a tokenizer, texts and their router, as the program reads them."""
    texts = [
        f"in the {place} the sign says {place} {word}"
        for word in ("north", "south", "east", "west")
        for place in PLACES
    ]
    words = ["[UNK]", *sorted({word for text in texts for word in text.split()})]
    vocabulary = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "m")
    tiny().save_pretrained(tmp_path / "m")
    (tmp_path / "texts").write_text("\n".join(texts), encoding="utf-8")
    Router.fit(texts, embedder=HashedTfidf(), branching=2, depth=2).save(tmp_path / "router")
    return tmp_path


def program(files, *options):
    named = {"model": "m", "texts": "texts", "router": "router", "out": "bank"}
    arguments = [part for name, file in named.items() for part in (f"--{name}", str(files / file))]
    return attach_bank_program.run([*arguments, *options])


def test_the_program_trains_saves_and_compares(files, capsys):
    losses = program(files, "--steps", "30", "--lr", "0.01", "--hidden", "4,2", "--batch", "4")
    assert losses.fetched < losses.generic < losses.base_model
    printed = capsys.readouterr().out
    assert "step     30 of 30: loss" in printed
    assert f"2 held-out texts, nats per token:\n  fetched  {losses.fetched:.4f}" in printed
    model = transformers.AutoModelForCausalLM.from_pretrained(files / "m")
    attached = attach_stored(model, files / "bank", router=Router.load(files / "router").hash)
    assert attached.bank.shape.hidden == (4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "4"], "--hidden names 1 levels, and the router's tree has 2"),
        (["--router", "nowhere"], "nowhere"),
        (["--texts", "/dev/null"], "has no texts"),
    ],
)
def test_the_program_says_what_is_wrong_before_it_trains(files, options, message):
    with pytest.raises(RunError, match=message):
        program(files, *options)
    assert not (files / "bank").exists()


def test_the_program_says_what_a_number_must_be(files, capsys):
    with pytest.raises(SystemExit):
        program(files, "--batch", "0")
    assert "--batch: expected a whole number, 1 or more, got '0'" in capsys.readouterr().err
    assert not (files / "bank").exists()
