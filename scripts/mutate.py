"""Changes one small thing at a time and asks whether the tests notice.

    python scripts/mutate.py                       # ten changes in each top-level folder
    python scripts/mutate.py harness --count 30    # thirty in one of them
    python scripts/mutate.py --seed 1 --jobs 2     # others, two at a time

A change is a comparison, an arithmetic operator or a boolean turned round, a number raised, a
statement left out, or a value of a config; annotations, docstrings, messages of errors and the
inputs of tests inside `ops` are left alone. Each is made in a copy of the tree, in which the tests
that mirror its folder run until one fails. What survives is printed as it would be read: file,
line, before and after. Which changes are drawn follows from the seed and the files.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.cli import report_errors

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # folder of the change to the tests that answer for it
    "ops": ["tests/ops"],
    "layers": [
        "tests/conformance/test_registry.py",
        "tests/layers",
        "tests/conformance/test_layers.py",
    ],
    "models": ["tests/models", "tests/conformance/test_models.py", "tests/harness"],
    "tasks": ["tests/tasks"],
    "routers": ["tests/routers", "tests/conformance/test_registry.py"],
    "harness": ["tests/harness"],
    "scripts": ["tests/scripts", "tests/test_readme.py"],
    "configs": ["tests/conformance/test_configs.py", "tests/harness/test_check.py"],
    "programs": ["tests/harness/test_programs.py"],  # train.py and eval.py
}
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
    "layers.TestTimeMemory": "layers.DeltaNet",
    "ops.test_time.MLP": "ops.test_time.Matrix",
}
FIXTURES = ("_inputs", "_flops", "inputs", "flops")  # of ops: what their tests are given
TIME_LIMIT = 600.0  # seconds a change's tests may take; a change that hangs was noticed


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
    command = ["git", "-C", str(ROOT), "ls-files", *names]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [Path(name) for name in tracked if name.endswith((".py", ".yaml"))]


def draw(folder: str, count: int, seed: int) -> list[Change]:
    """So many changes of a folder; a file is as likely as it has lines that could be changed."""
    found = [c for path in files_of(folder) for c in changes_of(path, (ROOT / path).read_text())]
    return random.Random(f"{folder} {seed}").sample(found, min(count, len(found)))


def noticed(change: Change, folder: str) -> bool:
    """Whether a test fails, or never ends, with the change."""
    with tempfile.TemporaryDirectory() as place:
        tracked = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
        ).stdout.split()
        for name in tracked:
            target = Path(place) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        path = Path(place) / change.path
        path.write_text(change.applied(path.read_text()))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, *_nearest_first(change.path, folder)],
                cwd=place,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                timeout=TIME_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
        return done.returncode != 0


def _nearest_first(path: Path, folder: str) -> list[str]:
    """The tests of a folder, those first whose name holds that of the file or its folder."""
    places = [ROOT / place for place in TESTS[folder]]
    found = [[place] if place.is_file() else sorted(place.rglob("test_*.py")) for place in places]
    files = [str(file.relative_to(ROOT)) for inside in found for file in inside]
    names = {path.stem, path.parent.name} - {folder, "__init__"}
    return sorted(files, key=lambda file: not any(name in Path(file).stem for name in names))


def main(arguments: Sequence[str]) -> int:
    """Draws, tries and reports; 1 if a folder has fewer than nine in ten noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", help=f"of {', '.join(TESTS)}; default all")
    parser.add_argument("--count", type=int, default=10, help="changes of each folder")
    parser.add_argument("--seed", type=int, default=0, help="draws others")
    parser.add_argument("--jobs", type=int, default=1, help="changes tried at a time")
    options = parser.parse_args(arguments)
    if unknown := set(options.folders) - set(TESTS):
        parser.error(f"no folder {', '.join(sorted(unknown))}; there are {', '.join(TESTS)}")
    few = False
    for folder in options.folders or TESTS:
        drawn = draw(folder, options.count, options.seed)
        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(partial(noticed, folder=folder), drawn))
        print(f"{folder}: {sum(results)} of {len(results)} noticed", flush=True)
        for change, seen in zip(drawn, results, strict=True):
            if not seen:
                print(change.described((ROOT / change.path).read_text()), flush=True)
        few |= sum(results) < 0.9 * len(results)
    return int(few)


if __name__ == "__main__":
    with report_errors():
        sys.exit(main(sys.argv[1:]))
