"""int8 of six CNN families: by calibration, and by quantization-aware distillation from the same feature cache.

`python -m benchmarks.int8_families imagefolder-mini --data PATH [--families NAME ...] [--latency] [--out F]`
Images, teacher and features are made once, below .work/benchmarks. A finished family is stored, and an unfinished
training resumes. Accuracy is of the test images, in every runtime; ranges and weights see training images only.
--latency adds the paired CPU time of what is finished; it wants a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.runs import Runs, command, merged
from exporters.artifact.reference import Exported
from exporters.artifact.session import TARGETS
from exporters.bench.compare import compare_artefacts
from exporters.bench.measure import Subject
from exporters.build import Build
from exporters.open import RUNTIMES
from exporters.ort import simulated
from exporters.ort.export import Export
from exporters.parity import int8
from pipeline.core import artifacts, cli
from pipeline.core.errors import GateFailed, UserError
from pipeline.data.prepared import normalised, spread
from pipeline.distill import distill, trainer
from pipeline.distill.settings import Distill
from pipeline.models.ranges import SUFFIX
from pipeline.quantize import fine_tune
from pipeline.quantize.settings import Quantize
from pipeline.training.stopwatch import Stopwatch

SCHEMA = "cakd.benchmark.int8-families/1"
FAMILIES = (
    *("mobilenetv3_small_100", "mobilenetv4_conv_small", "efficientnet_lite0"),
    *("resnet18", "repvgg_a0", "convnext_atto"),
)
GATE = 0.01  # of top-1: what int8 may lose
PAIRS = 12  # of steps
RATIOS = ("ort-int8", "ov-int8")


def folder_of(runs: Runs, name: str, method: str) -> Path:
    """The folder of a family at these settings."""
    settings = student_settings(runs, name, method)
    quantize = runs.section(Quantize)
    features = runs.folder / "features"
    mark = artifacts.digest(
        [
            dataclasses.asdict(settings.of_method(method)),
            dataclasses.asdict(quantize),
            artifacts.sha256(features / "manifest.json"),
            artifacts.code(fine_tune.ROOMS),
        ]
    )[:12]
    return runs.folder / "int8" / f"{name}-{mark}"


def family(runs: Runs, name: str, method: str) -> dict[str, Any]:
    """Distil one student, measure its calibrated int8, fine-tune it and measure that; a finished one is read."""
    folder = folder_of(runs, name, method)
    finished = folder / "result.json"
    if finished.exists():
        return artifacts.read_json(finished)
    settings, quantize = student_settings(runs, name, method), runs.section(Quantize)
    shared = (runs.prepared, runs.teacher, runs.folder / "features")
    work = runs.folder / "work"
    distilled = folder / "distilled"
    began = time.monotonic()
    if not distilled.exists():
        figures = distill.distill(settings, method, *shared, distilled, work)
        figures.pop("curves")
        artifacts.write_json(folder / "distill.json", figures | {"s": time.monotonic() - began})
    first = artifacts.read_json(folder / "distill.json")
    began = time.monotonic()
    result = trained(runs, settings, quantize, distilled, folder / "trained", work)
    result |= {
        "method": method,
        "distill_steps": first["steps"],
        "distill_s": first["s"],
        "quantize_steps": quantize.steps,
        "quantize_s": time.monotonic() - began,
        "step_over_distill": step_cost(runs, folder, method),
    }
    artifacts.write_json(finished, artifacts.rounded(result))
    return artifacts.read_json(finished)


def trained(
    runs: Runs, settings: Distill, quantize: Quantize, distilled: Path, out: Path, work: Path
) -> dict[str, Any]:
    """Top-1 of the distilled student, and rows of both kinds of int8, on the test images."""
    export, build, prepared = runs.section(Export), runs.section(Build), runs.prepared
    student = fine_tune.Student.load(distilled / "student.safetensors")
    preprocess = student.description["preprocess"]
    rows = prepared.rows("test")
    held_out = normalised(prepared.images.squares(rows), preprocess), prepared.labels[rows]
    calibration_rows = spread(prepared.rows("train"), export.calibration_images)
    calibration = normalised(prepared.images.squares(calibration_rows), preprocess)
    fp32 = int8.top1(int8.logits_of(student.plain, student.description, held_out[0]), held_out[1])
    arguments = (student.description, held_out, calibration, build)
    with tempfile.TemporaryDirectory() as folder:
        source = simulated.write_onnx(student, Path(folder), export.opset)
        simulation, _ = simulated.simulate(
            student, source, calibration, quantize, build.int8_calibration, judge=False
        )
        measured = int8.measure(source, student.plain, *arguments)
    fine_tune.fine_tune(
        settings,
        quantize,
        student,
        simulation,
        prepared,
        runs.teacher,
        runs.folder / "features",
        out,
        work,
    )
    published = fine_tune.Student.load(out / "student.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        source = simulated.write_onnx(published, Path(folder), export.opset)
        measured += int8.measure(source, student.folded.cpu(), *arguments)
    floating = len(artifacts.read_json(out / f"student{SUFFIX}")["floating"])
    return {"images": len(rows), "fp32_top1": fp32, "floating": floating, "rows": measured}


def latency(runs: Runs, folder: Path) -> dict[str, Any]:
    """Paired CPU time of the trained int8 over fp32 in ONNX Runtime, one thread, batch 1: target -> ratio."""
    export, build = runs.section(Export), runs.section(Build)
    student = fine_tune.Student.load(folder / "trained" / "student.safetensors")
    rows = spread(runs.prepared.rows("train"), export.calibration_images)
    x = normalised(runs.prepared.images.squares(rows), student.description["preprocess"])
    result = {}
    with tempfile.TemporaryDirectory() as name:
        source = simulated.write_onnx(student, Path(name), export.opset)
        exported = Exported(source.parent, {"student": x}, rows, {"student": x[:, 0, 0]}, x)
        baseline = Subject(source.name, source, TARGETS["ort-fp32"])
        for target in (TARGETS[name] for name in RATIOS):
            made = RUNTIMES[target.runtime].make("int8", "student", exported, Path(name), build)
            versus, _ = compare_artefacts(Subject(made.name, made, target), baseline, 0, None)
            result[target.name] = versus["ratio"]
    return result


def step_cost(runs: Runs, folder: Path, method: str) -> float:
    """CPU time of a step of the fine-tuning over one of the distillation, in turns, median of PAIRS."""
    student = fine_tune.Student.load(folder / "distilled" / "student.safetensors")
    settings = student_settings(runs, student.description["model"], method)
    quantize, export = runs.section(Quantize), runs.section(Export)
    rows = spread(runs.prepared.rows("train"), simulated.IMAGES)
    x = normalised(runs.prepared.images.squares(rows), student.description["preprocess"])
    with tempfile.TemporaryDirectory() as name:
        source = simulated.write_onnx(student, Path(name), export.opset)
        simulation, _ = simulated.simulate(student, source, x, quantize, "minmax", judge=False)
    simulation.attach(student.folded)
    shared = (method, runs.prepared, runs.teacher, runs.folder / "features")
    trainers = [
        trainer.build(settings.of_method(method), *shared),
        trainer.build(
            fine_tune.recipe(settings, method, quantize), *shared, network=student.folded
        ),
    ]
    seconds: list[list[float]] = [[], []]
    for step in range(PAIRS):
        for own, times in zip(trainers, seconds, strict=True):
            began = time.process_time()
            trainer.train_step(own, step, Stopwatch(own.device))
            times.append(time.process_time() - began)
    distilling, quantizing = map(statistics.median, seconds)
    return quantizing / distilling


def student_settings(runs: Runs, name: str, method: str) -> Distill:
    """The recipe's distillation with another student."""
    settings: Distill = runs.section(Distill)
    return dataclasses.replace(settings, student=name, student_kwargs={}, methods=(method,))


