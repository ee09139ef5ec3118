"""`python -m tests.killed FOLDER KILLS SEED [STAGE...]`: stages killed at random moments, again and again.

The slow imports are done once; each attempt is a forked child that runs the stages' own command lines, skips those
whose output is there, as DVC does, and is killed with SIGKILL. Prints a JSON line: the hash of the last stage's
output at the end of every chain, and in which stage each kill fell. A published output is never half there: each
is hashed after every kill.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

from pipeline import teach  # noqa: F401 - so that no child has to
from pipeline.core import artifacts
from pipeline.distill import distill  # noqa: F401
from pipeline.store import writing  # noqa: F401

OUTS = {"teach": "teacher", "cache": "features", "distill": "student"}


def command(stage: str, folder: Path) -> list[str]:
    """The command line of a stage on the paths of one chain."""
    teacher = folder / "teacher" / "teacher.safetensors"
    paths = {
        "teach": [folder / "prepared", folder / "teacher"],
        "cache": [folder / "prepared", teacher, folder / "features"],
        "distill": [
            *(folder / "prepared", teacher, folder / "features"),
            *(folder / "student", folder / "perf.json", "--method", "cakd+logits"),
        ],
    }[stage]
    options = ["--params", folder / "params.yaml", "--work", folder / "work" / stage]
    return [f"stages.{stage}", *map(str, (*paths, *options))]


def attempt(folder: Path, stages: list[str]) -> None:
    """Run what is missing of the chain, as a child: never returns."""
    for stage in stages:
        if (folder / OUTS[stage]).exists():
            continue
        (folder / "now").write_text(stage)
        sys.argv = command(stage, folder)
        try:
            runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
        except SystemExit as left:
            if left.code:
                os._exit(int(left.code))
    os._exit(0)


def contents(folder: Path) -> str:
    """One hash over the bytes of every file of a folder."""
    return artifacts.digest(each(folder))


def each(folder: Path) -> dict[str, str]:
    """The hash of every file of a folder, by name."""
    return {p.name: artifacts.sha256(p) for p in sorted(folder.iterdir())}


def refuse_difference(stage: str, first: dict[str, str], now: dict[str, str]) -> None:
    """Name the files in which an output differs from the first one of its stage."""
    different = sorted(n for n in {*first, *now} if first.get(n) != now.get(n))
    assert not different, f"{stage}: {different} differ: {[first.get(n) for n in different]}, {now}"


def main(folder: Path, kills: int, seed: int, stages: list[str]) -> None:
    """Chains until `kills` kills have fallen, then one more undisturbed."""
    draw = random.Random(seed)
    hashes, fell = [], []
    seen: dict[str, dict[str, str]] = {}
    while True:
        child = os.fork()
        if child == 0:
            attempt(folder, stages)
        if len(fell) < kills:
            time.sleep(draw.uniform(0.02, 1.0))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        for stage in stages:
            if (folder / OUTS[stage]).exists():
                now = each(folder / OUTS[stage])
                refuse_difference(stage, seen.setdefault(stage, now), now)
        if os.WIFSIGNALED(status):
            fell.append((folder / "now").read_text())
            continue
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"a chain ended with {os.waitstatus_to_exitcode(status)}")
        hashes.append(contents(folder / OUTS[stages[-1]]))
        if len(fell) == kills:
            break
        for stage in stages:
            shutil.rmtree(folder / OUTS[stage])
    litter = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    print(json.dumps({"hashes": hashes, "fell": fell, "litter": litter}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or list(OUTS))
