"""Configs of older runs are read in the words of today."""

import pytest

from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.config.renames import renamed
from mneme.harness.config.schema import check_config

OLD = {  # what a config of a Titans memory said
    "_target_": "layers.TestTimeMemory",
    "memory": {"_target_": "ops.test_time.MLP", "depth": 2},
    "retention": {"_target_": "layers.Forgetting", "gate": "head"},
    "learner": {"_target_": "layers.Learner", "max_step": 0.1, "step_per_map": False},
}


def test_an_old_config_is_one_of_today():
    config = compose_checked(["mixer=titans_lmm"]).config
    assert renamed(config) == config
    old = {**config, "start_from": config["init_from"], "mixer": OLD}
    del old["init_from"], old["callbacks"]
    old["model"] = {**old["model"], "layers": [{"parts": [OLD]}]}
    new = renamed(old)
    assert new["init_from"] is None
    assert new["callbacks"] == config["callbacks"], "of before there were options for it"
    mixer = {
        "_target_": "layers.TestTimeMemory",
        "memory": OLD["memory"],
        "forget_gate": {"_target_": "layers.ForgetGate", "gate": "head"},
        "learner": {
            "_target_": "layers.Learner",
            "max_inner_lr": 0.1,
            "inner_lr_per_weight": False,
        },
    }
    assert new["mixer"] == mixer
    assert new["model"]["layers"] == [{"parts": [mixer]}]
    check_config({**config, "mixer": new["mixer"]})
    with pytest.raises(ConfigError, match="retention"):
        check_config({**config, "mixer": OLD})


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ({"usage": False, "save_bank_every": None}, []),
        ({"usage": True, "save_bank_every": 7}, ["callbacks=usage", "callbacks.save_bank.every=7"]),
        ({"usage": False}, []),
    ],
)
def test_what_was_an_option_is_a_callback(options, overrides):
    new = compose_checked(overrides).config
    old = {key: value for key, value in new.items() if key != "callbacks"} | options
    assert renamed(old) == new
