"""int8 of trained students: what it costs in top-1, what it gains in CPU time over fp32 in ONNX Runtime.

`python -m benchmarks.int8 --student NAME STUDENT.onnx CALIB TEST [--student ...] [--out F]`
CALIB has the images for the ranges and for the search. TEST has other images, for the accuracy: a folder of
labelled images, or a prepared one, of which the test split is read.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import record
from exporters.artifact import agreement, inputs, metadata
from exporters.artifact.session import TARGETS, Array, Session
from exporters.bench.compare import compare_artefacts
from exporters.bench.measure import Subject
from exporters.open import open_session
from exporters.ort import export, int8
from exporters.ort.session import OrtSession
from exporters.ov import convert
from pipeline.core import artifacts, cli
from pipeline.core.errors import GateFailed, UserError
from pipeline.data.prepared import Prepared, normalised

SCHEMA = "cakd.benchmark.int8/1"
MAKERS: dict[str, tuple[str, str, Callable[..., dict[str, Any]]]] = {
    "ORT, QDQ": ("ort-int8", ".onnx", partial(export.convert_onnx, precision="int8")),
    "OpenVINO, QDQ": ("ov-int8", ".xml", partial(convert.convert_to_ir, precision="int8")),
    "OpenVINO, NNCF": (
        "ov-int8",
        ".xml",
        partial(convert.convert_to_ir, precision="int8", by="nncf"),
    ),
}


def test_images(session: Session, folder: Path) -> tuple[Array, NDArray[np.int64]]:
    """All labelled test images, preprocessed by the network's metadata: (N, 3, S, S) and (N,).

    Raises UserError: no image with a label, a prepared folder of another size, a network without metadata.
    """
    preprocess = metadata.preprocessing(session.metadata)
    if preprocess is None or not (folder / "index.json").is_file():
        x, labels = inputs.labelled_images(folder, session, 1 << 16)
    else:
        prepared = Prepared.open(folder)
        rows = prepared.rows("test")
        if prepared.image_size != preprocess["image_size"]:
            raise UserError(
                f"{folder}: image size: got {prepared.image_size} px; expected {preprocess['image_size']}; "
                "give a folder of the network's size"
            )
        x, labels = normalised(prepared.images.squares(rows), preprocess), prepared.labels[rows]
    known = labels >= 0
    if not known.any():
        raise UserError(f"{folder}: got no labelled image; expected folders named as the classes")
    return x[known], labels[known]


def student(name: str, onnx: str, calib: str, test: str) -> dict[str, Any]:
    """Top-1 of fp32, and a row for each way to int8."""
    source = Path(onnx)
    reference = OrtSession(source, 1)
    pictures = int8.calibration_images(source, Path(calib))
    x, labels = test_images(reference, Path(test))
    exact = inputs.run_batches(reference, x)
    result: dict[str, Any] = {
        "images": len(x),
        "fp32_top1": float((exact.argmax(axis=1) == labels).mean()),
        "int8": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for maker, (target, suffix, make) in MAKERS.items():
            out = Path(folder) / f"{name}-int8{suffix}"
            try:
                made = make(source, out, images=pictures, settings=int8.Settings())
            except (GateFailed, UserError) as error:
                result["int8"][maker] = {"reason": str(error).split(": ", 1)[-1]}
                continue
            got = inputs.run_batches(open_session(TARGETS[target], out, 1), x)
            candidate = Subject(out.name, out, TARGETS[target])
            baseline = Subject(source.name, source, TARGETS["ort-fp32"])
            versus, _ = compare_artefacts(candidate, baseline, 0, None)
            result["int8"][maker] = {
                "made": made.get("int8"),
                "sqnr_centered_db": made["sqnr_centered_db"],
                "top1_drop": agreement.top1_drop(exact, got, labels),
                "cpu_over_ort_fp32": versus["ratio"],
                "reason": versus["reason"],
            }
    return result


def table(result: dict[str, Any]) -> str:
    """The Markdown table: a line a student and maker."""
    lines = [
        "| student | fp32 top-1 (%) | int8 by | made | SQNR (dB) | top-1 lost (points) "
        "| CPU time over ORT fp32 |",
        "|---|--:|---|---|--:|--:|---|",
    ]
    for name, figures in result["students"].items():
        head = f"| {name} | {100 * figures['fp32_top1']:.1f} of {figures['images']} images"
        for maker, row in figures["int8"].items():
            if row["reason"]:
                lines.append(f"{head} | {maker} | stays fp32: {row['reason']} | | | |")
                continue
            ratio, drop = row["cpu_over_ort_fp32"], 100 * row["top1_drop"]
            times = f"{ratio['median']:.2f} ({ratio['ci_low']:.2f} to {ratio['ci_high']:.2f})"
            lines.append(
                f"{head} | {maker} | {row['made']} | {row['sqnr_centered_db']:.1f} | {drop:+.1f} | {times} |"
            )
    lines += ["", "One thread, batch 1; the ratio is paired by round, with its 95 % interval."]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    result = {"students": {name: student(name, *files) for name, *files in args.student}}
    text = table(result)
    print(text)
    if args.out:
        options = " ".join(f"--student {name} {name}.onnx CALIB TEST" for name, *_ in args.student)
        made_by = artifacts.provenance({"students": [name for name, *_ in args.student]})
        command = f"python -m benchmarks.int8 {options}"
        record.write(args.out, SCHEMA, result, made_by, command, text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmarks.int8", description=__doc__)
    made.add_argument(
        "--student",
        nargs=4,
        action="append",
        required=True,
        metavar=("NAME", "ONNX", "CALIB", "TEST"),
        help="a trained student, images to calibrate on, labelled images for the accuracy",
    )
    made.add_argument("--out", type=Path, help="where to write, without suffix")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
