"""Finished runs of a recipe in git, a small JSON each: evidence that grows from day to day and machine to machine.

`benchmarks/results/runs/<recipe>/<method>-<seed>.json` holds the figures of one student, the settings that decide
them with their hash, the hash of the teacher's weights, the machine and the commit. A run is identified by its
settings and its teacher, not by code, machine or memory format: an edit of the code does not throw the evidence of
weeks away, and each file says which commit made it. A setting that did not exist yet counts as its default. A run
of other settings is refused, never mixed in; methods may differ in what is tuned for each, not in what all share.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import record
from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.distill.methods.table import TERMS, WITHOUT_LOSS, reads, terms_of
from pipeline.distill.settings import Distill
from pipeline.evaluate.accuracy import Evaluate
from pipeline.prepare.settings import Prepare
from pipeline.store.policy import Cache

SCHEMA = "cakd.run/1"
FOLDER = Path("benchmarks/results/runs")
NAME = re.compile(r"(?P<method>.+)-(?P<seed>\d+)\.json")
Run = dict[str, float]
# Of `distill`: which methods, their terms (kept beside), and what changes no figure.
NOT_OF_A_RUN = (
    "methods",
    "students",
    "tuned",
    "logits",
    "cakd",
    "terms",
    "workers",
    "checkpoint_every",
)
# How a step is computed, which differs between machines: a figure depends on it by rounding only.
BY_ROUNDING = ("distill.compute.device", "distill.compute.channels_last", "distill.compute.compile")
SEED = "distill.seed"
# What all runs of a table share, whatever their method: images, labels, views, judging, steps and student.
SHARED = re.compile(
    r"(prepare|cache|evaluate)\.|distill\.(steps|epochs|batch|student|student_kwargs)\b"
)


@dataclass(frozen=True)
class Identity:
    """What decides the figures of one run, but for code and machine."""

    settings: dict[str, Any]  # the sections of the recipe, without paths of a machine
    teacher: str | None  # SHA-256 of its weights; None where the method reads no teacher

    def sha256(self) -> str:
        """A short name for it."""
        return artifacts.digest(asdict(self))


def identity(
    params: Mapping[str, Any], settings: Distill, method: str, seed: int, teacher: str
) -> Identity:
    """The identity of a method's run: of the terms' settings only its own; a teacher only where it reads one."""
    own = {"cakd" if t in WITHOUT_LOSS else TERMS[t][1] for t in terms_of(method)}
    distill = {k: v for k, v in asdict(settings).items() if k not in NOT_OF_A_RUN}
    sections = {
        "prepare": {k: v for k, v in params["prepare"].items() if k != "path"},
        "cache": {k: params["cache"][k] for k in ("views", "geometry", "seed")},
        "evaluate": {k: v for k, v in params["evaluate"].items() if k != "device"},
        "distill": {**distill, "seed": seed, "own": {k: asdict(settings.of_term(k)) for k in own}},
    }
    plain: dict[str, Any] = json.loads(json.dumps(sections))  # tuples as they are read back
    return Identity(plain, teacher if reads(method, "teacher") else None)


def identity_of_teacher(params: Mapping[str, Any], teacher: str) -> Identity:
    """The identity of the teacher's own figures."""
    sections = {
        "prepare": {k: v for k, v in params["prepare"].items() if k != "path"},
        "evaluate": {k: v for k, v in params["evaluate"].items() if k != "device"},
    }
    return Identity(sections, teacher)


@cache
def defaults() -> dict[str, Any]:
    """Every setting that has a default, by its dotted name."""
    distill = Distill(methods=("plain",), student="", steps=1)
    terms = {"logits": distill.logits, "cakd": distill.cakd, **vars(distill.terms)}
    own = {name: asdict(term) for name, term in terms.items()}
    sections = {
        "prepare": asdict(Prepare("digits")),
        "cache": asdict(Cache()),
        "evaluate": asdict(Evaluate()),
        "distill": {**asdict(distill), "own": own},
    }
    return _flat(json.loads(json.dumps(sections)))


