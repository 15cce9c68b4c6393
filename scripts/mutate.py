"""Changes one small thing at a time and asks whether the tests notice.

    python scripts/mutate.py                       # ten changes in each top-level folder
    python scripts/mutate.py harness --count 30    # thirty in one of them
    python scripts/mutate.py --seed 1 --jobs 2     # others, two at a time

A change is a comparison, an arithmetic operator or a boolean turned round, a number raised, a
statement left out, or a value of a config; annotations, docstrings, messages of errors and the
inputs of tests inside `ops` are left alone. Each is made in a copy of the tree, in which those
tests run that ran the changed line before, until one fails: those named like the file first, then
the quick ones, up to ten minutes of them. What survives is printed as it would be read: file, line,
before and after. Which changes are drawn follows from the seed and the files.

Which test runs which line is found once by a run of the whole suite (in subprocesses too), which
takes about twice its usual time, and is kept in `.cache/mutate` until a file changes. A test that
fails there is not run again.
"""

import argparse
import ast
import contextlib
import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import coverage
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mneme.harness.cli import report_errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [
    "ops", "storage", "layers", "models", "tasks", "routers", "harness", "scripts", "configs",
    "programs",
]  # fmt: skip
OF_CONFIGS = ("tests/conformance/test_configs.py", "tests/conformance/test_published_choices.py",
              "tests/harness/test_check.py")  # fmt: skip