def refused(row: dict[str, Any], fp32: float) -> bool:
    """Whether the gates of the stage build refuse this int8: SQNR, or top-1 lost."""
    lost = fp32 - row["top1"]
    return bool(row["sqnr_centered_db"] < Build().int8_db or lost > GATE + 1e-9)


def table(result: dict[str, Any]) -> str:
    """The Markdown table: a line a family, runtime and kind of int8."""
    lines = [
        "| student | fp32 top-1 (%) | runtime | calibrated: points lost | SQNR (dB) | trained: points lost "
        "| agreement with its simulation (%), SQNR (dB) | CPU time over ORT fp32 |",
        "|---|--:|---|--:|--:|--:|---|---|",
    ]
    for name, figures in result["families"].items():
        if "reason" in figures:
            lines.append(f"| {name} | | {figures['reason']} | | | | | |")
            continue
        fp32 = figures["fp32_top1"]
        by = {(row["target"], row["ranges"]): row for row in figures["rows"]}
        for target in int8.INT8:
            calibrated, trained = by[target, "calibration"], by[target, "training"]
            head = f"| {name} | {100 * fp32:.1f} | {target}"
            if trained["top1"] is None:
                lines.append(f"{head} | {trained['reason']} | | | | |")
                continue
            lost = [f"{100 * (fp32 - row['top1']):+.1f}" for row in (calibrated, trained)]
            lost[0] += " (refused)" if refused(calibrated, fp32) else ""
            agreement = f"{100 * trained['top1_agreement']:.1f}, {trained['sqnr_centered_db']:.1f}"
            ratio = result["latency"].get(name, {}).get(target)
            times = (
                f"{ratio['median']:.2f} ({ratio['ci_low']:.2f} to {ratio['ci_high']:.2f})"
                if ratio
                else "not measured"
            )
            lines.append(
                f"{head} | {lost[0]} | {calibrated['sqnr_centered_db']:.1f} | {lost[1]} | {agreement} | {times} |"
            )
    lines += ["", *notes(result)]
    return "\n".join(lines)


