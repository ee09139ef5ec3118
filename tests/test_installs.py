"""What is installed: the pinned versions cover every requirement, and a role needs no more than it lists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ROLES: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Not in .venv, so without a tested version: TensorRT needs a GPU of its own generation.
UNPINNED = {"tensorrt"}
EDGE = (
    "exporters.bench",
    "exporters.bundle",
    "exporters.candidates",
    "exporters.ort",
    "exporters.parity",
)


def named(requirement: str) -> str:
    """The distribution of a requirement, as pip compares names."""
    return re.split(r"[\s<>=!~;\[]", requirement)[0].lower().replace("_", "-").replace(".", "-")


def pinned() -> set[str]:
    """The distributions of constraints.txt, each pinned to one version, for some Pythons or all."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+( ; .+)?", line) for line in lines)
    return {named(line) for line in lines}


def test_every_requirement_has_a_tested_version() -> None:
    wanted = {*PROJECT["dependencies"], *(r for listed in ROLES.values() for r in listed)}
    names = {named(r) for r in wanted} - {"cakd-edge"} - UNPINNED
    assert names - pinned() == set()


def test_what_is_installed_here_is_what_is_pinned() -> None:
    """Of the packages that decide figures; skipped where somebody installed others on purpose."""
    from importlib.metadata import version

    here = {name: version(name) for name in ("torch", "timm", "numpy", "onnxruntime", "pillow")}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = {tuple(line.split(" ;")[0].split("==")) for line in lines}
    others = {n: v for n, v in here.items() if (n, v.split("+")[0]) not in pairs}
    if others:
        pytest.skip(f"other versions than constraints.txt: {others}")
    assert not others


def test_the_makefile_and_ci_install_by_the_constraints() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "PINNED := $(if $(LATEST),,-c constraints.txt)" in makefile
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        installs = re.findall(r"pip install .*-e .*", path.read_text(encoding="utf-8"))
        assert installs and all("-c constraints.txt" in line for line in installs), path.name


@pytest.mark.parametrize("module", EDGE)
def test_an_edge_command_starts_with_the_packages_of_its_role_alone(module: str) -> None:
    others = {named(r) for role in ("train", "report") for r in ROLES[role]}
    imports = {"scikit-learn": "sklearn", "cakd-edge": "nothing"}
    blocked = [
        imports.get(name, name) for name in sorted(others - {named(r) for r in ROLES["edge"]})
    ]
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.argv = [{module!r}, '--help']; runpy.run_module({module!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr[-500:]


def test_candidates_without_timm_say_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['timm'] = None\n"
        "sys.argv = ['exporters.candidates']; runpy.run_module('exporters.candidates', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install -e '.[train]'" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
