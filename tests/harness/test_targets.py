"""Configs and checkpoints can name the project's, torch's and Lightning's classes alone."""

import pytest

from mneme.harness.config.build import TargetError, build, resolve_target
from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.layers import GatedDeltaNet


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "mneme.harness.run.run_directory.RunDirectory",
        "layersx.Evil",
        7,
        None,
    ],
)
def test_names_outside_the_list_are_refused(name):
    with pytest.raises(TargetError, match="may not be built from a config"):
        resolve_target(name)


@pytest.mark.parametrize(
    "name",
    [
        "mneme.harness.loggers.os.system",
        "mneme.models.budget",
        "mneme.layers.register",
        "mneme.tasks.base.itertools",
    ],
)
def test_what_is_not_a_class_is_refused(name):
    with pytest.raises(TargetError):
        resolve_target(name)


@pytest.mark.parametrize(
    "name",
    [
        "mneme.tasks.text.corpus.Path",
        "lightning.pytorch.trainer.trainer.Path",
        "mneme.models.generation.Tensor",
    ],
)
def test_a_class_reached_through_a_modules_imports_is_refused(name):
    with pytest.raises(TargetError, match=r"which is not allowed|is not a class"):
        resolve_target(name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.GatedDeltaNet", "mneme.layers.GatedDeltaNet"),
        ("ops.test_time.MLP", "mneme.ops.test_time.MLP"),
        ("tasks.text.corpus.LocalFiles", "mneme.tasks.LocalFiles"),
    ],
)
def test_runs_of_before_the_name_are_understood(old, new):
    assert resolve_target(old) is resolve_target(new)
    with pytest.raises(TargetError, match="may not be built"):
        resolve_target("routers.Router")


def test_the_nearest_class_is_named():
    with pytest.raises(TargetError, match=r"did you mean 'mneme\.layers\.GatedDeltaNet'"):
        resolve_target("mneme.layers.GatedDeltanet")


def test_a_refused_target_is_a_config_error():
    with pytest.raises(ConfigError, match=r"'os\.system' may not be built"):
        compose_checked(["mixer._target_=os.system"])


def test_building_refuses_what_was_never_checked():
    with pytest.raises(TargetError):
        build({"_target_": "subprocess.Popen", "args": ["true"]})


def test_a_layer_is_built_as_a_recipe():
    recipe = build({"_target_": "mneme.layers.GatedDeltaNet", "heads": 2})
    layer = recipe(8)
    assert isinstance(layer, GatedDeltaNet)
    assert layer.heads == 2
