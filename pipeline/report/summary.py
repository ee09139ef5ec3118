"""One run's figures -> one summary with its verdicts (`cakd.edge/1`): what the report shows and the gates judge.

Torch-free. The verdict is in pipeline/report/verdict.py, the charts in pipeline/report/charts, the pages in
pipeline/report/page.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic.dataclasses
from pydantic import Field, field_validator

from pipeline.core import artifacts
from pipeline.core.config import STRICT
from pipeline.core.errors import UserError, nearest
from pipeline.core.formats import BuildFile, ParityFile, Selection
from pipeline.core.students import MAIN, Students, folder_of
from pipeline.core.validation import Milliseconds, schema_name
from pipeline.report.budgets import (
    BUDGET_NAME,
    BUDGETS,
    MAX_BUDGET,
    OF_TARGET,
    check_targets,
    judge_budget,
)
from pipeline.report.family import family
from pipeline.report.formats.accuracy import Accuracy, Device, TrainPerf
from pipeline.report.formats.bench import Bench
from pipeline.report.formats.edge import Edge
from pipeline.report.formats.quantize import Quantized
from pipeline.report.raw import thin, with_curves, with_samples
from pipeline.report.verdict import MODELS, judge

SCHEMA = schema_name(Edge)
INT8 = ("steps", "method", "images", "fp32_top1", "rows", "layers", "floating")  # of quantize.json
BASELINES = ("plain", "logits")  # every method is compared with these two, in points


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Report:
    """`report:` the title, the budgets the exported student must keep, and the deadline of a call.

    A budget is `top1_min`, `gain_min` (points of clean top-1 above `plain`), `params_max`, `wall_ms_max` or
    `size_mb_max`. The last two may name a target (`ort-fp32.wall_ms_max`); without one they hold the best measured
    target.
    """

    title: str = "Student at the edge"
    budgets: dict[str, float] = Field(
        default_factory=dict, json_schema_extra={"propertyNames": {"pattern": BUDGET_NAME}}
    )
    # ms; the report shows the share of calls that took longer. It judges nothing
    deadline_ms: Milliseconds | None = None

    @field_validator("budgets")
    @classmethod
    def _check_budgets(cls, budgets: dict[str, float]) -> dict[str, float]:
        for name, limit in budgets.items():
            target, _, quantity = name.rpartition(".")
            if quantity not in BUDGETS:
                raise ValueError(f"unknown key {name!r}; {nearest(quantity, BUDGETS)}")
            if target and quantity not in OF_TARGET:
                raise ValueError(f"got {name!r}, not a figure of a target; expected {quantity!r}")
            if quantity == "top1_min" and not 0 <= limit <= 1:
                raise ValueError(f"got {name} {limit}; expected a fraction, 0.9 for 90 %")
            if quantity == "gain_min" and not -100 <= limit <= 100:
                raise ValueError(f"got {name} {limit}; expected points, -100 to 100")
            if quantity not in ("top1_min", "gain_min") and not 0 < limit <= MAX_BUDGET:
                raise ValueError(f"got {name} {limit}; expected above 0, {MAX_BUDGET:g} at most")
        return budgets


@dataclass(frozen=True)
class Sources:
    """The files of one run. `build` and `bench` are folders that hold one entry a target.

    `curves` holds a CSV a method; without it the summary has no training curves. `quantize` is quantize.json;
    without it, or without steps in it, the summary has no int8.
    """

    accuracy: Path
    selection: Path
    train_perf: Path
    build: Path
    bench: Path
    device: Path
    curves: Path | None = None
    students: Path | None = None  # read where the selection is one of several students
    quantize: Path | None = None


def summarise(sources: Sources, targets: Sequence[str], config: Report) -> dict[str, Any]:
    """Read one run, of `targets` only, and judge it by the exported student. Samples and curves are in it.

    Raises UserError: a file missing or of another schema, a method or a budget's target that is not there.
    """
    check_targets(config.budgets, targets)
    accuracy = artifacts.read(sources.accuracy, Accuracy)
    selection = artifacts.read(sources.selection, Selection)
    shipped = selection["selected"]
    if shipped not in accuracy["models"]:
        raise UserError(
            f"{sources.selection}: selected is {shipped!r}, which {sources.accuracy} does not hold; "
            f"{nearest(shipped, accuracy['models'])}; run evaluate and select again"
        )
    parity = read_parity(sources.build, targets)
    paths = {name: sources.bench / f"{name}.json" for name in targets}
    benches = {
        name: with_samples(artifacts.read(path, Bench), path, config.deadline_ms)
        for name, path in paths.items()
    }
    training = artifacts.read(sources.train_perf, TrainPerf)["methods"]
    student = selection.get("student", MAIN)
    if sources.curves is not None:
        training = with_curves(training, folder_of(sources.curves, student))
    files = ("accuracy", "selection", "train_perf", "device")
    inputs = {name: getattr(sources, name) for name in files}
    inputs |= {f"bench/{name}": path for name, path in paths.items()}
    several: dict[str, Any] = {}
    if sources.students is not None and "students" in selection:
        latencies = artifacts.read(sources.students, Students, "run the stage students again")
        several = {"student": student, "family": family(accuracy, selection, latencies)}
        inputs["students"] = sources.students
    quantized = artifacts.read(sources.quantize, Quantized) if sources.quantize else {"steps": 0}
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "title": config.title,
        "shipped": shipped,
        **several,
        "selection": {key: selection[key] for key in ("split", "methods", "reason")},
        "teacher_r12": next(filter(None, (t.get("teacher_r12") for t in training.values())), None),
        **({} if (split := accuracy.get("split", "test")) == "test" else {"split": split}),
        "noise": accuracy.get("noise", []),
        "models": compare(accuracy["models"]),
        "targets": [
            target(
                name,
                benches[name]["rows"],
                artifacts.read(sources.build / name / "build.json", BuildFile)["models"],
                [row for row in parity if row["target"] == name],
            )
            for name in targets
        ],
        "training": training,
        "parity": parity,
        "pairs": [pair for name in targets for pair in benches[name].get("pairs", [])],
        "comparisons": [],
        **({} if config.deadline_ms is None else {"deadline_ms": config.deadline_ms}),
    }
    if quantized["steps"]:
        summary["int8"] = {key: quantized[key] for key in INT8 if key in quantized}
    summary["budgets"] = [judge_budget(summary, n, limit) for n, limit in config.budgets.items()]
    return {
        **summary,
        "verdict": judge(summary),
        "machine": artifacts.read(sources.device, Device)["machine"],
        "provenance": artifacts.provenance(config.__dict__, **inputs),
    }


def read_parity(build: Path, targets: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of build/<target>/parity.json of these targets, each with its `target`."""
    rows: list[dict[str, Any]] = []
    for name in targets:
        parity = artifacts.read(build / name / "parity.json", ParityFile)["rows"]
        rows += [{**row, "target": name} for row in parity]
    return rows


