"""ONNX -> OpenVINO IR, and OpenVINO as a session whose precision is asked for and read back.

`python -m exporters.ov student.onnx [-o DIR] [--precision fp32,fp16,int8] [--calib DIR] [--cache DIR]`
A precision that fails its gate is refused and not written. fp16 is how the weights are stored; what the CPU
computes in is chosen when the IR is opened. Without a hint OpenVINO takes bfloat16 on CPUs that have it: twice as
fast, and a different network by 2-6e-3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exporters import agreement, graph, inputs, int8, onnx_file, ort, ort_session
from exporters.device.ov import compiled, computes_in, shared_core
from exporters.quiet import quiet
from exporters.session import Array, Unavailable, checked_output, checked_shape
from pipeline import cli, files
from pipeline.errors import GateFailed, UserError

NOTES = "cakd"  # the branch of rt_info that holds the notes
OPENINGS = 5  # pairs, to tell what a cache of compiled models gains


def _library() -> Any:
    """openvino, with its telemetry off: the package falls back to its own stub when the sender is absent."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise Unavailable(
            f"OpenVINO is missing ({error}); `pip install '.[openvino]'`, without it ov-* targets are skipped"
        ) from None
    return openvino


def convert(source: Path, out: Path, half: bool = False, batch: int | None = None) -> None:
    """ONNX file -> `out` (.xml and .bin beside it), the notes in rt_info; `half` stores weights as fp16.

    `batch` fixes a free one. Raises UserError: OpenVINO cannot read the file, another batch is fixed in it.
    """
    notes = onnx_file.notes(onnx_file.read(source))
    _save(_read(source, batch), {**notes, **({"precision": "fp16"} if half else {})}, out, half)


def _read(source: Path, batch: int | None) -> Any:
    """Raises UserError: OpenVINO cannot read the file, or another batch is fixed in it."""
    core = shared_core(_library())
    try:
        model = core.read_model(source)
        shape = model.inputs[0].partial_shape
    except Exception as error:  # openvino raises bare RuntimeErrors
        raise UserError(f"{source}: OpenVINO refuses it: {_short(error)}") from None
    if batch:
        if shape[0].is_static and shape[0].get_length() != batch:
            raise UserError(f"--batch {batch}: {source} fixes it at {shape[0]}; leave it out")
        shape[0] = batch
        model.reshape(shape)
    return model


