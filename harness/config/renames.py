"""What configs of older runs say, in the words of today; docs/renames.md lists them."""

from typing import Any

from mneme.harness.config.build import TARGET
from mneme.harness.config.check import Config

OPTIONS = {"start_from": "init_from"}  # of the run
MOVED = {  # options of the run that command lines may still name, and what they are now
    **OPTIONS,
    "usage": "callbacks=usage",
    "save_bank_every": "callbacks.save_bank.every",
}
CLASSES = {"Forgetting": "ForgetGate"}
IN_CLASSES = {  # by the class's last name, options that were called otherwise
    "TestTimeMemory": {"retention": "forget_gate"},
    "Learner": {
        "max_step": "max_inner_lr",
        "step_bias": "inner_lr_bias",
        "step_per_map": "inner_lr_per_weight",
        "outer_step": "outer_lr",
        "anchor": "gradient_reference",
    },
}


def renamed(config: Config) -> Config:
    """A config as it would be written today; one of today is returned as it is."""
    config = {OPTIONS.get(key, key): _node(value) for key, value in config.items()}
    return config if "callbacks" in config else _with_callbacks(config)


def _with_callbacks(config: Config) -> Config:
    """The group `callbacks` in the place of the options that were there before it."""
    others = {key: value for key, value in config.items() if key not in MOVED}
    every = config.get("save_bank_every")
    chosen = {"save_bank": {TARGET: "mneme.harness.run.bank_files.SaveBank", "every": every}}
    if config.get("usage"):
        chosen["usage"] = {TARGET: "mneme.harness.run.callbacks.LogUsage"}
    return {"callbacks": chosen, **others}


def _node(value: Any) -> Any:
    if isinstance(value, list):
        return [_node(item) for item in value]
    if not isinstance(value, dict):
        return value
    target = value.get(TARGET)
    names: dict[str, str] = {}
    if isinstance(target, str):
        package, _, name = target.rpartition(".")
        name = CLASSES.get(name, name)
        names = IN_CLASSES.get(name, {})
        value = {**value, TARGET: f"{package}.{name}" if package else name}
    return {names.get(key, key): _node(inner) for key, inner in value.items()}
