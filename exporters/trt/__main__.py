"""ONNX -> TensorRT engine (plan) with its sidecar, by full TensorRT or TensorRT-RTX; `info` describes a plan.

`python -m exporters.trt student.onnx [-o PLAN] [--precision fp32,fp16,int8] [--calib DIR] [--shapes 1,1,8]
[--backend auto,tensorrt,rtx] [--timing-cache FILE] [--version-compatible] [--hardware-compatible]
[--optimization-level N] [--force] [--shape B,C,H,W]` and `python -m exporters.trt info PLAN`.
Full TensorRT builds on its GPU only; RTX builds on any machine and compiles for the GPU when it loads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from exporters.artifact import agreement, inputs
from exporters.artifact.input_shape import add_shape_option, fixed_input
from exporters.artifact.precision import add_conversion_options, parse_precisions, run_all
from exporters.artifact.session import Unavailable
from exporters.device.compiled_cache import sidecar_path
from exporters.ort import int8
from exporters.ort.session import OrtSession
from exporters.trt import build
from exporters.trt.build import Options
from exporters.trt.convert import build_plan, plan_path
from exporters.trt.plan import backend, obstacle, read_sidecar
from exporters.trt.session import TrtSession
from pipeline.core import cli
from pipeline.core.atomic import make_parent
from pipeline.core.errors import UserError


def main(args: argparse.Namespace) -> None:
    """Build each precision and print one line a plan; on a GPU each plan is compared first."""
    precisions = parse_precisions(args.precision)
    options = Options(
        build.parse_shapes(args.shapes),
        args.version_compatible,
        args.hardware_compatible,
        args.optimization_level,
        args.timing_cache,
    )
    name, _ = backend(args.backend)
    build.validate_options(name, options)
    if args.onnx.suffix != ".onnx":
        raise UserError(
            f"{args.onnx}: got suffix {args.onnx.suffix!r}; expected .onnx; export the model first"
        )
    if args.out and len(precisions) > 1:
        raise UserError(f"-o {args.out}: one name for {len(precisions)} precisions; leave -o out")
    with fixed_input(args.onnx, args.shape) as source:
        build_all(args, source, precisions, name, options)


def build_all(
    args: argparse.Namespace, source: Path, precisions: list[str], name: str, options: Options
) -> None:
    """Build an ONNX file of fixed input size in each precision."""
    calibration = None
    if "int8" in precisions:
        calibration = int8.calibration_images(source, args.calib).calibration

    def write(precision: str) -> None:
        plan = args.out or plan_path(args.onnx, precision, name, options)
        make_parent(plan)
        with tempfile.TemporaryDirectory(dir=plan.parent, prefix=f".{plan.name}.") as folder:
            draft = Path(folder) / plan.name
            _, sidecar = build_plan(source, draft, precision, name, options, calibration)
            parity, verdict = plan_parity(source, draft, False if args.no_cuda_graph else None)
            print(
                f"{plan}: {sidecar['size_mb']:.2f} MB in {sidecar['seconds']:.1f} s, {sidecar['backend']} "
                f"{sidecar['version']}, {', '.join(_traits(sidecar))}, {parity}"
            )
            agreement.require_pass(plan, {"verdict": verdict, "reason": parity}, args.force)
            sidecar_path(draft).replace(sidecar_path(plan))
            draft.replace(plan)

    run_all(partial(write, precision) for precision in precisions)


def _traits(sidecar: dict[str, Any]) -> list[str]:
    """The build options of the plan, each in a few words."""
    level, cache = sidecar["optimization_level"], sidecar["timing_cache"]
    traits = [
        f"{sidecar['precision']} (TF32 {'on' if sidecar['tf32'] else 'off'})",
        f"batches {sidecar['shapes']}",
        "version compatible" if sidecar["version_compatible"] else "",
        "hardware compatible (Ampere and newer)" if sidecar["hardware_compatible"] else "",
        "" if level is None else f"optimization level {level}",
        f"timing cache {cache}" if cache else "",
    ]
    return [trait for trait in traits if trait]


def plan_parity(source: Path, plan: Path, cuda_graph: bool | None = None) -> tuple[str, str]:
    """(Parity of a plan with its ONNX in one line, the verdict); `skipped` where it cannot run here."""
    try:
        session = TrtSession(plan, cuda_graph)
    except Unavailable as error:
        return f"not run here: {error}", "skipped"
    reference = OrtSession(source, 1)
    x = inputs.probe_images(reference)
    logits = inputs.run_batches(reference, x), inputs.run_batches(session, x)
    gates = agreement.fair_thresholds(session, agreement.Thresholds())
    row = agreement.parity_row(plan, session, *logits, gates)
    return agreement.describe_row(row), row["verdict"]


def print_info(args: argparse.Namespace) -> None:
    """Print what a plan is, where it was built, and whether it can run here."""
    sidecar = read_sidecar(args.plan)
    gpu = sidecar["gpu"]
    print(f"{args.plan}: {sidecar['backend']} {sidecar['version']}, {sidecar['size_mb']:.2f} MB")
    print(f"  precision {', '.join(_traits(sidecar))} (smallest, usual, largest)")
    onnx = sidecar["onnx"]
    print(f"  from {onnx['file']}, opset {onnx['opset']}, sha256 {onnx['sha256'][:16]}")
    print(
        f"  built on {gpu['name']}, SM {gpu['sm']}, driver CUDA {gpu['driver']}, {sidecar['platform']}"
        if gpu
        else f"  built without a GPU, {sidecar['platform']}"
    )
    reason = obstacle(sidecar, args.plan)
    print(f"  runs here: {'no, ' + reason if reason else 'yes'}")


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m exporters.trt`."""
    p = argparse.ArgumentParser(prog="exporters.trt", description=__doc__)
    add = p.add_argument
    add("onnx", type=Path, help="any fp32 .onnx classifier; or `info PLAN`")
    add("-o", "--out", type=Path, help="the plan; default: ONNX.BACKEND-GPU-PRECISION.plan")
    add_conversion_options(p)
    add_shape_option(p)
    add(
        "--calib",
        type=Path,
        help="images to calibrate int8 on: a folder of images or a prepared folder",
    )
    add("--shapes", default="1,1,8", help="smallest, usual and largest batch; default 1,1,8")
    add("--backend", default="auto", help="auto, tensorrt or rtx; default auto")
    add(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="kernel timings, read if the file exists and written back",
    )
    add("--version-compatible", action="store_true", help="runs under later TensorRT versions too")
    add("--hardware-compatible", action="store_true", help="runs on Ampere and every newer GPU")
    add("--optimization-level", type=int, metavar="N", help="0 to 5; TensorRT's own is 3")
    add("--no-cuda-graph", action="store_true", help="check the engine without graphs")
    return p


def info_parser() -> argparse.ArgumentParser:
    """The command line of `python -m exporters.trt info`."""
    p = argparse.ArgumentParser(prog="exporters.trt info", description=print_info.__doc__)
    p.add_argument("plan", type=Path)
    return p


if __name__ == "__main__":
    if sys.argv[1:2] == ["info"]:
        cli.run(print_info, info_parser(), sys.argv[2:])
    cli.run(main, parser())
