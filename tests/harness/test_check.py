"""A config error says what, where and what instead, and all of it at once."""

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from mneme.harness.config.build import build
from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import (
    CONFIG_DIR,
    check_sweep,
    checked,
    compose_checked,
    compose_group,
    parse_overrides,
)
from mneme.layers.sparse.table import SharedTable, Table
from mneme.layers.sparse.ultra_mem import ONE_QUERY, QUERY_PER_RANK


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose_checked(list(overrides))
    return caught.value.problems


def test_all_mistakes_are_reported_in_one_message():
    found = problems_of(
        "mixer=gated_deltanet", "mixer.haeds=3", "model.n_layers=two", "optimizer.lr=fast"
    )
    assert found[0].startswith(
        "mixer.haeds: GatedDeltaNet has no option 'haeds'; did you mean 'heads'? (options: "
    )
    assert found[1:] == [
        "model.n_layers: expected int, got 'two' (str)",
        "optimizer.lr: expected float, got 'fast' (str)",
    ]


def test_an_unknown_choice_lists_all_and_names_the_nearest():
    (found,) = problems_of("mixer=gated_deltanett")
    mixers = sorted(path.stem for path in (CONFIG_DIR / "mixer").glob("*.yaml"))
    assert found == (
        "mixer=gated_deltanett: there is no such mixer; did you mean 'gated_deltanet'? "
        f"(choose from: {', '.join(mixers)})"
    )


def test_an_unknown_choice_does_not_hide_other_mistakes():
    found = problems_of("mixer=gated_deltanett", "seeed=3", "trainer.precison=1")
    assert len(found) == 3
    assert any("seeed: there is no such option; did you mean 'seed'?" in p for p in found)
    assert any("Trainer has no option 'precison'; did you mean 'precision'?" in p for p in found)


def test_a_mistake_in_a_shared_node_is_reported_once():
    # model.pattern refers to ${mixer} in every block
    assert len(problems_of("mixer.haeds=3")) == 1


def test_mistakes_inside_lists_are_found():
    (found,) = problems_of("model=recall", "model.pattern.0.0.conv_sise=3")
    assert "GatedConvolution has no option 'conv_sise'; did you mean 'conv_size'?" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixer.window=wide", "expected int | None, got 'wide' (str)"),
        ("task.pairs=eight", "got 'eight' (str)"),
        ("seed=1.5", "seed: expected int, got 1.5 (float)"),
        ("optimizer.betas=[0.9]", "expected tuple"),
        ("model.vocab_size=3", "the program sets this option of LanguageModel; leave it out"),
        ("trainer.logger=false", "the program sets this option of Trainer; leave it out"),
        ("mixer=7", "there is no such mixer"),
        ("mixer=samba", "there is no such mixer; there is model=samba"),
        ("logger=none", "there is no such logger; that is logger=csv"),
        ("lr=1e-3", "lr: there is no such option; there is optimizer.lr"),
        ("nonsense", "not of the form key=value"),
        (
            "task._target_=mneme.tasks.Mqar",
            "mneme.tasks.Mqar is not a class; did you mean 'mneme.tasks.MQAR'?",
        ),
        ("model=null", "model=None: there is no such model"),
        ("task.seed=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("trainer.precision=???", "needs a value"),
        ("trainer.max_steps=-1", "trainer.max_steps: expected a whole number, 1 or more, got -1"),
        ("trainer.val_check_interval=0.5", "expected a whole number, 1 or more, got 0.5"),
        ("trainer.accumulate_grad_batches=3", "must be a multiple of accumulate_grad_batches (3)"),
        ("trainer.check_val_every_n_epoch=1", "data have no end"),
        ("trainer.max_epochs=3", "data have no end, so there are no epochs"),
        ("trainer.limit_val_batches=0", "the best checkpoint needs a validation"),
        ("trainer.gradient_clip_algorithm=value", "gradients are clipped by norm"),
        ("trainer.precision=16-mixed", "use bf16-mixed or 32-true"),
        (
            "mixer._target_=mneme.layers.Output",
            "mixer._target_: expected a Layer, got mneme.layers.Output",
        ),
        ("model._target_=mneme.layers.MLP", "expected a LanguageModel, got mneme.layers.MLP"),
        ("~model._target_", "model: expected a group with a _target_"),
        ("mixer=attention,sliding_window", "several values are for a sweep; add -m"),
        ("optimizer._target_=lightning.pytorch.cli.LightningCLI", "may not be built"),
        ("trainer.callbacks=[]", "the program sets this option of Trainer"),
    ],
)
def test_messages(override, message):
    assert any(message in p for p in problems_of("mixer=sliding_window", override))


