"""Data of the charts that the summary lacks: every call of a bench, the loss curves. Torch-free."""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError
from pipeline.report.deadline import over_deadline

KEPT_SAMPLES = 61  # latencies kept of each row, evenly spaced in rank, both extremes included
MAX_CALLS = 10_000_000  # of a row: a file from elsewhere must not fill the memory
HEADER = 1024  # bytes of an array's file before its values, at most
DAMAGED = (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, KeyError)
Curves = dict[str, list[list[float]]]  # loss term -> [[step, mean], ...]


def with_samples(
    bench: dict[str, Any], path: Path, deadline_ms: float | None = None
) -> dict[str, Any]:
    """The content of the bench JSON at `path`; `samples_ms` in its rows where an .npz with them stands beside it.

    With a deadline the rows have `over_deadline` too (`deadline.over_deadline`), of every call.
    Raises UserError: an .npz that is damaged or of another run.
    """
    beside = path.with_suffix(".npz")
    if not beside.is_file():
        return bench
    try:
        with zipfile.ZipFile(beside) as archive, np.load(beside, allow_pickle=False) as arrays:
            rows = [
                {**row, **_of_calls(archive, arrays, number, row, deadline_ms)}
                if row["status"] == "measured"
                else row
                for number, row in enumerate(bench["rows"])
            ]
    except DAMAGED as error:
        raise UserError(
            f"{beside}: not the calls of {path.name} ({error}); run the bench again or remove it"
        ) from None
    return {**bench, "rows": rows}


def _of_calls(
    archive: zipfile.ZipFile,
    arrays: Any,
    number: int,
    row: Mapping[str, Any],
    deadline_ms: float | None,
) -> dict[str, Any]:
    """`samples_ms` of a row, and with a deadline `over_deadline`. Raises one of DAMAGED: not of its figures."""
    calls = _calls(archive, arrays, number, row)
    samples = {"samples_ms": thin(calls.tolist())}
    if deadline_ms is None:
        return samples
    starts = _block_starts(archive, arrays, number, len(calls))
    return {**samples, "over_deadline": over_deadline(calls, starts, deadline_ms)}


def _calls(
    archive: zipfile.ZipFile, arrays: Any, number: int, row: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Wall times of a row's calls, ms. Raises one of DAMAGED: not those of its figures."""
    name, wall = f"{number}.wall_ms", row["wall_ms"]
    if archive.getinfo(f"{name}.npy").file_size > HEADER + 8 * min(wall["n"], MAX_CALLS):
        raise ValueError(f"row {number} has more than its {wall['n']} calls, or than {MAX_CALLS}")
    calls: NDArray[np.float64] = np.asarray(arrays[name], dtype=np.float64)
    own = calls.shape == (wall["n"],) and math.isclose(np.median(calls), wall["p50"], rel_tol=1e-3)
    if not own or not (np.isfinite(calls) & (calls > 0)).all():
        raise ValueError(f"row {number} has not {wall['n']} calls with a p50 of {wall['p50']} ms")
    return calls


def _block_starts(
    archive: zipfile.ZipFile, arrays: Any, number: int, calls: int
) -> NDArray[np.int64]:
    """Index of the first call of each block. Raises one of DAMAGED: not in a row of so many calls."""
    name = f"{number}.block_start"
    if archive.getinfo(f"{name}.npy").file_size > HEADER + 8 * calls:
        raise ValueError(f"row {number} has more blocks than its {calls} calls")
    starts: NDArray[np.int64] = np.asarray(arrays[name], dtype=np.int64)
    if starts.ndim != 1 or starts[:1].tolist() != [0] or (np.diff(starts, append=calls) < 1).any():
        raise ValueError(f"row {number} has blocks that do not divide its {calls} calls")
    return starts


def thin(samples: Sequence[float]) -> list[float]:
    """At most KEPT_SAMPLES of the samples, sorted, evenly spaced in rank, with the fastest and the slowest."""
    ordered = sorted(samples)
    if len(ordered) <= KEPT_SAMPLES:
        return ordered
    step = (len(ordered) - 1) / (KEPT_SAMPLES - 1)
    return [ordered[round(i * step)] for i in range(KEPT_SAMPLES)]


def with_curves(training: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The figures of every method, with the `curves` of folder/<method>.csv. Raises UserError: none, damaged."""
    return {m: {**t, "curves": read_curves(folder / f"{m}.csv")} for m, t in training.items()}


def read_curves(path: Path) -> Curves:
    """Every loss of a CSV of the stage distill, a column a term. Raises UserError: missing, not numbers."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, restkey="", restval="")
            curves: Curves = {term: [] for term in (table.fieldnames or ["step"]) if term != "step"}
            for row in table:
                for term, line in curves.items():
                    if row[term]:
                        line.append([int(row["step"]), _finite(row[term])])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage distill (`dvc repro`)") from None
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: no table of losses ({error}); run its stage again") from None
    return curves


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"a loss is {text}")
    return value


def without_raw(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary without samples and curves, as edge.json holds it."""
    return {
        **summary,
        "targets": [
            {k: _without(v, "samples_ms") if isinstance(v, dict) else v for k, v in t.items()}
            for t in summary["targets"]
        ],
        "training": {m: _without(t, "curves") for m, t in summary["training"].items()},
    }


def _without(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k != key}


def sampled(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether every measured row has its samples."""
    return all(row.get("samples_ms") for row in rows if row["status"] == "measured")
