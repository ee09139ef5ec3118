"""ONNX -> TensorRT engine, by full TensorRT or TensorRT-RTX; what a plan is; and an engine as a session.

`python -m exporters.trt student.onnx [-o PLAN] [--precision fp32,fp16,int8] [--calib DIR] [--shapes 1,1,8]
[--backend auto,tensorrt,rtx]` and `python -m exporters.trt info PLAN`.
One path for TensorRT 10.12+, 11 and RTX: a strongly typed network, the precision is in the graph.
Full TensorRT builds on its GPU only; RTX builds on any machine and compiles for the GPU when it loads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters import agreement, cuda, engine, inputs, onnx_file, ort, quantize
from exporters.session import Array, Unavailable
from pipeline import cli, files
from pipeline.errors import GateFailed, UserError

SHAPES = (1, 1, 8)  # smallest, usual and largest batch
WORKSPACE = 1 << 30  # bytes


def build(trt: Any, source: Path, shapes: Sequence[int]) -> bytes:
    """ONNX file -> serialized engine. Every call that may return nothing is checked.

    Raises UserError with the parser's and the logger's own errors.
    """
    log = engine.logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # "factory function returned nullptr": no driver, or one too old
        raise Unavailable(f"TensorRT cannot start: {log.told() or error}") from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors)
        raise UserError(f"{source.name}: TensorRT cannot parse it: {told or log.told()}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    entry = network.get_input(0)
    if entry.shape[0] == -1:
        _add_profile(builder, config, entry, shapes, log)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{source.name}: TensorRT cannot build it: {log.told()}")
    return bytes(plan)


def _add_profile(builder: Any, config: Any, entry: Any, shapes: Sequence[int], log: Any) -> None:
    profile = builder.create_optimization_profile()
    profile.set_shape(entry.name, *[(batch, *tuple(entry.shape)[1:]) for batch in shapes])
    if config.add_optimization_profile(profile) < 0:
        raise UserError(f"--shapes: TensorRT refuses {list(shapes)} for {entry.name}: {log.told()}")


def make(
    source: Path,
    plan: Path | None,
    precision: str,
    name: str = "auto",
    shapes: Sequence[int] = SHAPES,
    calibration: Array | None = None,
) -> tuple[Path, dict[str, Any]]:
    """fp32 ONNX -> plan and the sidecar `PLAN.json` beside it; returns both. `plan` None: a name that tells.

    Raises UserError: not parsed, not built, int8 without images; Unavailable as `backend`.
    """
    name, trt = engine.backend(name)
    start = time.perf_counter()
    proto = onnx_file.read(source)
    plan = plan or source.with_name(f"{source.stem}.{engine.label(name, trt)}-{precision}.plan")
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / source.name
        onnx_file.save(_at(proto, precision, calibration), graph)
        built = build(trt, graph, shapes)
    with files.atomic(plan) as temporary:
        temporary.write_bytes(built)
    dims = [d.dim_value or None for d in proto.graph.input[0].type.tensor_type.shape.dim]
    sidecar = {
        "schema": engine.SCHEMA,
        "backend": name,
        "version": trt.__version__,
        "gpu": vars(gpu) if (gpu := cuda.device()) else None,
        "precision": precision,
        "shapes": [dims[0]] * 3 if dims[0] else list(shapes),
        "input_shape": dims,
        "onnx": {
            "file": source.name,
            "sha256": files.sha256(source),
            "opset": onnx_file.opset(proto),
        },
        "plan_sha256": files.sha256(plan),
        "size_mb": len(built) / 1e6,
        "seconds": time.perf_counter() - start,
        "notes": {**onnx_file.notes(proto), "precision": precision},
        "provenance": files.provenance(
            {"precision": precision, "backend": name, "shapes": list(shapes)}, onnx=source
        ),
    }
    files.write_json(engine.sidecar_of(plan), sidecar)
    return plan, sidecar


def _at(proto: Any, precision: str, calibration: Array | None) -> Any:
    """The graph at that precision: TensorRT takes it from there."""
    if precision == "fp16":
        return quantize.to_fp16(proto)
    if precision == "int8":
        if calibration is None:
            raise UserError(ort.NO_CALIBRATION)
        return quantize.to_int8(proto, calibration, symmetric=True)
    return proto


class TrtSession:
    """An engine over torch CUDA tensors on its own stream; the copies in and out are part of `run`."""

    def __init__(self, plan: Path) -> None:
        sidecar = engine.read_sidecar(plan)
        if reason := engine.obstacle(sidecar):
            raise Unavailable(reason)
        try:
            import torch
        except ImportError as error:
            raise Unavailable(f"engines run over torch CUDA tensors: {error}") from None
        name, trt = engine.backend(sidecar["backend"])
        self._torch, self._log = torch, engine.logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise UserError(f"{plan}: the engine does not load: {self._log.told()}; build it again")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise UserError(f"{plan}: no execution context: {self._log.told()}")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {n: self._engine.get_tensor_mode(n) for n in names}
        self._input = next(n for n in names if modes[n] == trt.TensorIOMode.INPUT)
        self._output = next(n for n in names if modes[n] == trt.TensorIOMode.OUTPUT)
        self._stream = torch.cuda.Stream()
        self._shapes = sidecar["shapes"]
        self._largest = self._shapes[2]
        self.runtime = f"{engine.MODULES[name]} {trt.__version__}"
        self.precision_effective = str(sidecar["precision"])  # strongly typed: as the graph says
        self.metadata: Mapping[str, str] = sidecar["notes"]
        b, c, h, w = sidecar["input_shape"]
        self.input_shape: tuple[int | None, int, int, int] = (b, c, h, w)

    def run(self, x: Array) -> Array:
        """x (B, 3, S, S) float32 -> logits (B, K) float32; above the plan's largest batch in parts.

        Raises UserError: B below the plan's smallest batch, or the engine fails.
        """
        if len(x) > self._largest:
            parts = range(0, len(x), self._largest)
            return np.concatenate([self.run(x[i : i + self._largest]) for i in parts])
        torch, context = self._torch, self._context
        if not context.set_input_shape(self._input, x.shape):
            raise UserError(f"batch {len(x)} is not among the plan's; it takes {self._shapes}")
        with torch.cuda.stream(self._stream):
            taken = torch.from_numpy(x).to("cuda", non_blocking=True)
            shape = tuple(context.get_tensor_shape(self._output))
            made = torch.empty(shape, dtype=torch.float32, device="cuda")
            context.set_tensor_address(self._input, taken.data_ptr())
            context.set_tensor_address(self._output, made.data_ptr())
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise UserError(f"the engine failed to run: {self._log.told()}")
            logits: Array = made.cpu().numpy()
        return logits


def parse_shapes(text: str) -> tuple[int, int, int]:
    """`1,1,8` -> smallest, usual, largest batch. Raises UserError: not three whole numbers in that order."""
    parts = text.split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() for p in parts):
        raise UserError(f"--shapes: got {text!r}; allowed: three batches like 1,1,8")
    least, usual, most = (int(p) for p in parts)
    if not 1 <= least <= usual <= most:
        raise UserError(f"--shapes: got {text!r}; allowed: 1 <= smallest <= usual <= largest")
    return least, usual, most


def main(args: argparse.Namespace) -> None:
    """Build each precision, one line a plan; on a GPU each is run against the ONNX."""
    wanted = ort.parse_precisions(args.precision)
    shapes = parse_shapes(args.shapes)
    if args.onnx.suffix != ".onnx":
        raise UserError(f"{args.onnx}: suffix is {args.onnx.suffix!r}; the input is an .onnx file")
    if args.out and len(wanted) > 1:
        raise UserError(f"-o {args.out}: one name for {len(wanted)} precisions; leave it out")
    calibration = None
    if "int8" in wanted:
        calibration = ort.calibration_images(args.onnx, args.calib).shown
    failed = []
    for precision in wanted:
        plan, sidecar = make(args.onnx, args.out, precision, args.backend, shapes, calibration)
        told, verdict = ran(args.onnx, plan)
        print(
            f"{plan}: {sidecar['size_mb']:.2f} MB in {sidecar['seconds']:.1f} s, {sidecar['backend']} "
            f"{sidecar['version']}, {precision}, batches {sidecar['shapes']}, {told}"
        )
        failed += [f"{plan}: {told}"] if verdict == "FAIL" else []
    if failed:
        raise GateFailed("; ".join(failed))


def ran(source: Path, plan: Path) -> tuple[str, str]:
    """The parity of a plan with its ONNX, told in a line, and the verdict."""
    try:
        session = TrtSession(plan)
    except Unavailable as error:
        return f"not run here: {error}", "skipped"
    reference = ort.OrtSession(source, 1)
    x = inputs.shown(reference)
    a, b = inputs.run(reference, x), inputs.run(session, x)
    row = agreement.row(plan, session, a, b, agreement.Gates())
    return agreement.describe(row), row["verdict"]


def show(args: argparse.Namespace) -> None:
    """`info PLAN`: what it is, where it was built, whether it can run here."""
    sidecar = engine.read_sidecar(args.plan)
    gpu = sidecar["gpu"]
    print(f"{args.plan}: {sidecar['backend']} {sidecar['version']}, {sidecar['size_mb']:.2f} MB")
    print(
        f"  precision {sidecar['precision']}, batches {sidecar['shapes']} (smallest, usual, largest)"
    )
    onnx = sidecar["onnx"]
    print(f"  from {onnx['file']}, opset {onnx['opset']}, sha256 {onnx['sha256'][:16]}")
    print(
        f"  built on {gpu['name']}, SM {gpu['sm']}, driver CUDA {gpu['driver']}"
        if gpu
        else "  built without a GPU"
    )
    reason = engine.obstacle(sidecar)
    print(f"  runs here: {'no, ' + reason if reason else 'yes'}")


def parser() -> argparse.ArgumentParser:
    """The command line that builds."""
    p = argparse.ArgumentParser(prog="exporters.trt", description=__doc__)
    p.add_argument("onnx", type=Path, help="an fp32 .onnx file, ours or anyone's; or `info PLAN`")
    p.add_argument("-o", "--out", type=Path, help="the plan; a name that tells it if not given")
    p.add_argument("--precision", default="fp32", help="of fp32,fp16,int8")
    p.add_argument(
        "--calib", type=Path, help="images to calibrate int8 on: a folder or a prepared one"
    )
    p.add_argument("--shapes", default="1,1,8", help="smallest, usual and largest batch")
    p.add_argument("--backend", default="auto", help="auto, tensorrt or rtx")
    return p


def info_parser() -> argparse.ArgumentParser:
    """The command line of `info`."""
    p = argparse.ArgumentParser(prog="exporters.trt info", description=show.__doc__)
    p.add_argument("plan", type=Path)
    return p


if __name__ == "__main__":
    if sys.argv[1:2] == ["info"]:
        cli.run(show, info_parser(), sys.argv[2:])
    cli.run(main, parser())
