"""Configs as dotted paths with values, and the paths in which several of them differ."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mneme.harness.config.build import TARGET
from mneme.harness.config.check import Config

Entries = Mapping[str, Any]

_SEED = "seed"
# Where a run writes and what it shows; none of it changes a result.
_WITHOUT_EFFECT = (
    "run_dir",
    "logger",
    "checkpoint_every",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
)
_ABSENT = "(absent)"
_LABEL = "label"  # names a row; a run without one is as those before there were labels


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings, and lists that hold some, as one level of dotted paths."""
    if isinstance(node, list) and any(isinstance(inner, list | dict) for inner in node):
        node = {str(i): inner for i, inner in enumerate(node)}
    if not isinstance(node, Mapping) or not node:
        return {path: node}
    inner = [flat(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()]
    return {key: value for part in inner for key, value in part.items()}


def compared(config: Config) -> dict[str, Any]:
    """The entries that make two runs different experiments, rather than two seeds of one."""
    entries, _ = _without_seeds(flat({**config, "model": _referring(config)}))
    unlabelled = [_LABEL] if entries.get(_LABEL) is None else []
    left_out = [*_WITHOUT_EFFECT, *unlabelled]
    return {path: v for path, v in entries.items() if not covered(path, left_out)}


def seeds(config: Config) -> dict[str, Any]:
    """The entries called seed: the run's own, and those of its task."""
    return _without_seeds(flat(config))[1]


def named(entries: Entries, choices: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The same, with a node that names a class as an entry of its own.

    Args:
        entries: dotted paths to values.
        choices: group to the file chosen in it, by whose name its class then goes; other classes
            go by their own names.
    """
    result = {
        path.removesuffix(f".{TARGET}"): value.split(".")[-1] if path.endswith(TARGET) else value
        for path, value in entries.items()
    }
    places = {choice.split("@")[-1]: name for choice, name in (choices or {}).items()}
    return {path: places.get(path, value) for path, value in result.items()}


def differing(several: Sequence[Entries]) -> list[str]:
    """The paths in which entries differ, without those that the nodes above them account for.

    If `mixer` differs, then `mixer.heads` is named only if two with the same mixer differ in it.
    """
    varied = [path for path in paths(several) if len({value(e, path) for e in several}) > 1]

    def accounted_for(path: str) -> bool:
        above = [other for other in varied if path.startswith(f"{other}.")]
        cases = {tuple(value(entries, other) for other in above) for entries in several}
        pairs = {tuple(value(entries, other) for other in (*above, path)) for entries in several}
        return len(pairs) == len(cases)

    return [path for path in varied if not accounted_for(path)]


def paths(several: Iterable[Entries]) -> list[str]:
    """The paths of all entries, each once, in order."""
    return list(dict.fromkeys(path for entries in several for path in entries))


def value(entries: Entries, path: str) -> str:
    """The value at a path, or a mark where there is none, as JSON text to compare by."""
    return json.dumps(entries.get(path, _ABSENT))


def covered(path: str, known: Iterable[str]) -> bool:
    """Whether a path is one of those known, or lies below one."""
    return any(path == other or path.startswith(f"{other}.") for other in known)


def _without_seeds(entries: Entries) -> tuple[dict[str, Any], dict[str, Any]]:
    found = {path: v for path, v in entries.items() if path.split(".")[-1] == _SEED}
    return {path: v for path, v in entries.items() if path not in found}, found


def _referring(config: Config) -> Any:
    """The model, its pattern saying `${mixer}` and `${ffn}` again, as its file does.

    A resolved config repeats the mixer in every block; rows would differ in each of them.
    """
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("pattern"), list):
        return model
    groups = {group: config.get(group) for group in ("mixer", "ffn")}
    empty = next((f"${{{group}}}" for group, node in groups.items() if node is None), None)
    blocks = [
        [empty if part is None else _reference(part, groups) for part in block]
        if isinstance(block, list)
        else block
        for block in model["pattern"]
    ]
    return {**model, "pattern": blocks}


def _reference(node: Any, groups: Mapping[str, Any]) -> Any:
    for group, target in groups.items():
        if target is not None and node == target:
            return f"${{{group}}}"
    if isinstance(node, dict):
        return {key: _reference(inner, groups) for key, inner in node.items()}
    return [_reference(inner, groups) for inner in node] if isinstance(node, list) else node
