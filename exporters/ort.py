"""Checkpoint -> ONNX, checked in ONNX Runtime; its fp16 and int8 versions; and ONNX Runtime as a session.

`python -m exporters.ort CHECKPOINT student.onnx [--opset N] [--precision fp32,fp16,int8] [--calib DIR]`
CHECKPOINT may be an .onnx file, anyone's: it is checked, copied and converted without torch. A precision that
fails its gate is refused and not written.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporters import agreement, embed, inputs, metadata, onnx_file, quantize, sensitive
from exporters.quiet import quiet
from exporters.session import Array, Unavailable, checked_output, checked_shape
from pipeline import cli, files
from pipeline.data import normalised
from pipeline.errors import GateFailed, UserError, nearest

if TYPE_CHECKING:
    import onnx
    from torch import nn

OPSET = 18  # the one PyTorch's exporter writes natively; others are converted from it
BATCHES = (1, 2, 7)  # what a free batch axis must take
CALIBRATION = 256  # images to calibrate on, and as many at most to judge by
FEWEST = 8  # images int8 can be made from
PRECISIONS = ("fp32", "fp16", "int8")
NO_CALIBRATION = "--precision int8: no --calib; give a folder of images like those to come"


@dataclass(frozen=True)
class Export:
    """`export:` which student ships, as which ONNX, and how many images travel with it for the checks."""

    method: str
    opset: int = OPSET
    reference_images: int = 128
    calibration_images: int = 256

    def __post_init__(self) -> None:
        for name, least in (("reference_images", 2), ("calibration_images", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")


def export(checkpoint: Path, out: Path, opset: int = OPSET) -> dict[str, Any]:
    """Checkpoint -> ONNX at `out`, weights inside, batch free; returns the parity row of the check.

    Training-time branches (RepVGG) are merged first; the check is against the checkpoint as it was loaded.
    Raises UserError: torch cannot write that opset; GateFailed: ONNX Runtime computes something else.
    """
    try:
        from pipeline import models
    except ImportError as error:
        raise Unavailable(
            f"{checkpoint}: reading a checkpoint needs torch and timm: {error}"
        ) from None
    model, description = models.load(checkpoint)
    size = description["preprocess"]["image_size"]
    proto = onnx_file.annotate(_trace(model, size, opset), metadata.flatten(description))
    with files.atomic(out) as temporary:
        onnx_file.save(proto, temporary)
        return _check(model, temporary, out, size)


def _trace(model: nn.Module, size: int, opset: int) -> onnx.ModelProto:
    import torch
    from timm.utils.model import reparameterize_model

    sample = torch.from_numpy(inputs.smooth(2, size, size))
    merged = reparameterize_model(model).eval()
    try:
        with quiet():
            program = torch.onnx.export(
                merged,
                (sample,),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            proto: onnx.ModelProto = program.model_proto
    except Exception as error:  # torch wraps whatever its many passes raise
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise UserError(
            f"torch cannot export this network at opset {opset}: {reason}; try {OPSET}"
        ) from error
    if (got := onnx_file.opset(proto)) != opset:
        raise UserError(
            f"opset: asked for {opset}, torch wrote {got}; ask for {got} or for another one"
        )
    return proto


def _check(model: nn.Module, written: Path, out: Path, size: int) -> dict[str, Any]:
    """Run batches of 1, 2 and 7 in ONNX Runtime against torch."""
    import torch

    session = OrtSession(written, threads=1)
    x = np.split(inputs.smooth(sum(BATCHES), size, size), np.cumsum(BATCHES)[:-1])
    with torch.inference_mode():
        reference = model(torch.from_numpy(np.concatenate(x))).numpy()
    got = np.concatenate([session.run(part) for part in x])
    found = agreement.row(out, session, reference, got, agreement.Gates())
    if found["verdict"] == "FAIL":
        raise GateFailed(f"{out}: not the checkpoint: {found['reason']}; nothing was written")
    return found


class OrtSession:
    """ONNX Runtime on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path = path
        self._session = open_file(path, threads)
        taken = self._session.get_inputs()
        if len(taken) != 1 or taken[0].type != "tensor(float)":
            listed = ", ".join(f"{i.name} {i.type}" for i in taken)
            raise UserError(f"{path}: inputs are {listed}; allowed: one float32 image input")
        self._input = taken[0].name
        self._output = self._session.get_outputs()[0].name
        self.runtime = f"onnxruntime {_library().__version__}"
        self.metadata: Mapping[str, str] = _notes(self._session, path)
        self.input_shape = checked_shape(_dims(taken[0]), self.metadata, path)
        made = self._session.get_outputs()[0]
        checked_output(made.type, _dims(made), self.input_shape, path)

    def run(self, x: Array) -> Array:
        """x (B, 3, S, S) float32 -> the first output, (B, K) float32."""
        logits: Array = self._session.run([self._output], {self._input: x})[0]
        return logits

    @cached_property
    def precision_effective(self) -> str:
        """What most convolutions and matrix products take in, from a profile of one run in a second session."""
        with tempfile.TemporaryDirectory() as folder:
            session = open_file(self._path, 1, Path(folder) / "profile")
            x = inputs.smooth(self.input_shape[0] or 1, *self.input_shape[2:])
            session.run([self._output], {self._input: x})
            events = json.loads(Path(session.end_profiling()).read_text())
        kinds = Counter(
            _KINDS.get(next(iter(e["args"]["input_type_shape"][0])), "fp32")
            for e in events
            if any(word in e.get("args", {}).get("op_name", "") for word in _PRODUCTS)
            and e["args"].get("input_type_shape")
        )
        return kinds.most_common(1)[0][0] if kinds else "fp32"


