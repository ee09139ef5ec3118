"""TensorRT-RTX engines of a student, built and run: parity with the ONNX, latency by the wall and by CUDA events.

The student is that of the part `cifar` where it has left one, else a ResNet-18 at 32 px with random weights.
Without a device (`--dry`) the engine is built and not run.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.gpu_parts import cifar
from benchmarks.gpu_parts.part import COMMAND, Part, Row, parser
from exporters.bench import latency
from exporters.device import timing
from pipeline.core import artifacts, cli
from pipeline.core.errors import UserError
from pipeline.models.checkpoint import describe, preprocessing, save

SCHEMA = "cakd.benchmark.gpu.engine/1"
RESULT = "engine"
NEEDS = ("tensorrt_rtx", "onnx", "onnxscript", "onnxruntime")
STUDENT = Path(cifar.RESULT, "students", "cakd+logits", "student.safetensors")  # below --work
PRECISIONS = ("fp32", "fp16")
BATCHES = (1, 8)
BLOCKS = 10


def checkpoint(args: argparse.Namespace, folder: Path) -> Path:
    """The trained student, or one with random weights."""
    if (args.work / STUDENT).is_file() and not args.dry:
        trained: Path = args.work / STUDENT
        return trained
    from benchmarks.exporters import reactive

    name = "test_resnet" if args.dry else "resnet18"
    kwargs = {"output_stride": 8}
    model = reactive(name, kwargs, 32)
    description = {
        "role": "student",
        "model": name,
        "kwargs": kwargs,
        "num_classes": 10,
        "classes": [f"class {i}" for i in range(10)],
        "preprocess": preprocessing(model, 32),
    }
    path = folder / "student.safetensors"
    save(path, model, description)
    return path


def built(source: Path, precision: str) -> dict[str, Any]:
    """Build one engine: size, seconds, parity with the ONNX and latency, or the reason of its error."""
    from exporters.trt import __main__ as trt_command
    from exporters.trt import convert

    plan = source.with_name(f"{precision}.plan")
    try:
        _, sidecar = convert.build_plan(source, plan, precision, "rtx")
        text, verdict = trt_command.plan_parity(source, plan)
    except UserError as error:
        return {"verdict": "refused", "reason": str(error)}
    row = {"verdict": verdict, "reason": text, "version": sidecar["version"]}
    row |= {"size_mb": sidecar["size_mb"], "seconds": sidecar["seconds"]}
    return row if verdict == "skipped" else row | {"latency": timed(plan)}


def timed(plan: Path) -> dict[str, Any]:
    """Batch -> wall_ms and engine_ms of a call, copies in and out included in the first."""
    from exporters.artifact.inputs import smooth
    from exporters.trt.session import TrtSession

    session = TrtSession(plan)
    _, _, height, width = session.input_shape
    figures = {}
    for batch in BATCHES:
        x = smooth(4 * batch, height, width).reshape(4, batch, 3, height, width)
        turns = timing.cycle_inputs([np.ascontiguousarray(part) for part in x])
        timing.warm_up(session.run, turns, engine=session.engine_ms)
        blocks = [
            timing.run_block(session.run, turns, engine=session.engine_ms) for _ in range(BLOCKS)
        ]
        figures[str(batch)] = latency.summarise_calls(blocks)
    return figures


def main(args: argparse.Namespace) -> None:
    """Export the student, then build and run an engine of each precision; written as each ends."""
    from exporters.ort import export

    folder = args.work / RESULT
    folder.mkdir(parents=True, exist_ok=True)
    path, source = checkpoint(args, folder), folder / "student.onnx"
    row = export.export(path, source)
    trained = path == args.work / STUDENT
    result: dict[str, Any] = {
        "student": "of the part cifar" if trained else "random weights",
        "model": describe(path)["model"],
        "onnx_parity": row["verdict"],
        "engines": {},
    }
    made_by = artifacts.provenance({"dry": args.dry}, student=path)
    for precision in PRECISIONS[:1] if args.dry else PRECISIONS:
        result["engines"][precision] = built(source, precision)
        text = "\n".join(
            ["| engine | figure |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows(result))]
        )
        record.write(args.out / RESULT, SCHEMA, result, made_by, f"{COMMAND} --parts engine", text)


def obstacle(_: argparse.Namespace) -> str | None:
    """The packages that are missing, if any."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"not installed: {', '.join(missing)}; pip install 'tensorrt-rtx-cu13' onnx onnxscript onnxruntime"


def rows(result: dict[str, Any]) -> list[Row]:
    """Size, verdict and latency of each precision."""
    lines = []
    for precision, row in result["engines"].items():
        name = f"rtx {precision}, {result['model']} ({result['student']})"
        text = f"{row['verdict']}: {row['reason']}"
        if "size_mb" in row:
            text = f"built in {row['seconds']:.1f} s, {row['size_mb']:.1f} MB; {text}"
        for batch, times in row.get("latency", {}).items():
            engine, wall = times["engine_ms"]["p50"], times["wall_ms"]["p50"]
            text += f"; batch {batch} {wall:.3f} ms, engine {engine:.3f} ms"
        lines.append((name, text))
    return lines


PART = Part(__name__, 1, [RESULT], rows, obstacle)

if __name__ == "__main__":
    cli.run(main, parser("benchmarks.gpu engine", __doc__))
