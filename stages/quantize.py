"""Stage quantize: fine-tune the selected student under the int8 of its exported network, and measure both.

With `quantize.steps: 0` it does nothing: the student is exported as it was distilled.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import artifacts, cli, config, machine
from pipeline.core.atomic import atomic_dir
from pipeline.core.formats import Selection
from pipeline.core.students import MAIN, folder_of
from pipeline.quantize.settings import Quantize

if TYPE_CHECKING:
    from exporters.artifact.session import Array

SCHEMA = "cakd.quantize/1"
HELD_OUT = 1000  # images of val, at most


def main(args: argparse.Namespace) -> None:
    """Write `args.out`, the fine-tuned student with its ranges, and `args.figures`."""
    settings = config.load(Quantize, args.params)
    figures: dict[str, Any] = {"steps": 0, "method": None, "rows": [], "layers": []}
    provenance = artifacts.provenance(settings.__dict__)
    if settings.steps:
        figures = quantize(args, settings)
        provenance = artifacts.provenance(
            settings.__dict__, student=args.out / "student.safetensors"
        )
        text = summary(figures)
    else:
        text = "the student stays as it was distilled (quantize.steps: 0)"
        with atomic_dir(args.out) as folder:
            (folder / "nothing.txt").write_text(f"{text}\n")
    document = {"schema": SCHEMA, **artifacts.rounded(figures, 4)}
    artifacts.write_json(
        args.figures, {**document, "machine": machine.machine(), "provenance": provenance}
    )
    print(f"{args.out}: {text}")


def quantize(args: argparse.Namespace, settings: Quantize) -> dict[str, Any]:
    """Fine-tune the selected student, and measure its int8 by calibration and by training in every runtime.

    Raises UserError: a student that cannot be folded or exported, a stale feature cache; GateFailed: ONNX parity.
    """
    from exporters.bench import floating
    from exporters.build import Build
    from exporters.ort.export import Export
    from exporters.ort.simulated import simulate, write_onnx
    from exporters.parity import int8
    from pipeline.data.prepared import Prepared, normalised, spread
    from pipeline.distill import curves
    from pipeline.distill.settings import Distill
    from pipeline.quantize import fine_tune
    from pipeline.store.policy import Cache

    prepared = Prepared.open(args.prepared)
    selection = artifacts.read(args.selection, Selection, "run select again")
    method, name = selection["selected"], selection.get("student", MAIN)
    export, build = config.load(Export, args.params), config.load(Build, args.params)
    student = fine_tune.Student.load(
        folder_of(args.students, name) / method / "student.safetensors"
    )
    preprocess = student.description["preprocess"]
    preprocess["crop_pct"] = config.value("evaluate.crop_pct", args.params, default=1.0)

    def images(split: str, count: int) -> tuple[Array, Any]:
        rows = spread(prepared.rows(split), count)
        squares = prepared.images.squares(rows, preprocess["crop_pct"])
        return normalised(squares, preprocess), prepared.labels[rows]

    calibration, _ = images("train", export.calibration_images)
    held_out = images("val", HELD_OUT)
    measure = partial(
        int8.measure,
        description=student.description,
        images=held_out,
        calibration=calibration,
        settings=build,
    )
    logits = int8.logits_of(student.plain, student.description, held_out[0])
    with tempfile.TemporaryDirectory() as folder:
        source = write_onnx(student, Path(folder), export.opset)
        simulation, layers = simulate(
            student, source, calibration, settings, build.int8_calibration
        )
        rows = measure(source, student.plain)
    distill = config.load(Distill, args.params)
    trained = fine_tune.fine_tune(
        distill.of_student(name),
        settings,
        student,
        simulation,
        prepared,
        args.teacher,
        args.features,
        args.out,
        args.work,
        config.load(Cache, args.params),
    )
    lines = trained.pop("curves")
    left = [layer.name for layer in layers if layer.floating]
    published = fine_tune.Student.load(args.out / "student.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        source = write_onnx(published, Path(folder), export.opset)
        rows += measure(source, student.folded.cpu())
        floating_layers = floating.measure(published, source, left, calibration)
    return {
        "steps": settings.steps,
        "method": method,
        "images": len(held_out[0]),
        "fp32_top1": int8.top1(logits, held_out[1]),
        "rows": rows,
        "layers": [vars(layer) for layer in layers],
        "floating": floating_layers,
        "training": {**trained, "losses": curves.final(lines)},
    }


def summary(figures: dict[str, Any]) -> str:
    """Format method, steps, and top-1 of fp32 and of both kinds of int8 on the held-out images."""
    parts = [f"fp32 {100 * figures['fp32_top1']:.1f} %"]
    for row in figures["rows"]:
        if row["top1"] is not None:
            parts.append(f"{row['target']} by {row['ranges']} {100 * row['top1']:.1f} %")
    images = f"top-1 of {figures['images']} images of val"
    return f"{figures['method']}, {figures['steps']} steps, {images}: {', '.join(parts)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.quantize", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("teacher", type=Path, help="teacher.safetensors")
    parser.add_argument("features", type=Path, help="the feature cache")
    parser.add_argument("students", type=Path, help="the folder of the students, one per method")
    parser.add_argument("selection", type=Path, help="reports/selection.json")
    parser.add_argument("out", type=Path, help="the fine-tuned student's folder to write")
    parser.add_argument("figures", type=Path, help="quantize.json to write")
    parser.add_argument("--work", type=Path, default=Path(".work/quantize"), help="unfinished work")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser)