def notes(result: dict[str, Any]) -> list[str]:
    """What the columns mean, and the cost of a step."""
    finished = [f for f in result["families"].values() if "reason" not in f]
    costs = ", ".join(
        f"{name} {figures['step_over_distill']:.2f}"
        for name, figures in result["families"].items()
        if "reason" not in figures
    )
    steps = {(f["distill_steps"], f["quantize_steps"], f["images"]) for f in finished}
    budget = "; ".join(
        f"{d} steps of distillation, {q} of fine-tuning, {n} test images"
        for d, q, n in sorted(steps)
    )
    return [
        f"{budget}. Points lost are against the distilled student in float32; refused: SQNR below "
        f"{Build().int8_db:g} dB, or more than {100 * GATE:g} point lost. Every node that can be is in int8.",
        "",
        f"CPU time of a step of the fine-tuning over one of the distillation, in turns: {costs}.",
    ]


def main(args: argparse.Namespace) -> None:
    """Measure each family, print the table after each, write `<out>.json` and `<out>.md`."""
    runs = Runs.of(args.recipe, merged(args.recipe, args.data, args.set))
    result: dict[str, Any] = {"families": {}, "latency": {}}
    method = args.methods[0]
    for name in args.families:
        folder = folder_of(runs, name, method)
        if args.stored and not (folder / "result.json").exists():
            result["families"][name] = {"reason": "not run"}
            continue
        try:
            result["families"][name] = family(runs, name, method)
        except (UserError, GateFailed) as error:
            result["families"][name] = {"reason": str(error)}
            continue
        if args.latency:
            result["latency"][name] = latency(runs, folder)
        print(table(result), flush=True)
    if args.out:
        own = ("--families " + " ".join(args.families), "--latency" * args.latency)
        made_by = artifacts.provenance(dict.fromkeys(args.families, method))
        words = command("int8_families", args, *filter(None, own))
        record.write(args.out, SCHEMA, result, made_by, words, table(result))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmarks.int8_families", description=__doc__)
    add = made.add_argument
    add("recipe", help="a file of recipes/ without its suffix")
    add("--data", help="images of the recipe (prepare.path)")
    add("--methods", nargs=1, default=["logits"], metavar="METHOD", help="default: logits")
    add("--families", nargs="+", default=list(FAMILIES), metavar="NAME", help="timm models")
    add("--stored", action="store_true", help="tabulate the finished families, train nothing")
    add("--latency", action="store_true", help="measure CPU time too, on a quiet machine")
    add(
        "-S",
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a change of the recipe",
    )
    add("--out", type=Path, help="where to write, without suffix")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
