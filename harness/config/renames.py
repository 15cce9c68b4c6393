"""What configs of older runs say, in the words of today; docs/renames.md lists them."""

from typing import Any

from mneme.harness.config.check import TARGET, Config

OPTIONS = {"start_from": "init_from"}  # of the run
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
    return {OPTIONS.get(key, key): _node(value) for key, value in config.items()}


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
