"""Malformed input of every kind ends in one message and a status, and is not taken for sound.

Cases are drawn: what is wrong, where, and in which way. MNEME_CASES draws more of them.
"""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train
from mneme.harness.cli import report_errors
from mneme.harness.config.build import TARGET
from mneme.harness.config.check import Config
from mneme.harness.config.compose import Composed, compose_checked
from mneme.harness.config.schema import check_config
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.run.jobs import resume_run, start_run
from mneme.harness.run.run_directory import RunDirectory
from mneme.harness.run.training import prepare
from scripts import (
    attach_bank,
    bank,
    bench,
    class_incremental,
    collapse,
    delete_blocks,
    figure,
    report,
    reproduce,
    route,
    serve_bank,
    store_tables,
)
from tests.harness.conftest import TINY
from tests.harness.test_banks import BANK, RARE

CASES = int(os.environ.get("MNEME_CASES", "100"))
SECONDS = 120  # until a case counts as hanging, on a busy machine

BASES = {
    "recall": TINY,
    "titans": (*TINY, "mixer=titans_lmm", "ffn=pkm", "ffn.sub_keys=4", "ffn.top_k=3"),
    "experts": (*TINY, "mixer=retention", "ffn=moe", "model=lm", "model.d_model=16"),
    "needle": (*TINY[:3], "task=needle", "model.d_model=16", "trainer.accelerator=cpu"),
    "bank": (*RARE, *BANK),
}
BANANA = "banana"
NAN, INF = float("nan"), float("inf")


class Hang(BaseException):
    """A case took too long."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(program: Callable[[], Any]) -> tuple[int, str]:
    """The exit status of a program, and what it said to stderr; anything else fails the test."""
    said, status = io.StringIO(), 0
    with limited(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            with report_errors():
                status = program() if program is None else (program(), 0)[1]
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    text = said.getvalue()
    assert "fault of the program" not in text, text
    assert "Traceback" not in text, text
    return status, text


def refused(program: Callable[[], Any], *words: str) -> None:
    """Asserts that a program ends with a mistake of the user, and a message of some lines."""
    status, text = outcome(program)
    assert status == 2, f"accepted, or ended with {status}: {text}"
    assert text.strip()
    assert len(text.splitlines()) < 40, text
    for word in words:
        assert word in text


# Options


@pytest.fixture(scope="module")
def composed(tmp_path_factory) -> dict[str, Composed]:
    return {name: compose_checked(list(overrides)) for name, overrides in BASES.items()}


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Path to value of all that is neither a group of options nor a list of them."""
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]
    if isinstance(node, list) and any(isinstance(inner, dict | list) for inner in node):
        return [leaf for i, value in enumerate(node) for leaf in leaves(value, (*path, i))]
    return [(path, node)]


def wrong_values(key: Any, value: Any) -> list[Any]:
    """What can never stand in the place of a value, whatever its option is for."""
    if key == TARGET:
        bases = [
            "mneme.layers.Layer",
            "mneme.tasks.base.Task",
            "mneme.models.Schedule",
            "layers",
            "layers.",
            "",
        ]
        return [*bases, "os.system", "builtins.eval", "mneme.layers.Nothing", 7, None, True, BANANA]
    if isinstance(value, bool):
        return [BANANA, 3, NAN, {"a": True}]
    if isinstance(value, int):
        return [BANANA, True, NAN, -INF, {"a": 1}, 1.5, -(10**18)]
    if isinstance(value, float):
        return [BANANA, True, NAN, INF, -INF, {"a": 1.0}]
    if isinstance(value, str):
        return [3, True, NAN, {"a": BANANA}]
    if isinstance(value, list):
        return [{"a": 1}, NAN, [{"a": NAN}], [BANANA, NAN]]
    return [{"a": NAN}, NAN]


def at(config: Config, path: tuple[Any, ...]) -> Any:
    for key in path:
        config = config[key]
    return config


def mistaken(config: Config, draw: random.Random) -> tuple[Config, str]:
    """A config with one mistake, and where that is."""
    config = copy.deepcopy(config)
    places = [place for place in leaves(config) if place[0][0] not in ("mixer", "ffn", "run_dir")]
    path, value = draw.choice(places)
    *above, key = path
    node = at(config, tuple(above))
    kind = draw.random()
    if kind < 0.1 and isinstance(node, dict) and TARGET in node:
        node["bananas"] = 3
        key = "bananas"
    elif kind < 0.15 and isinstance(node, dict) and TARGET in node:
        del node[TARGET]
    else:
        node[key] = draw.choice(wrong_values(key, value))
    return config, f"{'.'.join(map(str, path))}: {node!r}"[:300]


