"""The report: what it reads, what it judges, what it shows. Every figure below is made up for these tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from pipeline.data.prepared import Prepared
from pipeline.evaluate.selection import choose
from pipeline.report import gallery, wording
from pipeline.report import page as report_page
from pipeline.report.page import markdown
from pipeline.report.raw import KEPT_SAMPLES, thin
from pipeline.report.summary import Report, Sources, summarise
from tests import command_line
from tests.test_gallery import evidence

ROOT = Path(__file__).parents[1]
OUT = Path("out")
MACHINE = {
    "cpu": "Example CPU 7",
    "isa": ["avx2", "avx512_vnni"],
    "cores": {"logical": 4, "usable": 2},
    "memory_gb": 8.2,
    "os": "Linux",
    "arch": "x86_64",
    "board": None,
    "gpu": None,
    "versions": {"python": "3.11.2", "onnxruntime": "1.32.0", "openvino": "2026.4.1"},
}
HEAD = {"machine": MACHINE, "provenance": {"params": None, "inputs": {}, "versions": {}}}
TARGETS = {  # name -> (precision asked for, precision effective, student ms, teacher ms)
    "torch-eager": ("fp32", "fp32", 3.1, 9.8),
    "ort-fp32": ("fp32", "fp32", 0.62, 4.1),
    "ort-int8": ("int8", "int8", 0.31, 2.6),
    "ov-fp32": ("fp32", "fp32", 0.58, 3.9),
    "ov-default": ("default", "bf16", 0.41, 2.2),
    "ov-int8": ("int8", "fp32", 0.59, 3.8),
}
NO_TEACHER = "int8 is built for the student only"
NO_INT8 = "fell back to fp32: top-1 falls from 0.910 to 0.889, gate 0.01"
ENABLED = [*TARGETS, "trt-fp16"]
UNMEASURED = (
    *("runtime", "precision_effective", "load_ms", "first_ms", "size_mb", "rss_mb"),
    *("params", "macs", "engine_ms"),
)
PARTS = ("read", "view", "replay", "student", "projector", "adversarial", "optimizer")
TOP1 = {"teacher": 0.9725, "plain": 0.81, "logits": 0.8625, "cakd": 0.885, "cakd+logits": 0.9025}


def score(top1: float) -> dict[str, float]:
    return {"top1": top1, "top5": 0.99, "nll": 1.4 * (1 - top1) + 0.1, "ece": 0.04, "n": 400}


def accuracy() -> dict[str, Any]:
    models: dict[str, Any] = {}
    for seed, (name, top1) in enumerate(TOP1.items()):
        student = name != "teacher"
        models[name] = {
            "clean": score(top1),
            "noisy": score(top1 - 0.12),
            "params": 1_520_906 if student else 5_526_346,
            "macs": 56_500_000 if student else 1_080_000_000,
            "seed": seed,
            "labels_seen": 50 if student else 1297,
            "labels_total": 1297,
        }
        if name.startswith("cakd"):
            models[name]["cosine"] = {"attention": 0.914, "tokens": 0.873}
    noise = ["jpeg", "shot_noise"]
    return {"schema": "cakd.accuracy/1", "noise": noise, "models": models, **HEAD}


def selection(method: str) -> dict[str, Any]:
    judged = {m: {"top1": t, "nll": 1 - t, "n": 100} for m, t in TOP1.items() if m != "teacher"}
    chosen = {"selected": method, "reason": f"best top-1 on val, {100 * TOP1[method]:.1f} %"}
    return {"schema": "cakd.selection/1", "split": "val", "methods": judged, **chosen, **HEAD}


def train_perf() -> dict[str, Any]:
    terms = {
        "plain": ["cross_entropy"],
        "logits": ["cross_entropy", "kl"],
        "cakd": ["cross_entropy", "attention", "tokens", "discriminator_accuracy"],
        "cakd+logits": ["cross_entropy", "kl", "attention", "tokens", "discriminator_accuracy"],
    }
    generator = np.random.default_rng(0)
    methods = {}
    for i, (m, names) in enumerate(terms.items()):
        steps = np.arange(0, 600, 6)
        curves = {
            t: [
                [int(s), float((0.2 + len(t) * 0.2 * np.exp(-s / (110 + 50 * i))) * (1 + 0.04 * e))]
                for s, e in zip(steps, generator.standard_normal(len(steps)), strict=True)
            ]
            for t in names
        }
        methods[m] = {
            "img_per_s": {"median": 410.0, "iqr": 12.0},
            "stage_ms": {**dict.fromkeys(PARTS, 0.0), "student": 40.0, "optimizer": 3.0},
            "stall_fraction": 0.02,
            "peak_mb": 812.0,
            "steps": 600,
            "batch": 64,
            "curves": curves,
        }
    made_by = dict.fromkeys(methods, HEAD["provenance"])
    return {"schema": "cakd.train_perf/1", "methods": methods, **HEAD, "provenance": made_by}


def bench_row(
    target: str, model: str, threads: int, asked: str, got: str, ms: float
) -> dict[str, Any]:
    samples = ms * (1 + 0.05 * np.random.default_rng(int(ms * 1000)).exponential(size=400))
    quantiles = dict(zip(("p50", "p90"), np.quantile(samples, (0.5, 0.9)).tolist(), strict=True))
    return {
        "model": model,
        "artefact": f"{model}.onnx",
        "target": target,
        "runtime": "onnxruntime 1.32.0",
        "threads": threads,
        "batch": 1,
        "status": "measured",
        "reason": None,
        "precision_requested": asked,
        "precision_effective": got,
        "wall_ms": {
            **quantiles,
            "p99": None,
            "min": float(samples.min()),
            "n": 400,
            "p50_ci": None,
        },
        "cpu_ms": {"p50": ms},
        "load_ms": 12.0,
        "first_ms": 3.0,
        "size_mb": 1.6 if got == "int8" else 6.1,
        "rss_mb": 120.0,
        "params": None,
        "macs": None,
        "engine_ms": None,
        "flags": [],
        "samples_ms": samples.tolist(),
    }


def skipped_row(target: str, model: str, threads: int, asked: str, reason: str) -> dict[str, Any]:
    wall: dict[str, Any] = {**dict.fromkeys(("p50", "p90", "p99", "min", "p50_ci")), "n": 0}
    row: dict[str, Any] = dict.fromkeys(UNMEASURED)
    row |= {"model": model, "artefact": f"{model}.onnx", "target": target, "threads": threads}
    row |= {"batch": 1, "status": "skipped", "reason": reason, "precision_requested": asked}
    row |= {"wall_ms": wall, "cpu_ms": {"p50": None}}
    return {**row, "flags": [], "samples_ms": []}


def bench(target: str) -> dict[str, Any]:
    asked, got, student, teacher = TARGETS.get(target, ("fp16", "", 0.0, 0.0))
    rows = []
    for threads in (1, 2):
        for model, ms in (("student", student), ("teacher", teacher)):
            reason = left_out(target, model)
            rows.append(
                skipped_row(target, model, threads, asked, reason)
                if reason
                else bench_row(target, model, threads, asked, got, ms / threads**0.5)
            )
    return {"schema": "cakd.bench/2", "target": target, "rows": rows, **HEAD}


def left_out(target: str, model: str) -> str | None:
    """Why a model is not built for a target."""
    if target not in TARGETS:
        return "no module named tensorrt"
    return NO_TEACHER if target.endswith("int8") and model == "teacher" else None


def build(target: str) -> tuple[dict[str, Any], dict[str, Any]]:
    asked, got, *_ = TARGETS.get(target, ("fp16", None))
    models, rows = {}, []
    for model in ("student", "teacher"):
        out, name = left_out(target, model), f"{model}.onnx"
        fallen = got and asked not in (got, "default")
        models[model] = {
            "status": "skipped" if out else "built",
            "reason": out or (NO_INT8 if fallen else None),
            "artefact": None if out else name,
            "precision_requested": asked,
            "precision_effective": None if out else got,
            "size_mb": None if out else 6.1,
            "seconds": None if out else 1.0,
        }
        rows.append(parity_row(name, got or asked, "skipped" if out else "PASS"))
        if fallen and not out:
            rows.append(parity_row(f"{model}-int8.onnx", "int8", "REJECTED"))
    head = {"target": target, **HEAD}
    return (
        {"schema": "cakd.build/1", "models": models, **head},
        {"schema": "cakd.parity/1", "rows": rows, **head},
    )


def parity_row(artifact: str, precision: str | None, verdict: str) -> dict[str, Any]:
    return {
        "artifact": artifact,
        "runtime": "onnxruntime 1.32.0",
        "precision_effective": precision,
        "max_abs": 1e-7,
        "rel_between_std": 2e-8,
        "sqnr_centered_db": 120.0 if precision == "fp32" else 31.0,
        "top1_agreement": 1.0,
        "verdict": verdict,
        "reason": None if verdict == "PASS" else NO_INT8,
        **({"top1_drop": 0.004} if precision == "int8" else {}),
    }


class Run:
    """The files of one made-up run in a folder, to be changed and reported on."""

    def __init__(self, folder: Path, prepared: Path) -> None:
        self.folder, self.prepared = folder, prepared
        self.write("evidence.json", evidence(Prepared.open(prepared)))
        self.write("accuracy.json", accuracy())
        self.write("selection.json", selection("cakd"))
        self.write("train_perf.json", train_perf())
        self.write("device.json", {"schema": "cakd.device/1", **HEAD})
        for target in ENABLED:
            self.write(f"bench/{target}.json", bench(target))
            for name, value in zip(("build", "parity"), build(target), strict=True):
                self.write(f"build/{target}/{name}.json", value)
        self.params({})

    def write(self, name: str, value: dict[str, Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    def read(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.folder / name).read_text())
        return value

    def params(self, budgets: dict[str, float]) -> None:
        self.write(
            "params.yaml",
            {
                "report": {"title": "Digits at the edge", "budgets": budgets},
                "bench": {"enabled": ENABLED},
            },
        )


@pytest.fixture
def run(tmp_path: Path, digits: Path) -> Run:
    return Run(tmp_path, digits)


def stage(run: Run, *options: Any, **environment: str) -> CompletedProcess[str]:
    names = ("accuracy.json", "selection.json", "train_perf.json", "build", "bench")
    inputs = [run.folder / n for n in names]
    outputs = [OUT / n for n in ("edge.json", "parity.json", "edge.md", "index.html")]
    seen = [run.folder / "device.json", run.prepared, run.folder / "evidence.json"]
    paths = [*inputs, *seen, *(run.folder / o for o in outputs)]
    return command([*paths, "--params", run.folder / "params.yaml", *options], **environment)


def command(arguments: list[Any], **environment: str) -> CompletedProcess[str]:
    run = command_line.process if environment else command_line.here
    return run("stages.report", *arguments, **environment)


def summary(
    run: Run, budgets: dict[str, float] | None = None, curves: Path | None = None
) -> dict[str, Any]:
    names = ("accuracy.json", "selection.json", "train_perf.json", "build", "bench", "device.json")
    sources = Sources(*(run.folder / name for name in names), curves)
    return summarise(sources, ENABLED, Report(budgets=budgets or {}))


def change_row(run: Run, target: str, **values: Any) -> None:
    """Change the student's one-thread row of a target."""
    found = run.read(f"bench/{target}.json")
    found["rows"][0].update(values)
    run.write(f"bench/{target}.json", found)


