"""`python -m tests.chaos --rounds 100`: accidents at random moments anywhere in the chain, then one plain run.

Most rounds run a stage as a forked child, the rest a real `dvc repro` on a tiny copy. After the accident the plain
run must leave the hashes of an undisturbed chain, no half-written file and no traceback of our code. A round that
does not is a failure and its folder is kept. `--dvc N`: rounds through DVC, a fifth unless told. What a killed DVC
left torn is set aside before the plain run, as `make repro` does, and counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from benchmarks import record
from pipeline.core import artifacts
from pipeline.project import dvc_locks
from tests import accidents, chain, tiny
from tests.accidents import ACCIDENTS, Scene
from tests.chain import Stage

SCHEMA = "cakd.benchmark.chaos/1"
PARAMS: dict[str, dict[str, Any]] = {
    "teach": {"checkpoint_every": 3},
    "cache": {"shard_mb": 1},
    "distill": {"checkpoint_every": 3, "workers": 1},
}
WITH_WORKERS = ("distill@", "bench@ort")
THROUGH_DVC = ("dvc killed", "killed", "all killed", "twice at once", "clock jumped")
IMPORTS = 4.0  # seconds that a stage of DVC's takes longer than a forked one, about
TRIES = 3  # plain runs of DVC, should it refuse by a lock of its own
PATIENCE = 300.0
TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*.*")
OURS = re.compile(r'File "[^"]*(?:pipeline|exporters|stages)/')


@dataclass
class Round:
    """What happened: `code` of the disturbed run; `tries` plain runs it took; what was wrong after.

    `torn`: files of its own that DVC left half-written, and would refuse to read.
    """

    through: str
    stage: str
    accident: str
    after_s: float = 0.0
    code: int | None = None
    tries: int = 1
    torn: tuple[str, ...] = ()
    dvc_said: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    litter: tuple[str, ...] = ()
    ours: str | None = None
    of_others: int = 0

    @property
    def failed(self) -> bool:
        return bool(self.different or self.litter or self.ours)

    def read(self, log: Path) -> None:
        """Tracebacks and DVC's errors in what the processes said."""
        text = log.read_text(errors="replace") if log.exists() else ""
        for block in TRACEBACK.findall(text):
            if self.through == "stage" or OURS.search(block):
                self.ours = block
            else:
                self.of_others += 1
        said = re.findall(r"^ERROR: (?!failed to reproduce)(.*)", text, re.M)
        self.dvc_said = tuple(re.sub(r"\d+", "N", line) for line in said)


