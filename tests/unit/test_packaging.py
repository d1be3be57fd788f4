"""The package as users get it: what the wheel holds; the core runs without FUSE and CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import kvfs
from tests.sources import ROOT, modules_below

MAPPED = ("gpu", "mount", "tools")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel, built from a copy because a build leaves files in its tree."""
    base = tmp_path_factory.mktemp("wheel")
    tree = base / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("kvfs", *MAPPED):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*build, "--disable-pip-version-check", "--wheel-dir", base, tree],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = base.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def core_files() -> list[Path]:
    """The modules of `kvfs/` itself, relative to the root: not those behind the links."""
    return [file.relative_to(ROOT) for file in modules_below("kvfs")]


def core_modules() -> list[str]:
    names = (".".join(file.with_suffix("").parts) for file in core_files())
    return sorted(name.removesuffix(".__init__") for name in names)


def test_links_give_the_tree_the_shape_of_the_package() -> None:
    for name in MAPPED:
        assert (ROOT / "kvfs" / name).readlink() == Path("..") / name


def test_the_list_of_packages_is_complete(pyproject: dict[str, Any]) -> None:
    found = {".".join(file.parent.parts) for file in core_files()}
    mapped = {f"kvfs.{name}" for name in MAPPED}
    for name in MAPPED:
        assert [*(ROOT / name).rglob("__init__.py")] == [ROOT / name / "__init__.py"]
    setuptools = pyproject["tool"]["setuptools"]
    assert set(setuptools["packages"]) == found | mapped
    assert set(setuptools["package-dir"]) == {"kvfs"} | mapped


def test_the_version_is_the_same_everywhere(pyproject: dict[str, Any]) -> None:
    assert kvfs.__version__ == pyproject["project"]["version"]
    assert f"## [{kvfs.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_holds_kvfs_and_nothing_else(wheel_names: set[str]) -> None:
    top_level = {name.partition("/")[0] for name in wheel_names}
    metadata = f"kvfs-{kvfs.__version__}.dist-info"
    assert top_level == {"kvfs", metadata}
    assert f"{metadata}/licenses/LICENSE" in wheel_names
    assert "kvfs/py.typed" in wheel_names


def test_the_wheel_holds_every_module(wheel_names: set[str]) -> None:
    expected = {str(path) for path in core_files()}
    for name in MAPPED:
        expected |= {f"kvfs/{name}/{path.name}" for path in (ROOT / name).glob("*.py")}
    assert {name for name in wheel_names if name.endswith(".py")} == expected


def test_every_script_of_the_package_exists(pyproject: dict[str, Any]) -> None:
    for target in pyproject["project"]["scripts"].values():
        module, _, function = target.partition(":")
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert re.search(rf"^(?:async )?def {function}\(", path.read_text(), re.MULTILINE), target


def gpu_modules() -> list[str]:
    """All but those that are imported where a GPU has been found, and the reference of tests."""
    of_cuda = {"cuda", "cufile", "cupy_runtime", "reference"}
    return sorted(
        f"kvfs.gpu.{p.stem}" for p in (ROOT / "gpu").glob("*.py") if p.stem not in of_cuda
    )


@pytest.mark.parametrize("modules", [core_modules(), gpu_modules()], ids=["core", "gpu"])
def test_runs_where_fuse_and_cuda_are_absent(modules: list[str]) -> None:
    program = """
import importlib, sys
for absent in ("cuda", "cupy", "kvikio", "numpy", "nvidia", "pyfuse3"):
    sys.modules[absent] = None
for module in sys.argv[1:]:
    importlib.import_module(module)
assert not {"kvfs.mount", "kvfs.tools"} & set(sys.modules)
"""
    command = [sys.executable, "-W", "error", "-c", program, *modules]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_importing_kvfs_imports_nothing_else() -> None:
    program = "import sys, kvfs; print([n for n in sys.modules if n.startswith('kvfs.')])"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"