def cells(text: str, first: str) -> list[str]:
    """The cells of the Markdown row that begins with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_a_run_becomes_its_four_files(run: Run) -> None:
    run.params({"top1_min": 0.85, "ort-fp32.wall_ms_max": 1.0})
    done = stage(run)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1 and "index.html" in done.stdout and "PASS" in done.stdout
    edge, parity = run.read("out/edge.json"), run.read("out/parity.json")
    assert edge["schema"] == "cakd.edge/1" and edge["machine"] == MACHINE
    assert [t["target"] for t in edge["targets"]] == ENABLED
    assert edge["verdict"]["status"] == "PASS"
    assert parity["schema"] == "cakd.parity/1" and len(parity["rows"]) == 2 * len(ENABLED) + 1
    assert {"target", "artifact", "verdict"} <= parity["rows"][0].keys()
    assert (run.folder / "out/edge.md").read_text().startswith("**PASS**: cakd reaches 88.5 %")


def test_the_same_files_make_the_same_bytes(run: Run) -> None:
    pages = []
    for seed in ("1", "2"):
        assert stage(run, PYTHONHASHSEED=seed).returncode == 0
        pages.append([(run.folder / OUT / n).read_bytes() for n in ("edge.json", "index.html")])
    assert pages[0] == pages[1]


def test_a_broken_budget_fails_after_the_report_is_written(run: Run) -> None:
    run.params({"top1_min": 0.95})
    done = stage(run)
    assert done.returncode == 3
    assert "budget top1_min: got 0.885, limit 0.95" in done.stderr
    assert (run.folder / "out/edge.md").read_text().startswith("**FAIL**")
    assert '<strong class="FAIL">FAIL</strong>' in (run.folder / "out/index.html").read_text()


@pytest.mark.parametrize(
    ("precision", "verdict", "status"),
    [("fp32", "FAIL", "FAIL"), ("fp32", "UNDECIDED", "PASS"), ("int8", "FAIL", "PASS")],
)
def test_only_a_failed_fp32_parity_fails_the_report(
    run: Run, precision: str, verdict: str, status: str
) -> None:
    found = run.read("build/ort-fp32/parity.json")
    found["rows"][0] |= {"precision_effective": precision, "verdict": verdict, "reason": "7e-2"}
    run.write("build/ort-fp32/parity.json", found)
    edge = summary(run)
    assert edge["verdict"]["status"] == status
    assert any(f"parity {verdict}" in note for note in edge["verdict"]["notes"])
    assert cells(markdown([edge]), "ort-fp32")[6] == verdict


def test_the_parity_shown_is_that_of_the_artefact_that_ships(run: Run) -> None:
    found = run.read("build/ov-int8/parity.json")
    found["rows"].reverse()
    run.write("build/ov-int8/parity.json", found)
    text = markdown([summary(run)])
    assert cells(text, "ov-int8")[6] == "PASS"
    assert cells(text, "ort-int8")[6] == "PASS, top-1 −0.4 points"
    assert cells(text, "trt-fp16")[6] == "skipped"


def test_a_target_that_is_not_enabled_leaves_no_trace(run: Run) -> None:
    change_row(run, "ov-fp32", flags=["NOISY", "load"])
    params = run.read("params.yaml")
    run.write("params.yaml", {**params, "bench": {"enabled": ["ort-fp32", "ort-int8"]}})
    assert stage(run).returncode == 0
    for name in ("edge.json", "parity.json", "edge.md", "index.html"):
        assert "ov-" not in (run.folder / OUT / name).read_text()


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ({"top1_mim": 0.9}, "did you mean 'top1_min'?"),
        ({"ort-fp23.wall_ms_max": 1}, "did you mean 'ort-fp32'?"),
        ({"ort-fp32.top1_min": 0.9}, "expected 'top1_min'"),
        ({"top1_min": 90}, "0.9 for 90 %"),
        ({"gain_min": 101}, "got gain_min 101.0; expected points, -100 to 100"),
        ({"ort-fp32.gain_min": 1}, "expected 'gain_min'"),
        ({"wall_ms_max": 0}, "budgets: got wall_ms_max 0.0; expected above 0"),
        ({"top1_min": "high"}, "budgets.top1_min: got 'high'; expected a number"),
    ],
)
def test_a_wrong_budget_is_refused_before_anything_is_written(
    run: Run, budgets: dict[str, Any], said: str
) -> None:
    run.params(budgets)
    done = stage(run)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (run.folder / OUT).exists()


def test_a_method_that_was_not_evaluated_is_refused_with_the_nearest(run: Run) -> None:
    run.write("selection.json", {**selection("cakd"), "selected": "cakb"})
    done = stage(run)
    assert done.returncode == 2 and "did you mean 'cakd'?" in done.stderr


@pytest.mark.parametrize(
    "name", ["accuracy.json", "bench/ort-fp32.json", "build/ov-fp32/parity.json"]
)
def test_a_missing_or_foreign_file_is_named_in_one_line(run: Run, name: str) -> None:
    run.write(name, {"schema": "other/1"})
    done = stage(run)
    assert done.returncode == 2 and name in done.stderr and "other/1" in done.stderr
    (run.folder / name).unlink()
    done = stage(run)
    assert done.returncode == 2 and "no such file" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("budget", "limit", "value", "verdict"),
    [
        ("top1_min", 0.885, 0.885, "PASS"),
        ("top1_min", 0.886, 0.885, "FAIL"),
        ("gain_min", 7.5, 7.5, "PASS"),
        ("gain_min", 7.6, 7.5, "FAIL"),
        ("params_max", 1_520_905, 1_520_906, "FAIL"),
        ("size_mb_max", 1.6, 1.6, "PASS"),  # the smallest measured target: ort-int8
        ("ort-fp32.size_mb_max", 1.6, 6.1, "FAIL"),
        ("trt-fp16.wall_ms_max", 9.0, None, "NOT MEASURED"),
    ],
)
def test_a_budget_is_judged_on_its_figure(
    run: Run, budget: str, limit: float, value: float | None, verdict: str
) -> None:
    edge = summary(run, {budget: limit})
    (found,) = edge["budgets"]
    assert (found["value"], found["verdict"]) == (value, verdict)
    target = budget.rpartition(".")[0] or "ort-int8"
    of_target = budget.endswith(("size_mb_max", "wall_ms_max")) and value is not None
    assert found["what"].endswith(f" of {target}") == of_target
    assert (edge["verdict"]["status"] == "FAIL") == (verdict in ("FAIL", "NOT MEASURED"))


@pytest.mark.parametrize(
    ("flags", "fastest", "verdict"),
    [([], 0.9, "FAIL"), (["NOISY", "load"], 0.9, "INCONCLUSIVE"), (["NOISY", "load"], 1.1, "FAIL")],
)
def test_noise_alone_breaks_no_latency_budget(
    run: Run, flags: list[str], fastest: float, verdict: str
) -> None:
    wall = {"p50": 1.2, "p90": None, "p99": None, "min": fastest, "n": 90, "p50_ci": None}
    change_row(run, "ort-fp32", wall_ms=wall, flags=flags)
    edge = summary(run, {"ort-fp32.wall_ms_max": 1.0})
    assert edge["budgets"][0]["verdict"] == verdict
    assert (edge["verdict"]["status"] == "PASS") == (verdict == "INCONCLUSIVE")


def test_the_speed_up_is_a_ratio_of_one_run_at_the_fewest_threads(run: Run) -> None:
    rows = run.read("bench/ov-default.json")["rows"]
    edge = summary(run)
    ratio = rows[1]["wall_ms"]["p50"] / rows[0]["wall_ms"]["p50"]
    assert rows[1]["model"] == "teacher" and rows[1]["threads"] == 1
    assert edge["targets"][4]["speedup"] == pytest.approx(ratio)
    assert cells(markdown([edge]), "ov-default")[3] == f"{ratio:.2f}"


def test_what_was_not_measured_says_so(run: Run) -> None:
    text = markdown([summary(run)])
    row = cells(text, "trt-fp16")
    assert row[1:4] == ["not measured"] * 3 and row[5] == "not measured"
    assert row[7] == "skipped: no module named tensorrt"
    assert "None" not in text and "None" not in report_page.page([summary(run)])


def test_a_row_says_what_it_computes_in_and_why_not_what_was_asked(run: Run) -> None:
    text = markdown([summary(run)])
    assert cells(text, "ov-default")[4] == "bf16"
    assert cells(text, "ov-int8")[4] == "fp32 (requested int8)"
    assert cells(text, "ov-int8")[7] == f"student {NO_INT8}; teacher skipped: {NO_TEACHER}"
    assert f"- ov-int8 student: {NO_INT8}" in text and f"teacher: skipped, {NO_TEACHER}" not in text


def test_a_teacher_in_another_precision_is_told_beside_the_ratio(run: Run) -> None:
    change_row(run, "ort-fp32", precision_effective="bf16", precision_requested="bf16")
    assert cells(markdown([summary(run)]), "ort-fp32")[4] == "bf16 (teacher fp32)"


def test_a_noisy_row_is_marked_explained_and_counted(run: Run) -> None:
    change_row(run, "ort-fp32", flags=["NOISY", "cpu/wall 0.71 below 0.9"])
    text = markdown([summary(run)])
    row = cells(text, "ort-fp32")
    assert [cell.endswith(" NOISY") for cell in row[1:4]] == [True, False, True]
    assert cells(text, "ort-fp32")[7].startswith(
        "student measured, NOISY: cpu/wall 0.71 below 0.9;"
    )
    assert "- 1 of 14 rows are NOISY" in text


def test_students_stand_beside_the_teacher_with_labels_and_points(run: Run) -> None:
    text = markdown([summary(run)])
    row = cells(text, "cakd (exported)")
    assert row[1] == "50 of 1,297" and row[2] == "88.5 ± 1.6"
    assert row[-2:] == ["+7.5", "+2.2"]
    assert cells(text, "logits")[-2:] == ["+5.2", "–"]
    assert cells(text, "teacher")[-2:] == ["–", "–"]
    assert "The teacher used 1,297 of 1,297 labels (100.0 %)." in text
    assert "plain, logits, cakd and cakd+logits used 50 of 1,297 labels (3.9 %)." in text
    assert "cakd attention 0.914, tokens 0.873" in text
    assert "Noisy: every test image with each of jpeg, shot noise." in text


def differences(**points: tuple[float, float, float]) -> dict[str, Any]:
    """`against` of accuracy.json: baseline to points, low and high."""
    keys = ("points", "low", "high")
    counts = {"better": 9, "worse": 9}
    return {b: {**counts, **dict(zip(keys, values, strict=True))} for b, values in points.items()}


def weak_teacher(shipped: str, top1: float, *interval: float) -> dict[str, Any]:
    """Figures of the field: the teacher below plain; the exported student `top1`."""
    found = accuracy()
    for name, figure in {"teacher": 0.688, "plain": 0.731, shipped: top1}.items():
        found["models"][name]["clean"]["top1"] = figure
    if interval:
        found["models"][shipped]["against"] = differences(plain=(100 * top1 - 73.1, *interval))
    return found


def test_a_student_that_gained_nothing_is_never_shipped_under_a_green_pass(run: Run) -> None:
    run.write("accuracy.json", weak_teacher("cakd", 0.715, -4.0, 0.9))
    done = stage(run)
    assert done.returncode == 0 and "NO GAIN" in done.stdout
    first = (run.folder / "out/edge.md").read_text().splitlines()[0]
    assert first.startswith("**NO GAIN**: cakd reaches 71.5 % clean top-1, −1.6 \\[−4.0, ")
    assert "+0.9\\] points against plain" in first and "(teacher 68.8 %)" in first
    assert "the teacher is not better than plain (73.1 %)" in first
    assert "cakd is not better than plain" in first
    assert (
        "a stronger or pretrained teacher (RECIPE=imagefolder), or more unlabelled images, or export plain"
        in first
    )
    page = (run.folder / "out/index.html").read_text()
    assert '<strong class="NO-GAIN">NO GAIN</strong>' in page and ".NO-GAIN," in page
    assert '<strong class="PASS">PASS</strong>:' not in page


@pytest.mark.parametrize(
    ("teacher", "against", "status", "reasons"),
    [
        (0.97, {"plain": (3.0, 0.4, 5.6)}, "PASS", []),
        (0.97, {"plain": (3.0, -0.1, 6.1)}, "NO GAIN", ["cakd is not better than plain"]),
        (0.73, {"plain": (3.0, 0.4, 5.6)}, "NO GAIN", ["the teacher is not better than plain"]),
        (
            0.97,
            {"plain": (9.0, 5.0, 13.0), "control": (0.5, -2.0, 3.0)},
            "NO GAIN",
            ["cakd is not better than its control control, +0.5 [−2.0, +3.0] points"],
        ),
    ],
)
def test_no_gain_is_a_teacher_or_an_interval_that_is_not_above(
    run: Run,
    teacher: float,
    against: dict[str, tuple[float, float, float]],
    status: str,
    reasons: list[str],
) -> None:
    found = accuracy()
    found["models"]["teacher"]["clean"]["top1"] = teacher
    found["models"]["cakd"]["against"] = differences(**against)
    run.write("accuracy.json", found)
    verdict = summary(run)["verdict"]
    assert verdict["status"] == status and len(verdict["no_gain"]) == len(reasons)
    for reason, start in zip(verdict["no_gain"], reasons, strict=True):
        assert reason.startswith(start)
    assert not verdict["failures"]


def test_a_run_whose_teacher_is_weak_ships_plain_says_why_and_fails_a_gate_of_its_gain(
    run: Run,
) -> None:
    models = weak_teacher("cakd", 0.715)["models"]
    judged = {m: {"top1": f["clean"]["top1"], "nll": 1.0, "n": 400} for m, f in models.items()}
    for method in ("teacher", "logits", "cakd+logits"):
        del judged[method]
    chosen, reason = choose(judged)
    assert chosen == "plain"
    run.write("accuracy.json", weak_teacher("cakd", 0.715))
    run.write("selection.json", {**selection("plain"), "reason": reason})
    run.write("evidence.json", evidence(Prepared.open(run.prepared), "plain"))
    assert stage(run).returncode == 0
    first = (run.folder / "out/edge.md").read_text().splitlines()[0]
    assert first.startswith("**NO GAIN**: plain reaches 73.1 % clean top-1 (teacher 68.8 %)")
    assert "plain is exported (best top-1 on val, 73.1 % of 400 images)" in first
    assert (
        "; use a stronger or pretrained teacher (RECIPE=imagefolder), or more unlabelled images."
        in first
    )
    run.params({"gain_min": 1.0})
    done = stage(run)
    assert done.returncode == 3
    assert "budget gain_min: got 0.0, limit 1.0" in done.stderr
    assert (run.folder / "out/edge.md").read_text().startswith("**FAIL**: plain reaches")


def test_a_run_without_plain_cannot_keep_a_gain(run: Run) -> None:
    found = accuracy()
    del found["models"]["plain"]
    run.write("accuracy.json", found)
    edge = summary(run, {"gain_min": 0.5})
    assert edge["verdict"]["status"] == "FAIL" and edge["verdict"]["no_gain"] == []
    assert edge["budgets"][0]["verdict"] == "NOT MEASURED"
    assert "against plain" not in wording.headline(edge)


def test_the_report_says_why_a_student_is_exported_and_how_sure_its_teacher_is(run: Run) -> None:
    edge = summary(run)
    assert "R12" not in markdown([edge]) and "Exported: cakd, best top-1" in markdown([edge])
    trained = train_perf()
    trained["methods"]["plain"]["teacher_r12"] = None
    trained["methods"]["cakd"]["teacher_r12"] = {"mean": 2.7439, "views": 10376}
    run.write("train_perf.json", trained)
    edge = summary(run)
    for text in (markdown([edge]), report_page.page([edge])):
        assert "R12 of the teacher: 2.74, its largest raw logit over the second largest" in text
        assert "mean of 10,376 cached views" in text and "arXiv 2605.15689" in text


def test_the_table_has_each_control_with_its_interval(run: Run) -> None:
    found = accuracy()
    found["models"]["cakd"]["against"] = differences(plain=(7.5, 3.1, 11.9), control=(5, 1, 9))
    run.write("accuracy.json", found)
    text = markdown([summary(run)])
    row = [cell.replace("\\", "") for cell in cells(text, "cakd (exported)")]
    assert row[-3:] == ["+7.5 [+3.1, +11.9]", "+2.2", "+5.0 [+1.0, +9.0]"]
    assert cells(text, "logits")[-3:] == ["+5.2", "–", "–"]
    assert "against control (points)" in text


def test_a_shipped_student_below_its_baseline_is_told(run: Run) -> None:
    found = accuracy()
    found["models"]["cakd"]["clean"]["top1"] = 0.80
    run.write("accuracy.json", found)
    assert "the exported cakd is 6.2 points below logits" in summary(run)["verdict"]["notes"]


def test_names_and_reasons_cannot_leave_their_place(run: Run) -> None:
    evil = "x|y `z` <script>alert(1)</script>\n# $w$ [a](b) *c* &amp; "
    bench = run.read("bench/ort-fp32.json")
    bench["rows"][0] = skipped_row("ort-fp32", "student", 1, "fp32", evil)
    run.write("bench/ort-fp32.json", bench)
    found = accuracy()
    found["models"][evil] = found["models"].pop("plain")
    run.write("accuracy.json", found)
    perf = train_perf()
    perf["methods"][evil] = perf["methods"].pop("plain")
    perf["methods"][evil]["curves"][evil] = [[0, 1.0], [1, 0.5]]
    run.write("train_perf.json", perf)
    edge = summary(run)
    text, page = markdown([edge]), report_page.page([edge])
    assert len({len(cells(text, t)) for t in ENABLED}) == 1
    for character in "<`$[*#":
        assert not re.search(rf"(?<!\\)\{character}\s*(script|z|w|a|c|\\\$)", text)
    assert "<script" not in page and "alert(1)" in page
    assert "script" not in Tags(page).tags


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]


def test_the_page_needs_nothing_but_itself(run: Run) -> None:
    page = report_page.page([summary(run), summary(run)])
    parsed = Tags(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    links = [v for k, v in parsed.attributes if k in ("href", "xlink:href", "src")]
    assert links and all(v.startswith("#") for v in links)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in parsed.attributes


def test_the_gallery_brings_its_pictures_along_and_no_name_leaves_its_place(run: Run) -> None:
    prepared = Prepared.open(run.prepared)
    evil = "<img src=x onerror=alert(1)>"
    shown = gallery.gallery(evidence(prepared), prepared, "cakd")
    shown["data"]["classes"][0] = shown["mistakes"]["names"][0] = evil
    shown["mistakes"]["surest"][0]["origin"] = shown["attention"]["images"][0]["name"] = evil
    page = report_page.page([summary(run)], shown)
    parsed = Tags(page)
    sources = [v for k, v in parsed.attributes if k == "src"]
    assert len(sources) == 3 + 1 + 3 * 3 + 10 * gallery.SAMPLES
    assert all(v.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for v in sources)
    assert "onerror" not in {k for k, _ in parsed.attributes} and evil not in page
    for section in ("Mistakes", "Attention", "Data"):
        assert f"<h2>{section}</h2>" in page


def test_a_page_of_several_machines_has_no_gallery(run: Run) -> None:
    assert "<h2>Data</h2>" not in report_page.page([summary(run), summary(run)])


def test_pictures_on_one_page_share_no_id(run: Run) -> None:
    parsed = Tags(report_page.page([summary(run), summary(run)]))
    ids = [v for k, v in parsed.attributes if k == "id"]
    assert ids and len(ids) == len(set(ids))
    used = {v[1:] for k, v in parsed.attributes if k == "xlink:href"}
    used |= {i for _, v in parsed.attributes for i in re.findall(r"url\(#([^)]+)\)", v)}
    assert used <= set(ids)


def test_a_run_without_measurements_still_has_a_report(run: Run) -> None:
    for target in ENABLED:
        run.write(f"bench/{target}.json", {**bench("trt-fp16"), "target": target})
    run.write("train_perf.json", {**train_perf(), "methods": {}})
    edge = summary(run)
    assert "cakd reaches" in markdown([edge]) and "<svg" not in report_page.page([edge])


def test_a_difference_of_nothing_has_no_minus() -> None:
    shown = [wording.points(v) for v in (-0.0, -0.04, -0.06, 1.26, None)]
    assert shown == ["+0.0", "+0.0", "−0.1", "+1.3", "–"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0834, "0.0834"), (0.5, "0.500"), (12.345, "12.3"), (1234.5, "1,234"), (0.0, "0")],
)
def test_a_figure_has_three_digits_and_no_exponent(value: float, shown: str) -> None:
    assert wording.figure(value) == shown


def test_thinned_samples_keep_their_extremes_and_their_order() -> None:
    samples = np.random.default_rng(0).permutation(1000).astype(float).tolist()
    kept = thin(samples)
    assert len(kept) == KEPT_SAMPLES and kept == sorted(kept)
    assert (kept[0], kept[-1]) == (0.0, 999.0)
    assert thin([3.0, 1.0]) == [1.0, 3.0]


def board(run: Run, name: str = "student.onnx") -> Path:
    """A bench JSON as `exporters.bench --json` writes it on another machine."""
    found = bench("ort-fp32")
    for row in found["rows"]:
        row["model"] = name if row["model"] == "student" else "teacher.onnx"
    found["machine"] = {**MACHINE, "board": "Example Board Nano"}
    run.write("board.json", found)
    return run.folder / "board.json"


def test_merged_machines_share_one_table(run: Run) -> None:
    assert stage(run).returncode == 0
    edge = run.folder / OUT / "edge.json"
    done = command(["--merge", edge, board(run)])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("**PASS** on Example CPU 7")
    assert "**NOT JUDGED** on Example Board Nano" in done.stdout
    assert cells(done.stdout, "Example Board Nano, 2 of 4 cores")[1] == "ort-fp32"
    assert done.stdout.count("| Example CPU 7, 2 of 4 cores | ") == len(ENABLED)
    done = command(["--merge", edge, board(run), "--out", run.folder / "both"])
    page = (run.folder / "both/index.html").read_text()
    assert done.returncode == 0 and page.count("Latency distribution") == 2


def test_merge_repeats_a_failed_verdict(run: Run) -> None:
    run.params({"top1_min": 0.95})
    assert stage(run).returncode == 3
    done = command(["--merge", run.folder / OUT / "edge.json", board(run)])
    assert done.returncode == 3 and done.stdout.startswith("**FAIL**")


def test_merge_refuses_what_it_cannot_place(run: Run) -> None:
    done = command(["--merge", run.folder / "accuracy.json"])
    assert done.returncode == 2
    assert "expected one of cakd.edge/1, cakd.bench/2, cakd.bundle-bench/1" in done.stderr
    done = command(["--merge", board(run, "mobilenet.onnx")])
    assert done.returncode == 2 and "'mobilenet.onnx'" in done.stderr


def test_the_report_needs_no_torch(run: Run) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import stages.report\n"
        "from pipeline.report import adapters, history, page, pareto, summary, verdict"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