_PRODUCTS = ("Conv", "Gemm", "MatMul", "Attention")
_KINDS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8", "int8": "int8"}


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"ONNX Runtime is missing ({error}); `pip install onnxruntime`") from None
    return onnxruntime


def open_file(path: Path, threads: int, profile: Path | None = None) -> Any:
    """ONNX Runtime's own session on the CPU. Raises UserError: no such file, refused by ONNX Runtime."""
    ort = _library()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an .onnx file")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # an error is raised too
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has one exception class per status code
        raise UserError(f"{path}: ONNX Runtime refuses it: {str(error)[:300]}") from None


def _notes(session: Any, path: Path) -> Mapping[str, str]:
    try:
        notes: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: its metadata is not text ({error}); export it again") from None
    return notes


def _dims(value: Any) -> list[int | None]:
    return [d if isinstance(d, int) else None for d in value.shape]


def beside(out: Path, precision: str) -> Path:
    """student.onnx -> student-int8.onnx; fp32 keeps the plain name."""
    return out if precision == "fp32" else out.with_stem(f"{out.stem}-{precision}")


def parse_precisions(text: str, allowed: tuple[str, ...] = PRECISIONS) -> list[str]:
    """`fp32,int8` -> the list. Raises UserError on an unknown one."""
    wanted = [p.strip() for p in text.split(",") if p.strip()]
    for precision in wanted:
        if precision not in allowed:
            raise UserError(f"--precision: got {precision!r}; {nearest(precision, allowed)}")
    if not wanted:
        raise UserError(f"--precision: got {text!r}; allowed: {', '.join(allowed)}")
    return wanted


@dataclass(frozen=True)
class Pictures:
    """Images (M, 3, S, S) to calibrate on; images (N, 3, S, S) to judge by with their labels (N,), -1 unknown."""

    shown: Array
    held: Array
    labels: NDArray[np.int64]


Calibration = Literal["minmax", "percentile", "entropy"]


@dataclass(frozen=True)
class Int8:
    """How int8 is made: what takes the ranges, and how long nodes to leave in float may be looked for."""

    calibration: Calibration = "minmax"
    search_s: float = 60.0
    drop: float = 0.01  # top-1 that may be lost on the images to judge by, as a fraction


