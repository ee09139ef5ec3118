"""Stage export: the selected student and its teacher as ONNX, with reference images and logits."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.artifact import inputs, onnx_file
from exporters.artifact.eager import EagerSession
from exporters.artifact.reference import DISTILLED, IMAGES
from exporters.ort import export as ort_export
from exporters.ort.export import Export
from pipeline.core import artifacts, cli, config
from pipeline.core.atomic import atomic_dir
from pipeline.core.errors import UserError
from pipeline.core.formats import Selection
from pipeline.core.machine import machine, usable_cores
from pipeline.core.students import BEST, MAIN, folder_of
from pipeline.data.prepared import Prepared, normalised, spread
from pipeline.models.ranges import SUFFIX

if TYPE_CHECKING:
    from torch import nn

SCHEMA = "cakd.export/1"


def main(args: argparse.Namespace) -> None:
    """Write `args.out`. Raises UserError: models that disagree on size or classes; GateFailed: ONNX parity."""
    from pipeline.models.checkpoint import load

    began = time.monotonic()
    params = config.load(Export, args.params)
    crop_pct = config.value("evaluate.crop_pct", args.params, default=1.0)
    prepared = Prepared.open(args.prepared)
    method, chosen = selected(args.selection, params)
    distilled = folder_of(args.students, chosen) / method / "student.safetensors"
    student = fine_tuned(args.quantized) or distilled
    checkpoints = {"student": student, "teacher": args.teacher}
    preprocess = agreed(checkpoints, prepared, method)
    rows = spread(prepared.rows("val"), params.reference_images)
    calibration_rows = spread(prepared.rows("train"), params.calibration_images)
    with atomic_dir(args.out) as folder:
        loaded = {name: load(path) for name, path in checkpoints.items()}
        for _, description in loaded.values():
            description["preprocess"]["crop_pct"] = crop_pct
        models = {
            name: export(path, *loaded[name], folder / f"{name}.onnx", params.opset)
            for name, path in checkpoints.items()
        }
        ranges = student.with_name(f"{student.stem}{SUFFIX}")
        if ranges.is_file():
            shutil.copyfile(ranges, folder / f"student{SUFFIX}")
        reference: dict[str, Any] = {"labels": prepared.labels[rows]}
        for name in checkpoints:
            x = normalised(prepared.images.squares(rows, crop_pct), preprocess[name])
            logits = inputs.run_batches(EagerSession(*loaded[name], usable_cores()), x)
            reference |= {IMAGES[name]: x, name: logits}
        if student != distilled:
            session = EagerSession(*load(distilled), usable_cores())
            reference[DISTILLED] = inputs.run_batches(session, reference[IMAGES["student"]])
        np.savez(folder / "reference.npz", **reference)
        pixels = prepared.images.squares(calibration_rows, crop_pct)
        calibration = normalised(pixels, preprocess["student"])
        np.save(folder / "calibration.npy", calibration)
        document = {
            "schema": SCHEMA,
            "method": method,
            **({} if chosen == MAIN else {"student": chosen}),
            "opset": params.opset,
            "models": models,
            "reference_images": len(rows),
            "calibration_images": len(calibration_rows),
            "machine": machine(),
            "provenance": artifacts.provenance(
                params.__dict__, **checkpoints, index=args.prepared / "index.json"
            ),
        }
        artifacts.write_json(folder / "export.json", document)
    student_block = models["student"]
    print(
        f"{args.out}: {method}, student {student_block['size_mb']:.2f} MB, opset {params.opset}, max abs "
        f"{student_block['parity']['max_abs']:.1e} from torch ({time.monotonic() - began:.0f} s)"
    )


def selected(path: Path, requested: Export) -> tuple[str, str]:
    """Read method and student of selection.json. Raises UserError: written for others than `export:` names."""
    selection = artifacts.read(path, Selection, "run select again")
    found = {"method": selection["selected"], "student": selection.get("student", MAIN)}
    for key, value in found.items():
        if (wanted := getattr(requested, key)) not in (BEST, value):
            raise UserError(
                f"{path}: got {value!r}; expected {wanted!r}, export.{key}; run select again"
            )
    return found["method"], found["student"]


def fine_tuned(folder: Path) -> Path | None:
    """The student that the stage quantize wrote; None where it left the distilled one as it is."""
    student = folder / "student.safetensors"
    return student if student.is_file() else None


def export(
    checkpoint: Path, model: nn.Module, description: dict[str, Any], out: Path, opset: int
) -> dict[str, Any]:
    """Export a loaded checkpoint to ONNX; returns its block of export.json.

    Beside it a copy of the weights, and the description with the crop of the evaluation.
    """
    from pipeline.models.checkpoint import count

    row = ort_export.export_model(model, description, out, opset)
    shutil.copyfile(checkpoint.with_suffix(".safetensors"), out.with_suffix(".safetensors"))
    artifacts.write_json(out.with_suffix(".json"), description)
    return {
        "onnx": out.name,
        "sha256": artifacts.sha256(out),
        "weights_sha256": description["weights_sha256"],
        "size_mb": out.stat().st_size / 1e6,
        **count(model, description["preprocess"]["image_size"]),
        "ops": onnx_file.histogram(onnx_file.read_onnx(out)),
        "preprocess": description["preprocess"],
        "num_classes": description["num_classes"],
        "parity": {key: row[key] for key in ("max_abs", "rel_between_std", "verdict")},
    }


def agreed(
    checkpoints: dict[str, Path], prepared: Prepared, method: str
) -> dict[str, dict[str, Any]]:
    """Return the preprocessing of each model, after checking that models and images fit.

    Raises UserError: models and images of different sizes, a student of another method than is selected.
    """
    from pipeline.models.checkpoint import describe

    described = {name: describe(path) for name, path in checkpoints.items()}
    trained = described["student"].get("method")
    if trained != method:
        raise UserError(
            f"{checkpoints['student']}: got a student of {trained}; expected one of {method}, which is selected; "
            "run distill again"
        )
    preprocessing = {name: description["preprocess"] for name, description in described.items()}
    sizes = {name: preprocess["image_size"] for name, preprocess in preprocessing.items()}
    if set(sizes.values()) != {prepared.image_size}:
        raise UserError(
            f"image size: got student {sizes['student']} px, teacher {sizes['teacher']} px, {prepared.folder} "
            f"{prepared.image_size} px; expected one size; run prepare, teach and distill with the same size"
        )
    return preprocessing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.export", description=__doc__)
    parser.add_argument("students", type=Path, help="the folder of the students, one per method")
    parser.add_argument("selection", type=Path, help="reports/selection.json")
    parser.add_argument("quantized", type=Path, help="the folder of the stage quantize")
    parser.add_argument("teacher", type=Path, help="teacher.safetensors")
    parser.add_argument("prepared", type=Path, help="data/prepared")
    parser.add_argument("out", type=Path, help="artifacts/export")
    parser.add_argument("--params", type=Path, default="params.yaml")
    cli.run(main, parser)