@dataclass(frozen=True)
class Ledger:
    """The runs of one recipe in `folder`."""

    folder: Path

    def path(self, method: str, seed: int) -> Path:
        """The file of a run."""
        return self.folder / f"{method}-{seed}.json"

    def read(self, method: str, seed: int, expected: Identity) -> Run | None:
        """The figures of a run; None where there is none.

        Raises UserError: a run of this method with other settings, a run that differs in what a table shares.
        """
        own, figures = self.path(method, seed), None
        for path in sorted(self.folder.glob("*.json")):
            entry = artifacts.read_json(path, SCHEMA)
            same = entry["method"] == method
            _check_same(path, entry, expected, None if same else SHARED, other=path != own)
            if path == own:
                figures = entry["figures"]
        return figures

    def write(self, method: str, seed: int, made_of: Identity, figures: Run) -> None:
        """Keep a finished run."""
        artifacts.write_json(
            self.path(method, seed),
            {
                "schema": SCHEMA,
                "method": method,
                "seed": seed,
                "figures": {key: round(value, 6) for key, value in figures.items()},
                "sha256": made_of.sha256(),
                **asdict(made_of),
                "machine": record.machine_line(),
                "commit": _commit(),
            },
        )

    def entries(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Every run by method and seed, in the order of their names.

        Raises UserError: a file of another name than its run, runs that do not share what those of a table do.
        """
        by_method: dict[str, dict[int, dict[str, Any]]] = {}
        sharing: list[tuple[str, Identity]] = []
        for path in sorted(self.folder.glob("*.json")):
            named = NAME.fullmatch(path.name)
            entry = artifacts.read_json(path, SCHEMA)
            if named is None or (named["method"], int(named["seed"])) != (
                entry["method"],
                entry["seed"],
            ):
                raise UserError(
                    f"{path}: got a run of {entry['method']}, seed {entry['seed']}; expected the one that it is "
                    "named after; name it so"
                )
            for method, other in sharing:
                same = method == entry["method"]
                _check_same(path, entry, other, None if same else SHARED, other=True)
            sharing.append((entry["method"], Identity(entry["settings"], entry["teacher"])))
            by_method.setdefault(entry["method"], {})[entry["seed"]] = entry
        return by_method


def _check_same(
    path: Path,
    entry: Mapping[str, Any],
    expected: Identity,
    of: re.Pattern[str] | None,
    other: bool,
) -> None:
    """Raise UserError where the teacher or a setting differs: one `of` this pattern, or any where it is None.

    Of an `other` run the seed may differ.
    """
    if (difference := _difference(entry, expected, of, {SEED} if other else set())) is not None:
        raise UserError(
            f"{path}: a run of other settings: got {difference}; runs of one table share them; move it away, "
            "or give these settings a recipe of their own"
        )


def _difference(
    entry: Mapping[str, Any], expected: Identity, of: re.Pattern[str] | None, free: set[str]
) -> str | None:
    """The first setting that differs, as `distill.lr 0.002; expected 0.004`; None where all are the same.

    Between two methods: where both have the section, and where both read a teacher.
    """
    teachers = [entry["teacher"], expected.teacher]
    if teachers[0] != teachers[1] and (of is None or None not in teachers):
        held, asked = (str(t)[:12] for t in teachers)
        return f"teacher {held}; expected {asked}"
    known, then, now = defaults(), _flat(entry["settings"]), _flat(expected.settings)
    names = {*then, *now}.difference(BY_ROUNDING, free)
    if of is not None:
        both = entry["settings"].keys() & expected.settings.keys()
        names = {name for name in names if of.match(name) and name.partition(".")[0] in both}
    for name in sorted(names):
        had, has = (settings.get(name, known.get(name)) for settings in (then, now))
        if had != has or (of is None and name not in now):
            return f"{name} {had}; expected {has}"
    return None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; a tuple and a list are one."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else key)
    return flat


def _commit() -> str:
    """The commit that made a run, with a + where the tree has changes; empty outside of git."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()