def calibration_images(source: Path, folder: Path | None) -> Pictures:
    """Every other image of a folder to calibrate on, the others to judge by, as the ONNX's notes prepare them.

    Raises UserError: no folder given, fewer than 8 images, a network that answers NaN: its ranges have no scale.
    """
    if folder is None:
        raise UserError(NO_CALIBRATION)
    session = OrtSession(source, 1)
    batch = session.input_shape[0] or 1
    x, labels = inputs.labelled(folder, session, 2 * CALIBRATION)
    fewest = max(FEWEST, 2 * batch)
    if len(x) < fewest:
        raise UserError(f"--calib {folder}: holds {len(x)} images; int8 needs {fewest}")
    if not np.isfinite(session.run(x[:batch])).all():
        raise UserError(
            f"{source}: answers {folder} with NaN or infinity: int8 has no range for that"
        )
    held = slice(1, len(x) // 2 // batch * batch * 2, 2)
    return Pictures(x[::2], x[held], labels[held])


def to_int8(source: Path, pictures: Pictures, how: Int8, gates: agreement.Gates) -> onnx.ModelProto:
    """fp32 ONNX -> int8 for CPUs; what had to stay in float to meet the gates is told by the note `int8`."""
    reference = OrtSession(source, 1)
    expected = inputs.run(reference, pictures.held)

    def judge(network: onnx.ModelProto) -> sensitive.Judged:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / source.name
            onnx_file.save(network, path)
            got = inputs.run(OrtSession(path, 1), pictures.held)
        figures = agreement.figures(expected, got)
        verdict, _ = agreement.judge(figures, float(np.abs(expected).max()), "int8", gates)
        refused = agreement.loses(agreement.top1_drop(expected, got, pictures.labels), how.drop)
        decibel = figures["sqnr_centered_db"]
        return sensitive.Judged(
            verdict != "FAIL" and not refused, -math.inf if decibel is None else decibel
        )

    with quantize.Calibrated(onnx_file.read(source), pictures.shown, False, how.calibration) as net:
        found = sensitive.search(net, judge, how.search_s)
    return onnx_file.annotated(found.network, int8=found.told())


def convert(
    source: Path, out: Path, precision: str, pictures: Pictures | None, how: Int8
) -> dict[str, Any]:
    """fp32 ONNX `source` -> `out` at fp32 (a checked copy), fp16 or, by `pictures`, int8; returns its parity row.

    Raises GateFailed, and leaves `out` as it was, where the row's verdict is FAIL.
    """
    proto = onnx_file.read(source)
    reference = OrtSession(source, 1)
    x, labels = inputs.shown(reference), None
    if precision == "fp16":
        proto = quantize.to_fp16(proto)
    elif precision == "int8":
        assert pictures is not None
        proto = to_int8(source, pictures, how, agreement.Gates())
        x, labels = pictures.held, pictures.labels
    with files.atomic(out) as temporary:
        onnx_file.save(proto, temporary)
        session = OrtSession(temporary, 1)
        a, b = inputs.run(reference, x), inputs.run(session, x)
        row = agreement.row(out, session, a, b, agreement.Gates())
        if labels is not None:
            row = agreement.with_accuracy(row, a, b, labels, how.drop)
        if row["verdict"] == "FAIL":
            raise GateFailed(f"{out}: {row['reason']}; not written")
    return row


def write_embedded(source: Path, out: Path) -> dict[str, Any]:
    """fp32 ONNX `source` -> `out`, which takes (B, S, S, 3) uint8 RGB; returns its parity row.

    Raises UserError: no preprocessing in the metadata. GateFailed: not the same logits; nothing is written.
    """
    proto = onnx_file.read(source)
    notes = metadata.preprocessing(onnx_file.notes(proto))
    if notes is None:
        raise UserError(
            f"--embed-preprocessing: {source} carries no mean and std in its metadata; export it from a checkpoint"
        )
    reference = OrtSession(source, 1)
    smooth = inputs.shown(reference).transpose(0, 2, 3, 1)
    pixels = np.clip(smooth * 48 + 128, 0, 255).astype(np.uint8)
    with files.atomic(out) as temporary:
        onnx_file.save(embed.embedded(proto, notes["mean"], notes["std"]), temporary)
        got: Array = open_file(temporary, 1).run(None, {embed.PIXELS: pixels})[0]
        expected = inputs.run(reference, normalised(pixels, notes))
        row = agreement.row(out, reference, expected, got, agreement.Gates())
        if row["verdict"] == "FAIL":
            raise GateFailed(
                f"{out}: not the network it was made from: {row['reason']}; not written"
            )
    return row


def main(args: argparse.Namespace) -> None:
    """Write each precision beside `out`, one line a file; a failed gate is told once all are written."""
    wanted = parse_precisions(args.precision)
    foreign = args.checkpoint.suffix == ".onnx"
    if args.out.suffix != ".onnx":
        raise UserError(f"{args.out}: suffix is {args.out.suffix!r}; the output is an .onnx file")
    if foreign and args.opset:
        raise UserError(f"--opset {args.opset}: {args.checkpoint} keeps its own; leave it out")
    if "int8" in wanted and args.calib is None:
        raise UserError(NO_CALIBRATION)
    how = Int8(args.calibration, args.search_seconds)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        source = args.checkpoint
        if not foreign:
            source = args.out if "fp32" in wanted else Path(folder) / args.out.name
            line = _timed(source, partial(export, args.checkpoint, source, args.opset or OPSET))
            if "fp32" in wanted:
                print(line)
                wanted.remove("fp32")
        pictures = calibration_images(source, args.calib) if "int8" in wanted else None
        for precision in wanted:
            out = beside(args.out, precision)
            try:
                print(_timed(out, partial(convert, source, out, precision, pictures, how)))
            except GateFailed as error:
                failed.append(str(error))
        if args.embed_preprocessing:
            out = args.out.with_stem(f"{args.out.stem}-uint8")
            print(_timed(out, partial(write_embedded, source, out)))
    if failed:
        raise GateFailed("; ".join(failed))


def _timed(out: Path, make: Callable[[], dict[str, Any]]) -> str:
    """The line that tells `make()`'s row."""
    start = time.perf_counter()
    row = make()
    seconds = time.perf_counter() - start
    line = f"{out}: {out.stat().st_size / 1e6:.2f} MB in {seconds:.1f} s, computes in "
    made = f"{row['int8']}, " if "int8" in row else ""
    return f"{line}{row['precision_effective']}, {made}{agreement.describe(row)}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="exporters.ort", description=__doc__)
    p.add_argument("checkpoint", type=Path, help="a .safetensors checkpoint, or an .onnx file")
    p.add_argument(
        "out", type=Path, help="the .onnx to write; others get -fp16, -int8 in front of it"
    )
    p.add_argument("--opset", type=int, help=f"of a checkpoint's ONNX, {OPSET} if not given")
    p.add_argument("--precision", default="fp32", help="of fp32,fp16,int8")
    add_int8(p)
    p.add_argument(
        "--embed-preprocessing",
        action="store_true",
        help="also write OUT-uint8.onnx: takes (B, S, S, 3) uint8 pixels and normalises them inside",
    )
    return p


def add_int8(p: argparse.ArgumentParser) -> None:
    """The options that int8 is made by."""
    p.add_argument(
        "--calib", type=Path, help="images to calibrate int8 on: a folder or a prepared one"
    )
    p.add_argument(
        "--calibration", choices=tuple(quantize.METHODS), default="minmax", help="of the ranges"
    )
    p.add_argument(
        "--search-seconds",
        type=float,
        default=Int8.search_s,
        help="how long nodes to leave in float may be looked for where int8 fails its gates",
    )


if __name__ == "__main__":
    cli.run(main, parser())