class Chain:
    """An undisturbed chain and a copy of it to disturb, both of forked stages, in a folder of their own."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.draw, self.folder = draw, folder / "chain"
        self.pristine, self.log = folder / "undisturbed", folder / "log.txt"
        self.pristine.mkdir(parents=True)
        tiny.copy(self.pristine, **PARAMS)
        self.stages = chain.stages(self.pristine)
        self.seconds = {stage.name: self._timed(stage) for stage in self.stages}
        shutil.copytree(self.pristine, self.folder, symlinks=True)
        self.no_disk = accidents.why_no_small_disk(folder)

    def _timed(self, stage: Stage) -> float:
        began = time.monotonic()
        code = chain.wait(chain.fork(stage, self.pristine, self.log))
        assert code == 0, f"undisturbed, {stage.name} ended with {code}: {self.log.read_text()}"
        return time.monotonic() - began

    def round(self, stage: Stage, accident: str) -> Round:
        """One accident to one stage, then the stage alone."""
        self.log.unlink(missing_ok=True)
        chain.remove(self.folder, stage.outs)
        happened = Round("stage", stage.name, accident)
        scene = Scene(stage, self.folder, self.log, self.seconds[stage.name], self.draw)
        happened.code, happened.after_s = ACCIDENTS[accident](scene)
        chain.remove(self.folder, stage.outs)
        code = chain.wait(chain.fork(stage, self.folder, self.log))
        happened.read(self.log)
        if code:
            happened.ours = f"the plain run ended with {code}: {self.log.read_text()[-2000:]}"
            return happened
        happened.different = differing(self.pristine, self.folder, stage.outs, same_bench=True)
        happened.litter = tuple(chain.litter(self.folder))
        if not happened.failed:
            self._as_before(stage)
        return happened

    def _as_before(self, stage: Stage) -> None:
        """So that later rounds have the figures that the first run measured, too."""
        chain.remove(self.folder, stage.outs)
        for out in stage.outs:
            source, target = self.pristine / out, self.folder / out
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)


def differing(one: Path, other: Path, outs: tuple[str, ...], same_bench: bool) -> tuple[str, ...]:
    """Names of the files that do not have the same hash in both."""
    a, b = (chain.hashes(folder, outs, same_bench) for folder in (one, other))
    return tuple(sorted(name for name in {*a, *b} if a.get(name) != b.get(name)))


class House:
    """A copy of the repository in which `dvc repro` runs."""

    def __init__(self, folder: Path, undisturbed: Chain) -> None:
        self.folder, self.log, self.undisturbed = folder / "house", folder / "dvc.txt", undisturbed
        self.draw = undisturbed.draw
        self.folder.mkdir()
        tiny.copy(self.folder, **PARAMS)
        self.outs = tuple(out for stage in undisturbed.stages for out in stage.outs)
        code = self.start().wait()
        assert code == 0, f"undisturbed, dvc repro ended with {code}: {self.log.read_text()}"
        found = self.differing()
        assert not found, f"dvc repro and the forked stages differ: {found}"

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dvc", "repro"],
                cwd=self.folder,
                env=tiny.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def differing(self) -> tuple[str, ...]:
        return differing(self.undisturbed.pristine, self.folder, self.outs, same_bench=False)

    def forget(self, stage: Stage) -> None:
        """DVC has never run the stage."""
        chain.remove(self.folder, stage.outs)
        shutil.rmtree(self.folder / ".dvc" / "cache" / "runs", ignore_errors=True)
        yaml, lock = YAML(), self.folder / "dvc.lock"
        held = yaml.load(lock)
        held["stages"].pop(stage.name, None)
        yaml.dump(held, lock)

    def round(self, stage: Stage, accident: str) -> Round:
        """One accident while `dvc repro` is at the stage, then `dvc repro`."""
        self.log.unlink(missing_ok=True)
        self.forget(stage)
        happened = Round("dvc", stage.name, accident)
        running = self.start()
        self._await(stage, running)
        happened.after_s = accidents.slept(
            self.draw.uniform(0, IMPORTS + self.undisturbed.seconds[stage.name])
        )
        with suppress(psutil.Error):  # it has ended in the meantime
            self._strike(accident, running)
        happened.code = running.wait(PATIENCE)
        if accident == "clock jumped":
            accidents.set_clocks(self.folder, self.draw.choice((accidents.FUTURE, accidents.PAST)))
        happened.torn = tuple(dvc_locks.set_aside(self.folder))
        while (code := self.start().wait(PATIENCE)) and happened.tries < TRIES:
            happened.tries += 1
        happened.read(self.log)
        if code:
            happened.ours = f"dvc repro ended with {code}: {self.log.read_text()[-2000:]}"
            return happened
        happened.different = self.differing()
        happened.litter = tuple(chain.litter(self.folder))
        return happened

    def _await(self, stage: Stage, running: subprocess.Popen[bytes]) -> None:
        begun = f"Running stage '{stage.name}'"
        while running.poll() is None and begun not in self.log.read_text():
            time.sleep(0.02)

    def _strike(self, accident: str, running: subprocess.Popen[bytes]) -> None:
        if accident == "twice at once":
            self.start().wait(PATIENCE)
        elif running.poll() is not None:
            return
        elif accident == "dvc killed":
            running.kill()
        elif accident == "killed":
            for process in of_stages(running.pid)[:1]:
                process.kill()
        elif accident == "worker killed":
            for process in of_stages(running.pid)[:1]:
                accidents.kill_worker(process, 0.0)
        else:
            os.killpg(running.pid, signal.SIGKILL)


def of_stages(pid: int) -> list[psutil.Process]:
    """The processes of our stages below a dvc."""
    below = psutil.Process(pid).children(recursive=True)
    return [p for p in below if any(word.startswith("stages.") for word in words(p))]


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def plan(stages: list[Stage], rounds: int, through_dvc: int, draw: random.Random) -> list[Any]:
    """(through DVC, stage, accident) of every round: each pair of stage and accident about equally often."""
    forked = [(False, *pair) for pair in pairs(stages, [*ACCIDENTS, "killed"])]
    real = [(True, *pair) for pair in pairs(stages, [*THROUGH_DVC, "worker killed"])]
    draw.shuffle(forked)
    draw.shuffle(real)
    chosen = [
        *itertools.islice(itertools.cycle(forked), rounds - through_dvc),
        *itertools.islice(itertools.cycle(real), through_dvc),
    ]
    draw.shuffle(chosen)
    return chosen


def pairs(stages: list[Stage], kinds: list[str]) -> list[tuple[Stage, str]]:
    return [
        (stage, kind)
        for stage in stages
        for kind in kinds
        if kind != "worker killed" or stage.name.startswith(WITH_WORKERS)
    ]


def table(found: dict[str, Any]) -> str:
    """Rounds by stage and accident, and what was wrong after them."""
    rounds = found["rounds"]
    kinds = [("stage", a) for a in ACCIDENTS] + [
        ("dvc", a) for a in (*THROUGH_DVC, "worker killed")
    ]
    counts = Counter((r["stage"], (r["through"], r["accident"])) for r in rounds)
    lines = [
        "| stage | " + " | ".join(f"{'dvc: ' * (t == 'dvc')}{a}" for t, a in kinds) + " |",
        "|---|" + "--:|" * len(kinds),
    ]
    for stage in found["stages"]:
        cells = (str(counts[stage, kind] or "") for kind in kinds)
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    told = found["tally"]
    lines += ["", *_endings(rounds, kinds), ""]
    lines += [
        f"{len(rounds)} rounds in {found['wall_s'] / 60:.0f} min. After one plain run: {told['different']} rounds "
        f"with another hash, {told['litter']} with a half-written file, {told['ours']} tracebacks of our code, "
        f"{told['of_others']} of others; {told['again']} needed a second plain run; {told['torn']} torn files of "
        "DVC's set aside.",
    ]
    lines += [f"- DVC, {n} times: `{line}`" for line, n in found["dvc_said"].items()]
    return "\n".join([*lines, *([f"Skipped: {found['skipped']}"] if found["skipped"] else [])])


def _endings(rounds: list[dict[str, Any]], kinds: list[tuple[str, str]]) -> list[str]:
    """How the disturbed runs ended. By 0: it came too late, did not reach the stage, or left disk enough."""
    codes = sorted({r["code"] for r in rounds})
    counts = Counter(((r["through"], r["accident"]), r["code"]) for r in rounds)
    lines = [
        "| the disturbed run ended by | " + " | ".join(map(_named, codes)) + " |",
        "|---|" + "--:|" * len(codes),
    ]
    for kind in kinds:
        cells = (str(counts[kind, code] or "") for code in codes)
        lines.append(f"| {'dvc: ' * (kind[0] == 'dvc')}{kind[1]} | {' | '.join(cells)} |")
    return lines


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def tally(rounds: list[Round]) -> dict[str, int]:
    return {
        "different": sum(bool(r.different) for r in rounds),
        "litter": sum(bool(r.litter) for r in rounds),
        "ours": sum(r.ours is not None for r in rounds),
        "of_others": sum(r.of_others for r in rounds),
        "again": sum(r.tries > 1 for r in rounds),
        "torn": sum(len(r.torn) for r in rounds),
    }


def main(args: argparse.Namespace) -> int:
    """Print a line a round and the table; the number of failures."""
    began = time.monotonic()
    draw = random.Random(args.seed)
    through_dvc = args.rounds // 5 if args.dvc is None else args.dvc
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    undisturbed = Chain(folder, draw)
    house = House(folder, undisturbed) if through_dvc else None
    rounds: list[Round] = []
    for real, stage, accident in plan(undisturbed.stages, args.rounds, through_dvc, draw):
        if accident == "disk full" and undisturbed.no_disk:
            continue
        if rounds and time.monotonic() - began > 60 * args.minutes:
            break
        place = house if real and house else undisturbed
        rounds.append(place.round(stage, accident))
        print(f"{len(rounds)}: {json.dumps(asdict(rounds[-1]))}", flush=True)
        if rounds[-1].failed and not args.go_on:
            break
    found = {
        "rounds": [asdict(r) for r in rounds],
        "stages": [stage.name for stage in undisturbed.stages],
        "tally": tally(rounds),
        "dvc_said": dict(Counter(line for r in rounds for line in r.dvc_said)),
        "skipped": undisturbed.no_disk,
        "wall_s": time.monotonic() - began,
    }
    shown = table(found)
    print(shown)
    if args.out:
        command = (
            f"python -m tests.chaos --rounds {args.rounds} --dvc {through_dvc} --seed {args.seed}"
        )
        record.write(args.out, SCHEMA, found, artifacts.provenance(PARAMS), command, shown)
    failures = sum(r.failed for r in rounds)
    if not failures:
        shutil.rmtree(folder)
    else:
        print(f"{failures} rounds failed; kept {folder}", file=sys.stderr)
    return failures


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    made.add_argument("--rounds", type=int, default=100)
    made.add_argument("--dvc", type=int, metavar="N", help="how many of them through `dvc repro`")
    made.add_argument("--minutes", type=float, default=float("inf"), help="begin no round after")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--go-on", action="store_true", help="after a failure, too")
    made.add_argument("--out", type=Path, help="where to write, without suffix")
    return made


if __name__ == "__main__":
    sys.exit(min(1, main(parser().parse_args())))
