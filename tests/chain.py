"""The stages of a tiny copy's dvc.yaml, each to be run as a forked child, and the hashes of what they leave.

The slow imports are done once, here. What claims to be a function of its inputs has a hash; what a clock wrote has
none: `reports/bench`, speeds and seconds in other JSON, and TensorRT's plans, which differ from build to build.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime  # noqa: F401 - so that no child has to
import onnxscript  # noqa: F401
import torch.onnx  # noqa: F401
from ruamel.yaml import YAML
from sklearn import datasets, model_selection  # noqa: F401

from exporters import build  # noqa: F401
from exporters.bench import measure  # noqa: F401
from pipeline.core import artifacts
from pipeline.core.atomic import PARTIAL
from pipeline.distill import distill  # noqa: F401
from pipeline.evaluate import evidence  # noqa: F401
from pipeline.report import gallery, page, summary  # noqa: F401
from pipeline.store import writing  # noqa: F401

CLOCKED = {"img_per_s", "stage_ms", "stall_fraction", "peak_mb", "seconds"}
WITH_CLOCKS = re.compile(r"reports/(train|parity\.json|quantize\.json)|artifacts/build/.*\.json$")
PLANS = (".plan", ".plan.json")  # TensorRT's, with its hash
OF_A_BENCH = ("edge.json", "edge.md", "index.html", "pareto.csv")  # the same from the same bench


@dataclass(frozen=True)
class Stage:
    """One stage as DVC would run it: `argv` begins with the module."""

    name: str
    argv: tuple[str, ...]
    outs: tuple[str, ...]

    def moved(self, below: str) -> Stage:
        """The same with its outs and its work folder below another folder."""
        argv = [f"{below}/{a}" if a in self.outs else a for a in self.argv]
        module = self.argv[0]
        if module in ("stages.teach", "stages.cache", "stages.distill", "stages.quantize"):
            argv += ["--work", f"{below}/.work/{module.removeprefix('stages.')}"]
        return Stage(self.name, tuple(argv), tuple(f"{below}/{o}" for o in self.outs))


def stages(folder: Path) -> list[Stage]:
    """In the order of dvc.yaml, which is one of the orders they can run in."""
    params = _yaml(folder / "params.yaml")
    found = []
    for name, block in _yaml(folder / "dvc.yaml")["stages"].items():
        if "matrix" in block:
            axes = {key: _value(params, of[2:-1]) for key, of in block["matrix"].items()}
            for values in itertools.product(*axes.values()):
                item = dict(zip(axes, values, strict=True))
                found.append(_stage(f"{name}@{'-'.join(values)}", block, {**params, "item": item}))
            continue
        if "foreach" not in block:
            found.append(_stage(name, block, params))
            continue
        for item in _value(params, block["foreach"][2:-1]):
            found.append(_stage(f"{name}@{item}", block["do"], {**params, "item": item}))
    return found


def _stage(name: str, block: dict[str, Any], values: dict[str, Any]) -> Stage:
    def filled(text: str) -> str:
        return re.sub(r"\$\{([\w.]+)\}", lambda m: str(_value(values, m[1])), text)

    outs = [o for kind in ("outs", "metrics", "plots") for o in block.get(kind, [])]
    named = [filled(next(iter(o)) if isinstance(o, dict) else o) for o in outs]
    return Stage(name, tuple(filled(block["cmd"]).split()[2:]), tuple(named))


def _value(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values[key]
    return values


def _yaml(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path)


def remove(folder: Path, outs: tuple[str, ...]) -> None:
    """As DVC does before a stage runs."""
    for out in outs:
        path = folder / out
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def fork(stage: Stage, folder: Path, log: Path, first: Callable[[], None] = lambda: None) -> int:
    """The process of a stage in a group of its own; `first` is called in it. What it says is appended to `log`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        first()
        sys.argv = list(stage.argv)
        runpy.run_module(stage.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Its exit code; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hashes(folder: Path, outs: tuple[str, ...], same_bench: bool) -> dict[str, str]:
    """File below `outs` -> hash of what must be the same again; `same_bench`: they were made of the same bench."""
    clocked = CLOCKED if same_bench else CLOCKED | {"provenance"}
    found = {}
    for path in _files(folder, outs):
        name = path.relative_to(folder).as_posix()
        if name.startswith("reports/bench/") or path.name.endswith(PLANS):
            continue
        if path.name in OF_A_BENCH and not same_bench:
            continue
        if WITH_CLOCKS.match(name):
            found[name] = artifacts.digest(_without(clocked, json.loads(path.read_text())))
        else:
            found[name] = artifacts.sha256(path)
    return found


def _files(folder: Path, outs: tuple[str, ...]) -> Iterator[Path]:
    for out in outs:
        path = folder / out
        yield from sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _without(keys: set[str], value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(keys, v) for k, v in value.items() if k not in keys}
    return [_without(keys, v) for v in value] if isinstance(value, list) else value


def litter(folder: Path) -> list[str]:
    """What a finished chain must not hold: half-written files, and the work of runs that are done."""
    half = [p for p in folder.rglob(f"*{PARTIAL}") if ".dvc" not in p.parts]
    kept = [p for p in folder.glob(".work/*/*") if p.suffix not in (".lock", ".receipt")]
    return sorted(p.relative_to(folder).as_posix() for p in (*half, *kept))
