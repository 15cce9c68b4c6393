"""The project under its one name: as a wheel, and in a checkout with and without links."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["ops", "layers", "models", "tasks", "routers", "harness", "storage"]


def tracked() -> list[Path]:
    """What a clone would hold, with what git is not yet told of."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(name) for name in names if (ROOT / name).exists()]


def python(place: Path, code: str, *, path: Path | None = None) -> str:
    """What a fresh interpreter in a folder prints, or the last line of what stopped it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True
    )
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    place = tmp_path_factory.mktemp("clone")
    for name in tracked():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name, follow_symlinks=False)
    return place


@pytest.fixture(scope="module")
def installed(clone, tmp_path_factory):
    """The wheel of a clone, combine."""
    place = tmp_path_factory.mktemp("wheel")
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(place)]
    subprocess.run([sys.executable, "-m", *command, str(clone)], check=True)
    (wheel,) = place.glob("mneme-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site-packages")
    return place / "site-packages"


def test_the_wheel_holds_the_modules_and_configs_of_the_tree(installed):
    folders = {*PACKAGES, "configs"}
    kept = [n for n in tracked() if n.suffix in (".py", ".yaml") and n.parts[0] in folders]
    expected = {Path("mneme") / name for name in [*kept, Path("train.py"), Path("eval.py")]}
    expected |= {Path("mneme/__init__.py"), Path("mneme/py.typed")}
    found = {file.relative_to(installed) for file in installed.rglob("*") if file.is_file()}
    assert {file for file in found if file.parts[0] == "mneme"} == expected


def test_an_installed_package_works_and_has_one_name(installed, tmp_path):
    code = "import mneme, sys; print('torch' in sys.modules, mneme.__file__)"
    assert python(tmp_path, code, path=installed) == f"False {installed}/mneme/__init__.py"
    code = (
        "from mneme.harness.config.compose import compose_checked as c; "
        "from mneme.harness.run.provenance import commit; "
        "print(c(['mixer=titans_mag']).config['mixer']['_target_'], commit())"
    )
    answer = python(tmp_path, code, path=installed)
    assert answer == "mneme.layers.MemoryAsGate unknown"
    assert "No module named 'layers'" in python(tmp_path, "import layers", path=installed)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_bare_name_is_refused(name):
    assert python(ROOT, f"import {name}") == f"ImportError: import mneme.{name}, not {name}"


KNOWS = {  # what a package may import from
    "ops": set(),
    "storage": set(),
    "routers": {"storage"},
    "tasks": {"routers", "storage"},
    "layers": {"ops", "storage"},
    "models": {"layers", "ops", "storage", "tasks"},
    "harness": {"layers", "models", "ops", "routers", "storage", "tasks"},
}


@pytest.mark.parametrize("name", KNOWS)
def test_imports_run_one_way(name):
    for file in (ROOT / name).rglob("*.py"):
        found = re.findall(r"^\s*(?:from|import) mneme\.(\w+)", file.read_text(), re.MULTILINE)
        assert {*found} <= {*KNOWS[name], name}, file
        assert not re.search(r"^\s*(from|import) (scripts|tests)\b", file.read_text(), re.MULTILINE)


def test_every_package_is_linked():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"mneme", "tests"}
    assert sorted(folders) == sorted(PACKAGES)
    for name in [*PACKAGES, "configs", "train.py", "eval.py"]:
        assert os.readlink(ROOT / "mneme" / name) == f"../{name}"


def test_a_checkout_whose_links_were_lost_works(clone, tmp_path):
    for name in tracked():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (clone / name).is_symlink():  # as git writes them where there are none
            target.write_text(os.readlink(clone / name))
        else:
            shutil.copy2(clone / name, target)
    code = "import mneme.ops.tiling as tiling; print(tiling.__name__, tiling.__file__)"
    assert python(tmp_path, code) == f"mneme.ops.tiling {tmp_path}/ops/tiling.py"
    inside = tmp_path / "site-packages"  # of somebody who has other packages of these names
    shutil.copytree(tmp_path / "mneme", inside / "mneme")
    shutil.copytree(tmp_path / "ops", inside / "ops")
    (inside / "layers").mkdir()
    (inside / "layers" / "__init__.py").touch()
    assert "No module named 'mneme.ops'" in python(inside, "import mneme.ops")