@pytest.mark.parametrize("place", range(4))
def test_every_element_of_a_list_is_checked(place):
    pairs = ["4", "8", "16", "2"]
    pairs[place] = "x"
    for _ in range(5):
        (found,) = problems_of(f"task.test_pairs=[{','.join(pairs)}]")
        assert "task.test_pairs: expected" in found


def test_an_inner_node_of_another_kind_is_named():
    (found,) = problems_of("task=text", "task.tokenizer={_target_: mneme.layers.MLP}")
    assert found == "task.tokenizer._target_: expected a Tokenizer, got mneme.layers.MLP"


def test_options_without_a_target_are_told_which_to_give():
    bare = ["ffn=pkm", "~ffn.table._target_", "~ffn.table.update", "~ffn.table.lr_multiplier"]
    (found,) = problems_of(*bare, "ffn.table.update=rowwise")
    assert found == (
        "ffn.table: expected TableOptions, got {'update': 'rowwise'} (dict); "
        "give it a _target_, such as ffn.table._target_=mneme.layers.TableOptions"
    )
    compose_checked(
        [*bare, "ffn.table.update=rowwise", "ffn.table._target_=mneme.layers.TableOptions"]
    )
    (found,) = problems_of("ffn=pkm", "ffn.heads={a: 1}")
    assert found.endswith("(dict)")


@pytest.mark.parametrize(
    ("ffn", "where"),
    [
        ("pkm", ""),
        ("peer", ""),
        ("dkvb", ""),
        ("ultramem", ""),
        ("memory_plus", ""),
        ("pkm_parallel", "layers.1."),
        ("ultramem_v2", "layers.1."),
    ],
)
def test_the_options_of_a_table_can_be_given(ffn, where):
    built = build(compose_group("ffn", [f"ffn={ffn}", f"ffn.{where}table.update=rowwise"]))(16)
    updates = {m.options.update for m in built.modules() if isinstance(m, Table)}
    shared = {m.args["options"].update for m in built.modules() if isinstance(m, SharedTable)}
    assert updates | shared == {"rowwise"}


@pytest.mark.parametrize(
    ("ffn", "where", "default"),
    [("ultramem", "", ONE_QUERY), ("ultramem_v2", "layers.1.", QUERY_PER_RANK)],
)
def test_scoring_is_the_layers_own_but_for_what_is_given(ffn, where, default):
    for given, expected in (
        ([], default),
        ([f"ffn.{where}scoring.rank=3"], replace(default, rank=3)),
    ):
        node = compose_group("ffn", [f"ffn={ffn}", *given])
        scoring = (node["layers"][1] if where else node)["scoring"]
        assert build(scoring) == expected
        build(node)(16)


@pytest.mark.parametrize("override", ["mixer=glob(*)", "optimizer.lr=interval(0,1)"])
def test_a_sweep_lists_its_values(override):
    with pytest.raises(ConfigError, match="list the values of a sweep"):
        check_sweep(["-m", override])


def test_every_job_of_a_sweep_is_checked():
    with pytest.raises(ConfigError, match="no option 'windw'"):
        check_sweep(["-m", "mixer=attention,gated_deltanet", "seed=0,1", "mixer.windw=4"])
    with pytest.raises(ConfigError, match="a sweep names its runs itself"):
        check_sweep(["-m", "seed=0,1", "run_dir=x"])


def test_a_required_option_that_is_missing_is_named():
    (found,) = problems_of("~model.n_layers")
    assert found == "model.n_layers: LanguageModel needs this option, a value of type int"


def test_an_int_is_a_float_and_a_list_is_a_tuple():
    composed = compose_checked(["optimizer.lr=1", "optimizer.betas=[0,0.5]"])
    assert composed.config["optimizer"]["lr"] == 1


def test_choices_are_recorded():
    choices = compose_checked(["mixer=attention", "task=text"]).choices
    assert (choices["mixer"], choices["task"]) == ("attention", "text")


def test_values_are_parsed_as_hydra_parses_them():
    values = parse_overrides(["a.b=[1,2]", "c='x y'", "d=1e-3", "e=null", "f={g: h}"])
    assert values == {"a.b": [1, 2], "c": "x y", "d": 1e-3, "e": None, "f": {"g": "h"}}


def test_a_config_from_a_file_is_checked_alike():
    with pytest.raises(ConfigError, match="task: this group is missing"):
        checked(OmegaConf.create({"model": {"_target_": "mneme.models.LanguageModel"}}), {})