def _save(model: Any, notes: Mapping[str, str], out: Path, half: bool = False) -> None:
    for key, value in notes.items():
        model.set_rt_info(value, [NOTES, key])
    files.make_parent(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as folder:
        made = Path(folder) / out.name
        _library().save_model(model, made, compress_to_fp16=half)
        move(made, out)


def move(made: Path, out: Path) -> None:
    """Put a finished IR, two files, in its place: the weights first."""
    made.with_suffix(".bin").replace(out.with_suffix(".bin"))
    made.replace(out)


class OvSession:
    """OpenVINO on the CPU, one stream. `precision`: "fp32" and "int8" hint f32, "bf16" that, "default" nothing.

    With a folder `cache` it opens what was compiled there for this IR, CPU, OpenVINO and these options.
    """

    def __init__(self, path: Path, threads: int, precision: str, cache: Path | None = None) -> None:
        ov = _library()
        if not path.is_file() or not path.with_suffix(".bin").is_file():
            raise UserError(f"{path}: an IR is two files, .xml and .bin; one of them is missing")
        with path.open("rb") as f:
            if b"<net" not in f.read(4096):  # OpenVINO would try every other format it knows on it
                raise UserError(f"{path}: no <net>; expected the .xml of an OpenVINO IR")
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        if precision != "default":
            options["INFERENCE_PRECISION_HINT"] = "bf16" if precision == "bf16" else "f32"
        try:
            core = shared_core(ov)
            model = core.read_model(path)
            self._compiled = compiled(core, ov.__version__, path, options, cache)
        except Exception as error:
            raise UserError(f"{path}: OpenVINO refuses it: {_short(error)}") from None
        if len(model.inputs) != 1:
            raise UserError(f"{path}: has {len(model.inputs)} inputs; allowed: one image input")
        self._request = self._compiled.create_infer_request()
        self.runtime = f"openvino {ov.__version__.split('-')[0]}"
        self.metadata: Mapping[str, str] = _notes(model)
        self.input_shape = checked_shape(_dims(model.inputs[0], path), self.metadata, path)
        made = model.outputs[0]
        kind = made.element_type.to_string()
        checked_output(kind, _dims(made, path), self.input_shape, path)

    def run(self, x: Array) -> Array:
        """x (B, 3, S, S) float32 -> the first output, (B, K) float32, copied out of the runtime."""
        logits: Array = self._request.infer([x], share_inputs=False, share_outputs=False)[0]
        return logits

    @cached_property
    def precision_effective(self) -> str:
        """What most convolutions and matrix products of the compiled graph run in."""
        return computes_in(self._compiled)


def _dims(port: Any, path: Path) -> list[int | None]:
    """The declared shape, None where it is free. Raises UserError: not even its rank is declared."""
    shape = port.partial_shape
    if shape.rank.is_dynamic:
        raise UserError(f"{path}: {port.node.friendly_name} has no declared shape; export it again")
    return [d.get_length() if d.is_static else None for d in shape]


def _notes(model: Any) -> dict[str, str]:
    """The notes of `exporters.metadata` in rt_info; empty in an IR made by another tool."""
    held = model.get_rt_info([NOTES]).value if model.has_rt_info([NOTES]) else {}
    return {key: str(value) for key, value in held.items()} if isinstance(held, dict) else {}


def _short(error: Exception) -> str:
    """The last line that says something: OpenVINO wraps its reason in C++ source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def make(
    source: Path,
    out: Path,
    precision: str,
    pictures: int8.Pictures | None,
    how: int8.Settings,
    by: str = "qdq",
    batch: int | None = None,
) -> dict[str, Any]:
    """fp32 ONNX -> IR at fp32, fp16 (weights) or, by `pictures`, int8; returns its parity row.

    int8 comes from our QDQ ONNX, or of NNCF where `by` is `nncf`; `batch` fixes a free one. Opened with the f32
    hint, so that the row judges the conversion and not the CPU's choice of precision.
    Raises GateFailed, and leaves `out` as it was, where the verdict is FAIL.
    """
    _library()
    reference = ort_session.OrtSession(source, 1)
    x, labels = inputs.shown(reference, 2 * (batch or 5)), None
    files.make_parent(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as folder:
        draft = Path(folder) / out.name
        if precision == "int8":
            assert pictures is not None
            x, labels = pictures.held, pictures.labels
            quantize = _by_nncf if by == "nncf" else _by_qdq
            quantize(source, pictures, how, draft, batch)
        else:
            convert(source, draft, precision == "fp16", batch)
        session = OvSession(draft, 1, "fp32")
        row = agreement.passed(out, (reference, session), x, labels, how.drop)
        move(draft, out)
    return row


def _by_qdq(
    source: Path, pictures: int8.Pictures, how: int8.Settings, out: Path, batch: int | None
) -> None:
    quantized = out.with_suffix(".onnx")
    onnx_file.save(int8.quantized(source, pictures, how, agreement.Gates()), quantized)
    convert(quantized, out, batch=batch)


def _by_nncf(
    source: Path, pictures: int8.Pictures, _: int8.Settings, out: Path, batch: int | None
) -> None:
    """NNCF's post-training quantization, MIXED: symmetric weights, asymmetric activations.

    Raises Unavailable: NNCF is missing; UserError: it refuses the network.
    """
    network = _read(source, batch)
    entry = network.inputs[0].partial_shape[0]
    size = entry.get_length() if entry.is_static else 1
    shown = pictures.shown[: len(pictures.shown) // size * size]
    try:
        with quiet():
            import nncf

            made = nncf.quantize(
                network,
                nncf.Dataset(list(shown.reshape(-1, size, *shown.shape[1:]))),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(shown) // size,
            )
    except ImportError as error:
        raise Unavailable(
            f"--int8-by nncf: NNCF is missing ({error}); `pip install '.[nncf]'`, or leave the option out"
        ) from None
    except Exception as error:  # whatever its passes raise
        raise UserError(
            f"{source}: NNCF refuses it: {_short(error)}; leave --int8-by out"
        ) from None
    notes = onnx_file.notes(onnx_file.read(source))
    _save(made, {**notes, "precision": "int8", "int8": "by NNCF"}, out)


def main(args: argparse.Namespace) -> None:
    """Write each precision, one line a file; a failed gate is told once all are written."""
    wanted = ort.parse_precisions(args.precision)
    if args.onnx.suffix != ".onnx":
        raise UserError(f"{args.onnx}: suffix is {args.onnx.suffix!r}; the input is an .onnx file")
    if "int8" in wanted and args.calib is None:
        raise UserError(int8.NO_CALIBRATION)
    out = (args.out or args.onnx.parent) / f"{args.onnx.stem}.xml"
    how = int8.Settings(args.calibration, args.search_seconds)
    pictures = int8.calibration_images(args.onnx, args.calib) if "int8" in wanted else None
    failed = []
    for precision in wanted:
        target = ort.beside(out, precision)
        start = time.perf_counter()
        try:
            row = make(args.onnx, target, precision, pictures, how, args.int8_by, args.batch)
        except GateFailed as error:
            failed.append(str(error))
            continue
        size = sum(p.stat().st_size for p in graph.parts(target)) / 1e6
        seconds = time.perf_counter() - start
        made = f"{row['int8']}, " if "int8" in row else ""
        print(
            f"{target}: {size:.2f} MB in {seconds:.1f} s, computes in "
            f"{row['precision_effective']}, {made}{agreement.describe(row)}"
        )
        if args.cache:
            print(_kept(target, args.cache))
    if failed:
        raise GateFailed("; ".join(failed))


def _kept(ir: Path, cache: Path) -> str:
    """Fill the cache with the IR, and tell what opening it costs with it and without."""

    def cpu_seconds(folder: Path | None) -> float:
        start = time.process_time()
        OvSession(ir, 1, "fp32", folder)
        return time.process_time() - start

    cpu_seconds(cache)
    ratios = [cpu_seconds(cache) / cpu_seconds(None) for _ in range(OPENINGS)]
    return f"{ir}: compiled into {cache}; opens in {np.median(ratios):.2f} of the CPU time"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="exporters.ov", description=__doc__)
    p.add_argument("onnx", type=Path, help="an fp32 .onnx file, ours or anyone's")
    p.add_argument("-o", "--out", type=Path, help="folder of the IR; beside the ONNX if not given")
    p.add_argument("--precision", default="fp32", help="of fp32,fp16,int8")
    int8.add_options(p)
    p.add_argument(
        "--int8-by", choices=("qdq", "nncf"), default="qdq", help="our QDQ graph, or NNCF"
    )
    p.add_argument(
        "--batch",
        type=cli.count,
        metavar="N",
        help="fix a free batch: faster where a call is short",
    )
    p.add_argument(
        "--cache", type=Path, help="also compile each IR for one thread of this CPU, kept in here"
    )
    return p


if __name__ == "__main__":
    cli.run(main, parser())
