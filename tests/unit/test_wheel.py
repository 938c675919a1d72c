"""The wheel, built and installed into an environment of its own, gives the command, the library and its data files.

The dependencies are those of this environment, lent by a .pth file: nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

import pixrec

ROOT = Path(__file__).parents[2]
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-cache-dir")
TIMEOUT = 120
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*words: object, cwd: Path) -> str:
    ran = subprocess.run([str(w) for w in words], cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=TIMEOUT)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that the build leaves nothing beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "pixrec", source / "pixrec", ignore=shutil.ignore_patterns("__pycache__"))
    run(*PIP, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an environment's scripts."""
    place = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    scripts = place / "bin"
    # Before the .pth: pip must not find the PixRec of this environment, let alone remove it.
    python = ("--python", scripts / "python")
    run(*PIP, *python, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=place)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    yield scripts
    shutil.rmtree(place)


def test_the_wheel_holds_what_the_package_holds(wheel: Path):
    held = {name for name in ZipFile(wheel).namelist() if name.startswith("pixrec/")}
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pixrec").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == here
    assert {"pixrec/py.typed", "pixrec/report/report.html", "pixrec/serving/static/index.html"} <= held


def test_it_gives_the_command(environment: Path, tmp_path: Path):
    assert run(environment / "pixrec", "--version", cwd=tmp_path) == f"pixrec {pixrec.__version__}\n"


def test_it_gives_the_library(environment: Path, tmp_path: Path):
    code = """
import importlib.resources
import pixrec
print(pixrec.__file__, pixrec.__version__, *pixrec.__all__)
files = importlib.resources.files("pixrec")
print(pixrec.Config().train.epochs, *(files.joinpath(name).is_file() for name in ("report/report.html", "py.typed")))
"""
    where, data = run(environment / "python", "-c", code, cwd=tmp_path).splitlines()
    file, version, *names = where.split()
    assert Path(file).is_relative_to(environment.parent)
    assert [version, *names] == [pixrec.__version__, *pixrec.__all__]
    assert data == f"{pixrec.Config().train.epochs} True True"
