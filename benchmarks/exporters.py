"""Students of several CNN families through every exporter: `python -m benchmarks.exporters`. A table and its JSON.

The weights are random, batch norms calibrated on smooth images so that the networks react to their input.
Images for int8 calibration and its check come from `--calib`, or are smooth ones. Every artefact is compared with
its ONNX.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import record
from exporters.artifact import inputs
from exporters.artifact.precision import PRECISIONS, precision_path
from exporters.artifact.session import Unavailable
from exporters.ort import export, int8
from exporters.ov import convert as ov_convert
from exporters.trt import __main__ as trt_command
from exporters.trt import convert as trt_convert
from pipeline.core import artifacts, cli
from pipeline.core.errors import GateFailed, UserError
from pipeline.models.checkpoint import create, preprocessing, save

SCHEMA = "cakd.benchmark.exporters/1"
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenetv3_small_100": {},
    "mobilenetv4_conv_small": {},
    "efficientnet_lite0": {},
    "repvgg_a0": {},
    "convnext_atto": {"ls_init_value": 1.0},  # timm's 1e-6 would answer every image alike
}
RUNTIMES = ("ort", "ov", "rtx")


def reactive(name: str, kwargs: dict[str, Any], size: int) -> nn.Module:
    """A network of random weights for 10 classes whose logits differ between images.

    Its batch norms take their statistics from four passes over smooth images.
    """
    torch.manual_seed(0)
    model = create(name, kwargs, 10)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None
    with torch.no_grad():
        for seed in range(4):
            model.train()(torch.from_numpy(inputs.smooth(16, size, size, seed)))
    return model


def checkpoint(name: str, kwargs: dict[str, Any], size: int, path: Path) -> None:
    """Write a `reactive` network as a student's checkpoint."""
    model = reactive(name, kwargs, size)
    description = {
        "model": name,
        "kwargs": kwargs,
        "num_classes": 10,
        "classes": [f"class {i}" for i in range(10)],
        "preprocess": preprocessing(model, size),
        "role": "student",
    }
    save(path, model, description)


def timed(make: Callable[[], dict[str, Any]], *artefacts: Path) -> dict[str, Any]:
    """Return the row of `make()` with size in MB and seconds, or a row with the reason of its error."""
    start = time.perf_counter()
    try:
        row = make()
    except (GateFailed, UserError) as error:
        verdict = "unavailable" if isinstance(error, Unavailable) else "refused"
        return {"verdict": verdict, "reason": str(error)}
    size = sum(path.stat().st_size for path in artefacts) / 1e6
    return {**row, "size_mb": size, "seconds": time.perf_counter() - start}


def through(name: str, folder: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Export one student by all exporters: `ort fp32`, ... -> its row."""
    source, path = folder / f"{name}.onnx", folder / f"{name}.safetensors"
    checkpoint(name, STUDENTS[name], args.size, path)
    rows = {"ort fp32": timed(partial(export.export, path, source), source)}
    pictures = calibration(source, args)
    how = int8.Settings(search_s=args.search_seconds)
    for precision in PRECISIONS:
        out = precision_path(source, precision)
        if precision != "fp32":
            made = partial(export.convert_onnx, source, out, precision, pictures, how)
            rows[f"ort {precision}"] = timed(made, out)
        ir = out.with_suffix(".xml")
        made = partial(ov_convert.convert_to_ir, source, ir, precision, pictures, how)
        rows[f"ov {precision}"] = timed(made, ir, ir.with_suffix(".bin"))
        plan = out.with_suffix(".plan")
        made = partial(engine, source, plan, precision, pictures)
        rows[f"rtx {precision}"] = timed(made, plan)
    return rows


def engine(
    source: Path, plan: Path, precision: str, pictures: int8.CalibrationImages
) -> dict[str, Any]:
    """Build a TensorRT-RTX engine and, where there is a GPU, run it."""
    trt_convert.build_plan(source, plan, precision, "rtx", calibration=pictures.calibration)
    reason, verdict = trt_command.plan_parity(source, plan)
    return {"verdict": "built" if verdict == "skipped" else verdict, "reason": reason}


def calibration(source: Path, args: argparse.Namespace) -> int8.CalibrationImages:
    """Images to calibrate on and to check by, without labels: the weights are random."""
    if args.calib:
        images = int8.calibration_images(source, args.calib)
        return int8.CalibrationImages(
            images.calibration, images.held_out, np.full(len(images.held_out), -1)
        )
    x = inputs.smooth(128, args.size, args.size, seed=9)
    return int8.CalibrationImages(x[::2], x[1::2], np.full(64, -1))


def cell(row: dict[str, Any]) -> str:
    """One row as a cell: the gate's figure, what stays in float, MB and seconds."""
    if "size_mb" not in row:
        return f"{row['verdict']}: {row['reason'].split(': ', 1)[-1]}"
    size = f"{row['size_mb']:.1f} MB, {row['seconds']:.0f} s"
    if "max_abs" not in row:
        return f"{row['verdict']}, {size}"
    fp32 = row["precision_effective"] == "fp32" and row["sqnr_centered_db"] > 100
    figure = f"{row['rel_between_std']:.0e}" if fp32 else f"{row['sqnr_centered_db']:.0f} dB"
    part = f", {row['int8'].split(' after')[0]}" if "left" in row.get("int8", "") else ""
    return f"{row['verdict']} {figure}{part}, {size}"


def table(result: dict[str, Any]) -> str:
    """The Markdown table: a student and precision a line, a runtime a column."""
    lines = ["| student | precision | " + " | ".join(RUNTIMES) + " |", "|---|---|---|---|---|"]
    for name, rows in result["students"].items():
        for precision in PRECISIONS:
            cells = " | ".join(cell(rows[f"{runtime} {precision}"]) for runtime in RUNTIMES)
            lines.append(f"| {name} | {precision} | {cells} |")
    lines += ["", "fp32: largest difference over the between-image deviation; else centred SQNR."]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    with tempfile.TemporaryDirectory() as folder:
        result = {"students": {name: through(name, Path(folder), args) for name in args.students}}
    text = table(result)
    print(text)
    if args.out is None:
        return
    params = {k: v for k, v in vars(args).items() if k not in ("out", "calib")}
    options = f"--students {' '.join(args.students)} --size {args.size}"
    calib = " --calib DIR" if args.calib else ""
    command = (
        f"python -m benchmarks.exporters {options}{calib} --search-seconds {args.search_seconds:g}"
    )
    record.write(args.out, SCHEMA, result, artifacts.provenance(params), command, text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmarks.exporters", description=__doc__)
    made.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    made.add_argument("--size", type=int, default=224)
    made.add_argument("--calib", type=Path, help="images to calibrate int8 on and to check by")
    made.add_argument("--search-seconds", type=float, default=60.0)
    made.add_argument("--out", type=Path, help="where to write, without suffix")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
