"""A copy of the repository with parameters so small that the chain takes minutes, most of them for imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.house import FLOORS, ROOT

PARAMS: dict[str, dict[str, Any]] = {
    "teach": {"epochs": 1},
    "cache": {"views": 1},
    "distill": {"steps": 21, "methods": ["plain", "logits", "cakd+logits"]},
    "export": {"reference_images": 32, "calibration_images": 32},
    "bench": {"enabled": ["ort-fp32", "rtx-fp16"], "seconds_per_row": 0.2, "rounds": 4},
    "report": {"budgets": {}},
}


FILES = ("dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml", "README.md", "constraints.txt")


def copy(folder: Path, *also: str, run: Path | None = None, **params: dict[str, Any]) -> None:
    """The repository without what runs made, as a git repository of its own.

    `run`: such a copy, to begin with what it made; `also`: more of its folders; `params`: by section, over PARAMS.
    """
    if run is not None:
        shutil.copytree(run, folder, symlinks=True, dirs_exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "cache", "tmp")
    for name in also if run else (*FLOORS, ".dvc", *also):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    yaml = YAML()
    held = yaml.load(ROOT / "params.yaml")
    for section, values in (*PARAMS.items(), *params.items()):
        held[section].update(values)
    yaml.dump(held, folder / "params.yaml")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


def environment() -> dict[str, str]:
    """Ours, with this Python's commands first, without pytest's marks: a pytest there is no worker of this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return {**ours, "PATH": path, "DVC_NO_ANALYTICS": "1"}


def dvc(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """`dvc ARGS` there."""
    command = [sys.executable, "-m", "dvc", *args]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