CACHE = ROOT / ".cache" / "mutate"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SWAPS: dict[type[ast.AST], tuple[str, str]] = {  # an operator as it is written, and another
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
OTHER_WORDS = {  # of a config
    "true": "false",
    "false": "true",
    "null": "1",
    "mneme.layers.TestTimeMemory": "mneme.layers.DeltaNet",
    "mneme.ops.test_time.MLP": "mneme.ops.test_time.Matrix",
}
FIXTURES = ("_inputs", "_flops", "inputs", "flops")  # of ops: what their tests are given
LONGEST = 600.0  # seconds that the tests of a change took; what only more would notice survives
PATIENCE = (4, 120.0)  # times what its tests took, and seconds on top; what hangs was noticed
COVERAGE = """
[run]
parallel = true
source = {root}
omit = */tests/*
data_file = {data}
context = ${{PYTEST_CURRENT_TEST-}}
"""  # the context of a program that a test starts is that test


@dataclass(frozen=True)
class Change:
    """One small change of one file.

    Attributes:
        path: of the file, from the root.
        start: where the text that is replaced begins, in characters.
        end: where it ends.
        text: what stands there instead.
    """

    path: Path
    start: int
    end: int
    text: str

    def applied(self, source: str) -> str:
        """The file with the change."""
        return source[: self.start] + self.text + source[self.end :]

    def described(self, source: str) -> str:
        """File, line, before and after, for people."""
        line = source.count("\n", 0, self.start) + 1
        lines = [source.splitlines()[line - 1], self.applied(source).splitlines()[line - 1]]
        before, after = (text.strip() for text in lines)
        return f"{self.path}:{line}\n    - {before}\n    + {after}"


class _Finder(ast.NodeVisitor):
    """Collects the changes of a module, without those that no program would feel."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.starts = [0]  # of each line
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Change] = []

    def _at(self, line: int, column: int) -> int:
        """A place of the syntax tree, which counts bytes, in characters of the file."""
        start = self.starts[line - 1]
        text = self.source[start : self.starts[line]]
        return start + len(text.encode()[:column].decode())

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        end = self._at(node.end_lineno, node.end_col_offset)
        return self._at(node.lineno, node.col_offset), end

    def _replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        self.found.append(Change(self.path, *self._span(node), text))

    def _swap(self, operator: ast.AST, left: ast.expr, right: ast.expr) -> None:
        """Another operator between two operands; brackets and blanks between them stay."""
        if type(operator) not in SWAPS:
            return
        start, end = self._span(left)[1], self._span(right)[0]
        between = self.source[start:end]
        old, new = SWAPS[type(operator)]
        place = between.find(old)
        if place >= 0 and "#" not in between:
            at = start + place
            self.found.append(Change(self.path, at, at + len(old), new))

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for i, operator in enumerate(node.ops):
            self._swap(operator, operands[i], operands[i + 1])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(isinstance(side, ast.JoinedStr) for side in (node.left, node.right)):
            self._swap(node.op, node.left, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._swap(node.op, node.values[0], node.values[1])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self._replace(node, ast.unparse(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(node, str(not node.value))
        elif isinstance(node.value, int | float):
            self._replace(node, str(node.value + 1 if node.value in (0, 1) else node.value * 2))

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._replace(node, "pass")
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace(node, "pass")
        self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in FIXTURES and self.path.parts[0] == "ops":
            return
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:  # not the decorators: examples for tests
            self.visit(statement)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass


def changes_of(path: Path, source: str) -> list[Change]:
    """All changes of a file that `mutate` may draw."""
    if path.suffix == ".yaml":
        return list(_changes_of_config(path, source))
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    return finder.found


def _changes_of_config(path: Path, source: str) -> Iterator[Change]:
    """Numbers doubled, booleans turned round, another class where one is named."""
    at = 0
    for line in source.splitlines(keepends=True):
        key, colon, rest = line.partition(": ")
        value = rest.split(" #")[0].strip()
        start = at + len(key) + len(colon) + len(rest) - len(rest.lstrip())
        at += len(line)
        if not colon or key.lstrip().startswith("#"):
            continue
        try:
            text = repr(float(value) * 2 if float(value) else 1.0)
            text = str(int(float(text))) if value.lstrip("-").isdigit() else text
        except ValueError:
            text = OTHER_WORDS.get(value, "")
        if text:
            yield Change(path, start, start + len(value), text)


def files_of(folder: str) -> list[Path]:
    """The files of a top-level folder that git tracks."""
    names = ["train.py", "eval.py"] if folder == "programs" else [folder]
    return [Path(name) for name in _tracked(*names) if name.endswith((".py", ".yaml"))]


def _tracked(*names: str) -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def draw(folder: str, count: int, seed: int) -> list[Change]:
    """So many changes of a folder; a file is as likely as it has lines that could be changed."""
    found = [c for path in files_of(folder) for c in changes_of(path, (ROOT / path).read_text())]
    return random.Random(f"{folder} {seed}").sample(found, min(count, len(found)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """As a plugin of the run that is traced: lines belong to the test that runs them."""
    tracer = coverage.Coverage.current()
    if tracer is not None:
        tracer.switch_context(item.nodeid)
    return (yield)


class Suite:
    """Which test runs which line, and how long each takes.

    Args:
        folder: where the traced run's data and output lie.
    """

    def __init__(self, folder: Path) -> None:
        output = (folder / "output.txt").read_text()
        self.seconds = dict.fromkeys(re.findall(r"PASSED (tests/.*?) *$", output, re.M), 0.0)
        for seconds, test in re.findall(r"^([\d.]+)s \w+ +(tests/.*?) *$", output, re.M):
            if test in self.seconds:
                self.seconds[test] += float(seconds)
        self.data = coverage.CoverageData(str(folder / "data"))
        self.data.read()
        self.root = Path((folder / "root").read_text())

    def tests_of(self, change: Change, source: str) -> list[str]:
        """The tests that may notice a change, in the order in which they are run.

        Lines that run only when a module is imported (constants, defaults) are every test's that
        runs a line of the file.
        """
        if change.path.suffix == ".yaml":
            name = change.path.stem
            found = {t for t in self.seconds if t.startswith(OF_CONFIGS) or name in t}
        else:
            lines = self.data.contexts_by_lineno(str(self.root / change.path))
            statement = _lines_of_statement(source, source.count("\n", 0, change.start) + 1)
            contexts = [lines.get(line, []) for line in statement]
            imported = not any(contexts) or any("" in some for some in contexts)
            found = self._named(lines.values() if imported else contexts)
        names = {change.path.stem, change.path.parent.name} - {*FOLDERS, "__init__", ""}
        order = sorted(found, key=lambda t: (not any(n in t for n in names), self.seconds[t]))
        until = itertools.accumulate(self.seconds[test] for test in order)
        return [test for test, seconds in zip(order, until, strict=True) if seconds <= LONGEST]

    def _named(self, contexts: Iterable[list[str]]) -> set[str]:
        """Contexts of lines as tests; those of programs have the test's phase behind them."""
        flat = {context for some in contexts for context in some}
        return {re.sub(r" \((setup|call|teardown)\)$", "", one) for one in flat} & set(self.seconds)


def _lines_of_statement(source: str, line: int) -> range:
    """The lines of the innermost statement around a line, without the body of a block."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and node.lineno <= line:
            end = node.end_lineno or node.lineno
            body = getattr(node, "body", None)
            if isinstance(body, list) and body:
                end = max(node.lineno, body[0].lineno - 1)
            if line <= end and (len(found) == 1 or node.lineno >= found.start):
                found = range(node.lineno, end + 1)
    return found


def trace() -> Suite:
    """The suite as it was traced, once for a state of the files."""
    digest = hashlib.sha256()
    for name in sorted(_tracked()):
        if name.endswith((".py", ".yaml")):
            digest.update(name.encode() + (ROOT / name).read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    if not (folder / "root").exists():
        print("tracing the whole suite, once; this takes long", flush=True)
        shutil.rmtree(CACHE, ignore_errors=True)
        folder.mkdir(parents=True)
        rules = folder / "coveragerc"
        rules.write_text(COVERAGE.format(root=ROOT, data=folder / "data"))
        command = ["-m", "pytest", "-p", "scripts.mutate", "-vv", "--durations=0", "-n", "2"]
        with (folder / "output.txt").open("w") as output:
            subprocess.run(
                [sys.executable, *command, "--dist", "worksteal"],
                cwd=ROOT,
                env={**ENVIRONMENT, "COVERAGE_PROCESS_START": str(rules)},
                stdout=output,
                stderr=output,
                check=False,
            )
        combined = coverage.Coverage(config_file=str(rules))
        combined.combine()
        combined.save()
        (folder / "root").write_text(str(ROOT))  # last: the trace is whole
    return Suite(folder)


def noticed(change: Change, suite: Suite) -> bool:
    """Whether a test fails, or never ends, with the change."""
    source = (ROOT / change.path).read_text()
    tests = suite.tests_of(change, source)
    if not tests:
        return False
    times, more = PATIENCE
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        clone = ["git", "clone", "--quiet", "--shared", str(ROOT), str(tree)]
        subprocess.run(clone, check=True)  # some tests ask git
        for name in _tracked():  # as it is now, committed or not
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).unlink(missing_ok=True)  # a link is not written over
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
        (tree / change.path).write_text(change.applied(source))
        (Path(place) / "tests.txt").write_text("\n".join(tests))
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
             f"@{place}/tests.txt"],
            cwd=tree, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(times * sum(suite.seconds[test] for test in tests) + more) != 0
        except subprocess.TimeoutExpired:
            return True
        finally:  # programs that a test started end with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(arguments: Sequence[str]) -> int:
    """Draws, tries and reports; 1 if a folder has fewer than nine in ten noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", help=f"of {', '.join(FOLDERS)}; default all")
    parser.add_argument("--count", type=int, default=10, help="changes of each folder")
    parser.add_argument("--seed", type=int, default=0, help="draws others")
    parser.add_argument("--jobs", type=int, default=1, help="changes tried at a time")
    options = parser.parse_args(arguments)
    if unknown := set(options.folders) - set(FOLDERS):
        parser.error(f"no folder {', '.join(sorted(unknown))}; there are {', '.join(FOLDERS)}")
    few, suite = False, trace()
    for folder in options.folders or FOLDERS:
        drawn = draw(folder, options.count, options.seed)
        with ThreadPoolExecutor(options.jobs) as pool:
            results = []
            for change, seen in zip(
                drawn, pool.map(partial(noticed, suite=suite), drawn), strict=True
            ):
                results.append(seen)
                if not seen:
                    print(change.described((ROOT / change.path).read_text()), flush=True)
        print(f"{folder}: {sum(results)} of {len(results)} noticed", flush=True)
        few |= sum(results) < 0.9 * len(results)
    return int(few)


if __name__ == "__main__":
    with report_errors():
        sys.exit(main(sys.argv[1:]))
