"""The schemas of docs/schemas: valid, true of every report file, refusing one that lost a key of the contract."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from benchmarks import schemas
from exporters.artifact.session import TARGETS
from exporters.bench import __main__ as bench_command
from exporters.bench import compare
from exporters.bundle import make
from exporters.candidates import __main__ as candidates_command
from exporters.device import timing
from pipeline.core import artifacts, formats
from pipeline.core.errors import GateFailed, UserError
from pipeline.core.students import MAIN
from pipeline.core.validation import schema_name
from pipeline.report.raw import without_raw
from stages import build, device, distill, evaluate, quantize, select, students
from tests.conftest import CNN
from tests.test_report import Run, summary

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    path.name.removesuffix(".schema.json"): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "docs" / "schemas").iterdir())
}
REPORTS = sorted((ROOT / "reports").rglob("*.json"))
CONDITIONS = ("if", "then", "else", "anyOf")  # they repeat properties to bound them, not to tell

FIGURES = "top1 top5 nll ece n"
LATENCY = (
    "model threads batch status reason precision_requested precision_effective "
    "wall_ms cpu_ms load_ms first_ms size_mb rss_mb flags"
)
PARITY = (
    "artifact runtime precision_effective max_abs rel_between_std sqnr_centered_db "
    "top1_agreement verdict"
)
TRAINING = "img_per_s stage_ms stall_fraction peak_mb"
STAGE_MS = "read view replay student projector adversarial optimizer"
FILE = "schema machine provenance"
# File -> object in it ("" is the file itself) -> the keys that others read and that are never renamed.
CONTRACT = {
    "accuracy.json": {
        "": f"{FILE} models",
        "models": "teacher",
        "models.teacher": "clean noisy params macs seed",
        "models.cakd+logits": "clean noisy params macs seed",
        "models.cakd.clean": FIGURES,
        "models.cakd.noisy": FIGURES,
    },
    "parity.json": {"": f"{FILE} rows", "rows.0": f"{PARITY} target"},
    "build/parity.json": {"": f"{FILE} target rows", "rows.0": PARITY},
    "bench/ort-fp32.json": {
        "": f"{FILE} target rows",
        "rows.0": LATENCY,
        "rows.0.wall_ms": "p50 p90 p99 min n",
        "rows.0.cpu_ms": "p50",
    },
    "bench.json": {
        "rows.0": "params macs engine_ms",
        "rows.0.wall_ms": "p50_ci",
        "rows.0.conditions": "power_mode cpu_quota",
    },
    "against.json": {
        "": f"{FILE} target rows verdict comparisons",
        "rows.1": LATENCY,
        "comparisons.0": "model target threads verdict ratio gates rounds processes process_spread",
        "comparisons.0.ratio": "median ci_low ci_high tol",
        "comparisons.0.gates.0": "name baseline candidate limit verdict",
    },
    "bundle-bench.json": {
        "": "schema bundle machine model runtime precision threads batch computes_in wall_ms cpu_ms flags",
        "wall_ms": "p50 min n",
        "warm_up": "seconds",
        "machine": "board system arch cores python numpy",
    },
    "train/cakd.json": {
        "": f"{FILE} {TRAINING}",
        "img_per_s": "median iqr",
        "stage_ms": STAGE_MS,
    },
    "train_perf.json": {
        "": f"{FILE} methods",
        "methods.plain": TRAINING,
        "methods.cakd.img_per_s": "median iqr",
        "methods.cakd.stage_ms": STAGE_MS,
    },
    "device.json": {"": FILE},
    "judged/selection.json": {
        "": f"{FILE} split methods selected reason",
        "methods.cakd": "top1 nll n",
    },
    "candidates.json": {
        "": f"{FILE} target threads image_size budget_ms rows",
        "rows.0": "name model kwargs params macs tap no_tap status reason wall_ms fits front",
    },
    "pack-bench.json": {
        "": "schema pack runtime precision image_size threads rows machine",
        "rows.0": "name status reason wall_ms flags",
    },
    "students.json": {"": "schema targets"},
    "edge.json": {"": FILE},
    "build/build.json": {"": FILE},
    "export.json": {"": FILE},
    "bundle/manifest.json": {
        "": "schema name input classes models left_out parity commands files provenance",
        "models.0": "file precision runtimes parity",
        "models.0.parity": PARITY,
        "left_out.0": "precision runtimes reason",
        "provenance": "network calibration",
    },
    "manifest.json": {
        "": "schema provenance bytes_per_view views records dtype layout fingerprint error",
        "error": "q k v h logits",
    },
}
WRONG = {  # file -> (where, a value that must be refused)
    "accuracy.json": [("schema", "cakd.accuracy/0"), ("models.cakd.clean.top1", 98.3)],
    "parity.json": [
        ("rows.0.verdict", "pass"),
        ("rows.0.top1_agreement", 100.0),
        ("rows.0.sqnr_centered_db", None),
    ],
    "bench/ort-fp32.json": [
        ("rows.0.status", "ok"),
        ("rows.0.status", "skipped"),
        ("rows.0.wall_ms.p50", None),
        ("rows.0.precision_effective", None),
        ("rows.0.flags", "NOISY"),
        ("rows", []),
        ("machine.cores.usable", 0),
        ("provenance.inputs.build", "build.json"),
    ],
    "bench.json": [
        ("rows.1.reason", None),
        ("rows.1.reason", ""),
        ("rows.1.wall_ms.p50", 0.1),
        ("rows.0.wall_ms.p50_ci", [1.0]),
        ("rows.0.macs", 1.5),
    ],
    "against.json": [
        ("verdict", "MAYBE"),
        ("comparisons", []),
        ("comparisons.0.ratio.median", "1.0"),
        ("comparisons.0.gates.0.verdict", "MAYBE"),
        ("comparisons.0.gates.0.name", "speed"),
    ],
    "bundle-bench.json": [
        ("runtime", "tflite 2.19"),
        ("runtime", "onnxruntime"),
        ("wall_ms.p50", 0),
        ("threads", 0),
        ("flags", None),
    ],
    "train/cakd.json": [
        ("stall_fraction", 4.1),
        ("stage_ms.projector", None),
        ("curves", {"gram": [1]}),
        ("losses.gram", "0.1"),
    ],
    "judged/selection.json": [("split", "test"), ("methods", {}), ("methods.cakd.top1", 98.3)],
    "candidates.json": [
        ("rows", []),
        ("rows.0.fits", "perhaps"),
        ("rows.0.wall_ms.p50", 0),
        ("rows.0.status", "ok"),
    ],
    "pack-bench.json": [("rows.0.status", "ok"), ("pack.manifest_sha256", "0")],
    "students.json": [("targets.ort-fp32.0.name", ""), ("targets.ort-fp32.0.flags", "NOISY")],
    "edge.json": [("verdict.status", "FAIL"), ("budgets.0.value", None), ("models.cakd.points", 1)],
    "build/build.json": [("models.student.artefact", None), ("models.student.status", "skipped")],
    "bundle/manifest.json": [
        ("models", []),
        ("models.0.runtimes.0", "tflite"),
        ("left_out.0.reason", None),
        ("files", {}),
        ("input.shape", [None, 3, 32]),
    ],
    "manifest.json": [("mode", "off"), ("shards", []), ("fingerprint.teacher", "vit")],
    "teacher.json": [("role", "pupil"), ("preprocess.mean", [0.5]), ("weights_sha256", "")],
}


def problems(document: dict[str, Any]) -> list[str]:
    """What a report file has against the schema that its `schema` field names."""
    named = {s["properties"]["schema"]["const"]: s for s in SCHEMAS.values()}
    if document.get("schema") not in named:
        return [f"schema is {document.get('schema')!r}; docs/schemas has {', '.join(named)}"]
    validator = Draft202012Validator(named[document["schema"]])
    errors = [f"{e.json_path}: {e.message[:200]}" for e in validator.iter_errors(document)]
    kind = next(k for k in schemas.TITLES if schema_name(k) == document["schema"])
    try:
        artifacts.check(document, kind, "file")
    except UserError:
        assert errors, "the model refuses what its schema allows"
        return errors
    assert not errors, f"the model takes what its schema refuses: {errors}"
    return errors


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="session")
def made(
    exported: Path,
    digits: Path,
    teacher_path: Path,
    features: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """Files that the code wrote just now, by name; the committed reports beside them."""
    folder = tmp_path_factory.mktemp("made")
    params = folder / "params.yaml"
    params.write_text("build: {}\n")
    device.main(Namespace(out=folder / "device.json"))
    args = Namespace(export_dir=exported, out=folder / "build", target="ort-fp32", params=params)
    build.main(args)
    student = exported / "student.onnx"
    run_bench(student, "--threads", "1,4096", "--json", folder / "bench.json")
    run_bench(student, "--self-test", "--json", folder / "against.json")
    edge = tmp_path_factory.mktemp("edge")
    make.build_bundle(student, edge, None, None)
    (folder / "bundle-bench.json").write_text(bench_on_device(edge))
    train_and_evaluate(folder, digits, teacher_path, features)
    measure_untrained(folder, digits)
    report = summary(Run(tmp_path_factory.mktemp("run"), digits), {"top1_min": 0.8})
    artifacts.write_json(folder / "edge.json", without_raw(report))
    committed = {path.relative_to(ROOT / "reports").as_posix(): path for path in REPORTS}
    fresh = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.json")}
    beside = {
        "bundle/manifest.json": edge / "manifest.json",
        "manifest.json": features / "manifest.json",
        "teacher.json": teacher_path.with_suffix(".json"),
        "export.json": exported / "export.json",
        "student.json": exported / "student.json",
    }
    return {name: read(path) for name, path in (committed | fresh | beside).items()}


def train_and_evaluate(folder: Path, digits: Path, teacher: Path, features: Path) -> None:
    """train/<method>.json of two quick trainings in `folder`, and what evaluate makes of them in judged/."""
    methods = ("plain", "cakd")
    student = {"student": "test_resnet", "student_kwargs": CNN, "steps": 21}
    cache = {"dtype": "float32", "views": 2, "shard_mb": 9}  # as the fixture `features`
    params = folder / "params-of-training.yaml"
    settings = {"distill": {"methods": methods, **student}, "cache": cache}
    settings |= {"evaluate": {"crop_pct": 1.0}, "export": {"method": "best"}, "build": {}}
    settings |= {"quantize": {"steps": 3}}
    params.write_text(json.dumps(settings))
    for method in methods:
        args = {"prepared": digits, "teacher": teacher, "features": features, "method": method}
        args |= {"out": folder / "students" / method, "work": folder / "work", "params": params}
        args |= {"student": MAIN}
        args |= {"perf": folder / "train" / f"{method}.json", "curves": folder / f"{method}.csv"}
        distill.main(Namespace(**args))
    outs = {name: folder / "judged" / f"{name}.json" for name in ("accuracy", "evidence", "perf")}
    inputs = {"prepared": digits, "teacher": teacher, "students": folder / "students"}
    evaluate.main(Namespace(**inputs, train=folder / "train", **outs, params=params))
    chosen = {"prepared": digits, "students": folder / "students", "params": params}
    selection = folder / "judged" / "selection.json"
    select.main(Namespace(**chosen, out=selection))
    outs = {"out": folder / "quantized", "figures": folder / "judged" / "quantize.json"}
    shared = {"teacher": teacher, "features": features, "work": folder / "work"}
    quantize.main(Namespace(**chosen, **shared, **outs, selection=selection))


def measure_untrained(folder: Path, digits: Path) -> None:
    """candidates.json, what a device prints of a pack of them, and students.json of the stage students."""
    work = ("--work", folder / "candidates")
    name = "test_resnet:channels=[8,12,16,24]"
    listed = ("--students", name, "--image-size", "32", "--classes", "10", *work)
    quick = ("--rounds", "5", "--seconds", "0.05")
    for more in (("--json", folder / "candidates.json"), ("--pack", folder / "pack")):
        argv = [str(a) for a in (*listed, *quick, *more)]
        candidates_command.main(candidates_command.parser().parse_args(argv))
    (folder / "pack-bench.json").write_text(bench_on_device(folder / "pack", "--bench-all"))
    params = folder / "params-of-students.yaml"
    small = {"student": "test_resnet", "student_kwargs": CNN}
    bench = {"enabled": ["ort-fp32"], "rounds": 5, "seconds_per_row": 0.05}
    params.write_text(
        json.dumps({"distill": {**small, "students": {"same": small}}, "bench": bench})
    )
    paths = {"prepared": digits, "out": folder / "students.json", "work": folder / "candidates"}
    students.main(Namespace(**paths, params=params))
    shutil.rmtree(folder / "candidates")
    shutil.rmtree(folder / "pack")


def bench_on_device(edge: Path, action: str = "--bench") -> str:
    """What the runner of a bundle prints of its quickest bench."""
    line = [sys.executable, "-m", "bundle.run", action, "--seconds", "0.05", "--json"]
    return subprocess.run(line, cwd=edge, capture_output=True, text=True, check=True).stdout


def run_bench(*argv: object) -> None:
    """exporters.bench at its quickest: what it finds does not matter here, a failed self-test neither."""
    with pytest.MonkeyPatch.context() as patch, suppress(GateFailed):
        patch.setattr(compare, "PROCESSES", 1)
        patch.setattr(compare, "ROUNDS", 2)
        patch.setattr(timing, "BLOCK_SECONDS", 0.02)
        quick = ("--rounds", "2", "--seconds", "0.1")
        bench_command.main(bench_command.parser().parse_args([str(a) for a in (*argv, *quick)]))


def parent_of(document: Any, path: str) -> tuple[Any, Any]:
    """The object or list that holds the last part of a dotted path, and that part."""
    *above, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in above:
        document = document[part]
    return document, last


def untold(schema: Any, where: str) -> Iterator[str]:
    """Properties without a description, conditions apart."""
    if isinstance(schema, list):
        for part in schema:
            yield from untold(part, where)
    if not isinstance(schema, dict):
        return
    for name, value in schema.get("properties", {}).items():
        if not value.get("description"):
            yield f"{where}.{name}"
    for key, value in schema.items():
        if key not in CONDITIONS:
            yield from untold(value, f"{where}.{key}")


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_valid_named_after_its_file_and_tells_every_property(name: str) -> None:
    schema = SCHEMAS[name]
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"{schemas.BASE}{name}.schema.json"
    assert schema["title"] and schema["description"]
    assert not list(untold(schema, name))
    assert schema["properties"]["schema"]["const"].split("/")[0] == f"cakd.{name}"
    assert "schema" in schema["required"]


def test_the_committed_schemas_are_those_of_the_models() -> None:
    texts = dict(map(schemas.schema_of, schemas.TITLES))
    folder = ROOT / "docs" / "schemas"
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == texts


@pytest.mark.parametrize("path", REPORTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_committed_report_is_what_its_schema_says(path: Path) -> None:
    assert problems(read(path)) == []


def test_what_the_code_writes_is_what_the_schemas_say(made: dict[str, dict[str, Any]]) -> None:
    assert {name: found for name, d in made.items() if (found := problems(d))} == {}
    assert [row["status"] for row in made["bench.json"]["rows"]] == ["measured", "skipped"]
    assert {d["schema"].split("/")[0] for d in made.values()} == {
        f"cakd.{name}" for name in SCHEMAS
    }


@pytest.mark.parametrize(
    ("file", "path"),
    [
        (file, f"{where}.{key}".lstrip("."))
        for file, objects in CONTRACT.items()
        for where, keys in objects.items()
        for key in keys.split()
    ],
)
def test_a_file_without_a_key_of_the_contract_is_refused(
    file: str, path: str, made: dict[str, dict[str, Any]]
) -> None:
    document = copy.deepcopy(made[file])
    parent, key = parent_of(document, path)
    del parent[key]
    assert problems(document)


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [(file, path, value) for file, wrong in WRONG.items() for path, value in wrong],
)
def test_a_file_with_a_wrong_value_is_refused(
    file: str, path: str, value: Any, made: dict[str, dict[str, Any]]
) -> None:
    document = copy.deepcopy(made[file])
    parent, key = parent_of(document, path)
    parent[key] = value
    assert problems(document)


def test_a_file_may_say_more_than_its_schema(made: dict[str, dict[str, Any]]) -> None:
    for document in made.values():
        assert problems({**document, "added_later": 1}) == []


@pytest.mark.parametrize("precision", sorted({target.precision for target in TARGETS.values()}))
def test_a_build_of_every_target_may_stand_in_build_json(precision):
    entry = {"status": "skipped", "reason": "no device", "precision_requested": precision}
    absent = ("artefact", "precision_effective", "size_mb", "seconds")
    formats.SkippedModel.model_validate(entry | dict.fromkeys(absent))