@pytest.mark.parametrize("index", range(CASES // 2))
def test_a_wrong_option_is_refused(composed, index):
    draw = random.Random(f"option {index}")
    base = draw.choice(list(BASES))
    config, where = mistaken(composed[base].config, draw)

    def program() -> None:
        check_config(config)
        prepare(config)

    try:
        refused(program)
    except AssertionError as error:
        raise AssertionError(f"{base}: {where}: {error}") from error


SIZES = ["model.d_model", "model.n_layers", "task.vocab_size", "task.seq_len", "task.batch_size"]


@pytest.mark.parametrize("size", [-16, 0, 10**9, 10**18])
@pytest.mark.parametrize("option", SIZES)
def test_an_absurd_size_is_refused_before_anything_is_allocated(composed, option, size):
    config = copy.deepcopy(composed["recall"].config)
    group, key = option.split(".")
    config[group][key] = size
    if (option, size) == ("task.vocab_size", 10**9):
        config["model"]["d_model"] = 1024
    refused(lambda: (check_config(config), prepare(config)))


@pytest.mark.parametrize(
    "where",
    ["", " ", "/dev/null", "/dev/null/run", "/proc/run", "{file}", "{file}/run", "x" * 300, "a\0b"],
)
def test_a_run_directory_that_cannot_be_made_is_refused(composed, tmp_path, where):
    (tmp_path / "file").touch()
    found = composed["recall"]
    config = {**found.config, "run_dir": where.format(file=tmp_path / "file")}
    refused(lambda: (check_config(config), start_run(replace(found, config=config))), "run_dir")


@pytest.mark.parametrize(
    "words",
    [
        ["resume="], ["resume=/nowhere"], ["resume=/dev/null"], ["resume=.", "seed=3"],
        ["--banana"], ["-m", "seed=x,y"], ["-m", "run_dir=x", "seed=1,2"], ["=3"], ["seed==3"],
        ["task=[1"], ["experiment=banana"], ["+seed=1"], ["~task"], ["mixer@x=attention"],
        ["experiment=rare_facts", "trainer.accumulate_grad_batches=2"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_command_of_train_with_a_mistake_is_refused(words):
    refused(lambda: train.main(words))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (serve_bank.run, ["/nowhere"]),
        (serve_bank.run, ["{run}", "--temperature=nan"]),
        (serve_bank.run, ["{run}", "--cache-mib=inf"]),
        (serve_bank.run, ["{run}", "--tokens=0"]),
        (serve_bank.run, ["{run}", "--route=banana"]),
        (serve_bank.run, ["{run}", "--route=10000000000000000000000", "the"]),
        (bank.run, ["verify", "/nowhere"]),
        (bank.run, ["compact", "{run}"]),
        (bank.run, ["banana", "{run}"]),
        (delete_blocks.run, ["{run}", "--leaves=-1"]),
        (delete_blocks.run, ["/dev/null"]),
        (store_tables.run, ["{run}"]),
        (store_tables.run, ["{run}", "--cache-mb=-1"]),
        (store_tables.run, ["{run}", "--verify"]),
        (report.report, ["/nowhere"]),
        (report.report, ["{run}", "--sort=banana"]),
        (report.report, ["{run}", "--out=/dev/null/x"]),
        (figure.figure, ["{run}", "--lines=x", "--out=/dev/null/x"]),
        (reproduce.main, ["banana"]),
        (reproduce.main, ["facts", "--jobs=0"]),
        (route.run, ["fit", "--texts=/nowhere", "--out=x"]),
        (route.run, ["fit", "--texts=/dev/null", "--out=x", "--depth=0"]),
        (route.run, ["ask", "--router=/dev/null"]),
        (attach_bank.run, ["--model=x", "--texts=x", "--router=/nowhere", "--out=x"]),
        (attach_bank.run, ["--model=x", "--texts=x", "--router=x", "--out=x", "--steps=0"]),
        (collapse.run, ["--seeds", "-1"]),
        (class_incremental.run, ["--seeds", "x"]),
        (lambda words: exit(bench.main(words)), ["banana"]),
        (lambda words: exit(bench.main(words)), ["harness", "--banana"]),
        (evaluate_command, ["run=/nowhere"]),
        (evaluate_command, ["run={run}", "task.seq_len.x=3"]),
        (evaluate_command, ["run={run}", "task.seq_len=nan"]),
        (evaluate_command, ["run={run}", "task={{a: b}}"]),
        (evaluate_command, ["run={run}", "telemetry=-1"]),
        (evaluate_command, ["run={run}", "telemetry=10"]),
        (evaluate_command, ["run={run}", "usage=true"]),
        (evaluate_command, ["run={run}", "lengths=[true]"]),
        (evaluate_command, ["run={run}", "split=[val]"]),
    ],
)
def test_a_command_of_another_program_with_a_mistake_is_refused(banked, program, words):
    given = [word.format(run=banked.path) for word in words]
    status, text = outcome(lambda: program(given))
    if status != 1 or "/dev/null" not in " ".join(words):  # where the system says no, it is 1
        assert status == 2, text


@pytest.mark.parametrize("length", [10**9, 10**18])
def test_an_absurd_length_of_an_evaluation_is_refused(recall, length):
    refused(lambda: evaluate_command([f"run={recall.path}", f"lengths=[{length}]"]), "task")


# Files


@pytest.fixture(scope="module")
def recall(composed, tmp_path_factory) -> RunDirectory:
    return finished(composed["titans"], tmp_path_factory.mktemp("malformed") / "recall")


@pytest.fixture(scope="module")
def banked(composed, tmp_path_factory) -> RunDirectory:
    return finished(composed["bank"], tmp_path_factory.mktemp("malformed") / "bank")


def finished(found: Composed, path: Path) -> RunDirectory:
    run, _ = start_run(replace(found, config={**found.config, "run_dir": str(path)}))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate_command([f"run={path}", "split=val", "lengths=null"])
    return run


def resume(path: Path) -> None:
    """As of a run that was stopped."""
    run = RunDirectory(path)
    with contextlib.suppress(Exception):
        run.write_summary(status="interrupted")
    resume_run(str(path))


PROGRAMS: dict[str, Callable[[Path], Any]] = {
    "resume": resume,
    "eval": lambda path: evaluate_command([f"run={path}", "lengths=[1]", "split=val"]),
    "eval last": lambda path: evaluate_command([f"run={path}", "lengths=[1]", "checkpoint=last"]),
    "report": lambda path: report.report([str(path)]),
    "report evaluations": lambda path: report.report(
        [str(path), "--columns=eval:accuracy@1x", "--split=val"]
    ),
    "serve": lambda path: serve_bank.run([str(path), "the", "--read=pread"]),
    "delete": lambda path: delete_blocks.run([str(path), "--leaves=1"]),
}
# Which run, which file, which program reads it, and whether it can do without.
FILES = [
    ("recall", "config.yaml", "resume", False),
    ("recall", "config.yaml", "report", True),
    ("recall", "summary.json", "report", True),
    ("recall", "metrics.csv", "report", True),
    ("recall", "metrics.csv", "resume", True),
    ("recall", "evaluations.jsonl", "report evaluations", True),
    ("recall", "checkpoints/last.ckpt", "resume", False),
    ("recall", "checkpoints/last.ckpt", "eval last", False),
    ("recall", "checkpoints/best.ckpt", "eval", False),
    ("bank", "checkpoints/last.ckpt", "delete", False),
    ("bank", "checkpoints/last.ckpt", "serve", False),
    ("bank", "words.txt", "serve", False),
    ("bank", "router/router.json", "serve", False),
    ("bank", "router/arrays-*.npz", "serve", False),
    ("bank", "bank/manifest.json", "serve", False),
    ("bank", "bank/level0-*.bank", "serve", False),
    ("bank", "bank/level1-*.bank", "serve", True),  # a block that is not read
]


def damage(file: Path, draw: random.Random) -> tuple[str, bool]:
    """Damages a file in a way that is drawn; how, and whether nothing of it can be used."""
    content = file.read_bytes()
    ways = ["cut", "bytes", "garbage", "empty", "folder", "loop", "null"]
    ways += ["entry"] * 3 if file.suffix in (".json", ".yaml", ".ckpt", ".jsonl") else []
    way = draw.choice(ways)
    if way == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif way == "bytes":
        changed = bytearray(content)
        for _ in range(8):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        file.write_bytes(changed)
    elif way == "garbage":
        file.write_bytes(draw.randbytes(500))
    elif way == "empty":
        file.write_bytes(b"")
    elif way == "null":
        file.write_bytes(b"null\n")
    elif way == "entry":
        _damage_entry(file, content, draw)
    else:
        file.unlink()
        file.mkdir() if way == "folder" else file.symlink_to(file)
    return way, way in ("garbage", "folder", "loop", "null", "empty")


def _damage_entry(file: Path, content: bytes, draw: random.Random) -> None:
    """Takes an entry out of what a file holds, or puts nonsense in its place."""
    if file.suffix == ".ckpt":
        held = torch.load(io.BytesIO(content), weights_only=True)
    elif file.suffix == ".yaml":
        held = yaml.safe_load(content)
    else:
        held = json.loads(content.splitlines()[0] if file.suffix == ".jsonl" else content)
    node = held
    while True:
        key = draw.choice(list(node))
        if not isinstance(node[key], dict) or not node[key] or draw.random() < 0.4:
            break
        node = node[key]
    if draw.random() < 0.5:
        del node[key]
    else:
        node[key] = draw.choice([None, 7, -3, "banana", [], {}, {"a": {}}, True])
    if file.suffix == ".ckpt":
        torch.save(held, file)
    else:
        file.write_text(yaml.safe_dump(held) if file.suffix == ".yaml" else json.dumps(held))


@pytest.mark.parametrize("index", range(CASES - CASES // 2))
def test_a_damaged_file_is_named_or_done_without(recall, banked, tmp_path, index):
    draw = random.Random(f"file {index}")
    which, name, program, can_do_without = FILES[index % len(FILES)]
    path = tmp_path / "run"
    shutil.copytree({"recall": recall, "bank": banked}[which].path, path)
    (file,) = path.glob(name)
    way, useless = damage(file, draw)
    try:
        status, text = outcome(lambda: PROGRAMS[program](path))
        assert status in (0, 1, 2), text
        assert status == 0 or text.strip()
        assert status != 0 or can_do_without or not useless, "accepted"
    except AssertionError as error:
        raise AssertionError(f"{program}, {name}, {way}: {error}") from error