def compare(models: Mapping[str, Any]) -> dict[str, Any]:
    """Each model with `points`: its clean top-1 minus that of `plain` and of `logits`, in percentage points."""
    compared = {}
    for name, model in models.items():
        others = [b for b in BASELINES if b in models and name not in ("teacher", b)]
        own = model["clean"]["top1"]
        points = {b: round(100 * (own - models[b]["clean"]["top1"]), 4) for b in others}
        compared[name] = {**model, "points": points}
    return compared


def target(
    name: str, rows: Sequence[Any], builds: Mapping[str, Any], parity: Sequence[Any]
) -> dict[str, Any]:
    """One target: its student and teacher at the fewest threads and images, and how much faster the student is.

    `speedup` is teacher p50 / student p50, both of one run; None unless both were measured.
    """
    threads, batch = min(map(_load, rows), default=(1, 1))
    first = [row for row in rows if _load(row) == (threads, batch)]
    pair = {m: _row(m, first, builds.get(m, {}), parity) for m in MODELS}
    both = [pair[m]["wall_ms"]["p50"] for m in MODELS if pair[m]["status"] == "measured"]
    return {
        "target": name,
        "threads": threads,
        **pair,
        "speedup": both[1] / both[0] if len(both) == 2 else None,
        "more_threads": [
            _without_samples(row)
            for row in rows
            if _load(row) > (threads, batch) and row["status"] == "measured"
        ],
    }


def _load(row: Mapping[str, Any]) -> tuple[int, int]:
    """Threads and images a call, what the rows of one target differ by."""
    return row["threads"], row["batch"]


def _row(
    model: str, rows: Sequence[Any], built: Mapping[str, Any], parity: Sequence[Any]
) -> dict[str, Any]:
    """The bench row of one model, with why it was built otherwise than asked and the verdict of its parity."""
    nothing: dict[str, Any] = {"model": model, "batch": 1, "status": "skipped", "flags": []}
    nothing |= {"reason": "the bench has no row of it"}
    row = next((r for r in rows if model_of(r["model"]) == model), nothing)
    own = [p for p in parity if model_of(p["artifact"]) == model]
    shipped = [p for p in own if p["artifact"] == built.get("artefact")] or own
    first: Mapping[str, Any] = next(iter(shipped), {})
    return {
        **dict.fromkeys(("size_mb", "precision_requested", "precision_effective")),
        **_without_samples(row),
        "reason": row["reason"] or built.get("reason"),
        "parity": first.get("verdict"),
        "top1_drop": first.get("top1_drop"),
        "samples_ms": thin(row.get("samples_ms", [])),
    }


def _without_samples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "samples_ms"}


def model_of(artefact: str) -> str:
    """`student-int8.onnx` -> `student`: the files of a build begin with the model's name."""
    return artefact.split(".")[0].split("-")[0]
