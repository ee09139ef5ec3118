"""The projector losses, measured: `python -m benchmarks.kernels`. A table and its JSON; on a GPU the ceilings too.

Four parts: `host` (an operator and a kernel that do nothing), `attention` (both terms of eq. 4), `tokens` (eq. 5
and 6) and `step` (a whole step of a student with both projectors). Every provider computes losses and gradients.
Times are medians of a call; on a GPU in milliseconds, with the L2 cache flushed, beside the device's own time: the
call replayed as a CUDA graph, and the sum over its kernels by the profiler (L2 warm). A row says what bounds it:
the host, the bytes at the measured copy rate, or the products. On a CPU times are ratios, taken in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]

from benchmarks import record
from benchmarks.kernel_works import (
    STUDENTS,
    STUDENTS_ON_CPU,
    Call,
    Student,
    Work,
    attention_work,
    host_work,
    step_work,
    tokens_work,
)
from benchmarks.shapes import ON_CPU, ON_GPU, Shape
from pipeline.core import artifacts, cli
from pipeline.core.errors import UserError, nearest

SCHEMA = "cakd.benchmark.kernels/2"
PARTS = ("host", "attention", "tokens", "step")
DTYPES = ("bfloat16", "float16", "float32")
TURNS = 7
MIN_CALLS = 5  # of which a median and fifths are drawn
HOST_BOUND = 1.25  # a call over its own device time, above which the device was waiting


@dataclass(frozen=True)
class Selection:
    """What one run measures: the parts, their shapes and students, in one dtype on one device."""

    parts: Sequence[str]
    shapes: Sequence[Shape]
    students: Sequence[Student]
    dtype: torch.dtype
    device: torch.device
    compiled: bool

    def works(self) -> Iterator[Work]:
        """Build the row groups one by one."""
        for part in self.parts:
            if part == "host":
                yield host_work(self.device)
                continue
            if part == "step":
                for student in self.students:
                    yield step_work(student, self.dtype, self.device, self.compiled)
                continue
            make = {"attention": attention_work, "tokens": tokens_work}[part]
            for shape in self.shapes:
                yield make(shape, self.dtype, self.device, self.compiled)


def measure(work: Work, where: torch.device, ceilings: dict[str, float] | None) -> dict[str, Any]:
    """Of every provider milliseconds (median, p20, p80); on a GPU peak MB above the inputs, launches, bound."""
    gpu = where.type == "cuda"
    times = _on_gpu(work.providers) if gpu else _in_turns(work.providers)
    rows: dict[str, Any] = {}
    for name, values in times.items():
        row: dict[str, Any] = {"ms": spread(values)}
        if gpu:
            row["peak_mb"] = _peak_mb(work.providers[name])
            row |= profiled(work.providers[name])
        rows[name] = row
    for name in rows:
        if gpu and name in work.capturable:
            rows[name] |= _replayed(work.providers[name])
        if ceilings:
            rows[name] |= bounds(rows[name], work, ceilings)
    return rows | {name: {"reason": why} for name, why in work.refused.items()}


def bounds(row: dict[str, Any], work: Work, ceilings: dict[str, float]) -> dict[str, Any]:
    """Least milliseconds by bytes and by products, their share of the call and of the device's time; the bound.

    The device's own time is that of the replayed graph, else the profiler's. A call that takes HOST_BOUND times as
    long is bound by the host, any other by the slower of bytes and products.
    """
    device, call = row.get("graph_ms", row["device_ms"]), row["ms"]["median"]
    found: dict[str, Any] = {"bound": "host"} if call > HOST_BOUND * device else {}
    if work.flops:
        by_bytes = work.bytes / ceilings["copy_gb_per_s"] / 1e6
        by_products = work.flops / ceilings["tflop_per_s"] / 1e9
        least = max(by_bytes, by_products)
        found = {"bound": "bytes" if by_bytes >= by_products else "products", **found}
        found |= {"bytes_ms": by_bytes, "products_ms": by_products}
        found["roofline_percent"] = 100 * least / call
        if device:
            found["device_roofline_percent"] = 100 * least / device
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80; a single value is all three."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def _in_turns(providers: dict[str, Call]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(TURNS):
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _on_gpu(providers: dict[str, Call]) -> dict[str, list[float]]:
    from triton.testing import do_bench

    return {name: timed(call, do_bench) for name, call in providers.items()}


def timed(call: Call, bench: Callable[..., Any]) -> list[float]:
    """Milliseconds of at least MIN_CALLS calls by Triton's `do_bench`.

    It makes as many calls as fit into its 100 ms: a single one where a call is slower than that. It is then run
    again for the time that MIN_CALLS take.
    """
    values: list[float] = list(bench(call, return_mode="all"))
    if len(values) < MIN_CALLS:
        ms = 2 * MIN_CALLS * max(values)
        values = list(bench(call, warmup=1, rep=ms, return_mode="all"))
    return values


def _peak_mb(call: Call) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def profiled(call: Call) -> dict[str, float]:
    """Kernels, copies and fills that one call starts on the device, and the sum of their times."""
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() or () if e.device_type == DeviceType.CUDA]
    device_us = sum(event.time_range.elapsed_us() for event in events)
    return {"launches": len(events), "device_ms": device_us / 1e3}


def _replayed(call: Call) -> dict[str, Any]:
    """Milliseconds of the call as a CUDA graph: no host in it. With the reason where it cannot be captured."""
    from triton.testing import do_bench

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
        return {"graph_ms": statistics.median(timed(graph.replay, do_bench))}
    except Exception as error:  # a provider may wait for the device, which ends a capture
        torch.cuda.synchronize()
        return {"graph_reason": (str(error).splitlines() or [type(error).__name__])[0]}


def measured_ceilings(kind: torch.dtype) -> dict[str, float]:
    """GB/s of a large copy and TFLOP/s of a large product in this dtype on this GPU."""
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / do_bench(lambda: target.copy_(source)) / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=kind) for _ in range(2))
    return {"copy_gb_per_s": copied, "tflop_per_s": 2 * 8192**3 / do_bench(lambda: a @ b) / 1e9}


COLUMNS = (
    "ms",
    "graph ms",
    "device ms",
    "launches",
    "peak MB",
    "bound",
    "% of roofline",
    "% of it on the device",
)


def table(result: dict[str, Any]) -> str:
    """The Markdown table: ratios to the first provider; on a GPU times, launches, memory and bound too."""
    ceilings = result["ceilings"]
    more = "".join(f" {name} |" for name in COLUMNS) if ceilings else ""
    lines = [f"| work | provider | speed |{more}", "|---|---|--:|" + "--:|" * more.count("|")]
    for title, rows in result["work"].items():
        base = next((row["ms"]["median"] for row in rows.values() if "ms" in row), 0.0)
        for name, row in rows.items():
            if "reason" in row:
                cells = " |" * more.count("|")
                lines.append(f"| {title} | {name} | not measured: {row['reason']} |{cells}")
                continue
            cells = " " + " | ".join(_cells(row)) + " |" if ceilings else ""
            lines.append(f"| {title} | {name} | {base / row['ms']['median']:.2f}× |{cells}")
    if ceilings:
        rate, products = ceilings["copy_gb_per_s"], ceilings["tflop_per_s"]
        lines += [
            "",
            f"Ceilings measured: {rate:.0f} GB/s (copy), {products:.0f} TFLOP/s (product).",
        ]
    else:
        lines += ["", "GPU: not measured."]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    """The cells of COLUMNS; empty where a row has no such figure."""
    graph, shares = row.get("graph_ms"), ("roofline_percent", "device_roofline_percent")
    return [
        f"{row['ms']['median']:.3f}",
        "" if graph is None else f"{graph:.3f}",
        f"{row['device_ms']:.3f}",
        str(row["launches"]),
        f"{row['peak_mb']:.0f}",
        row.get("bound", ""),
        *(f"{row[share]:.0f}" if share in row else "" for share in shares),
    ]


def run(selection: Selection, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure a selection; `save` gets the result after every row group, so that a killed run leaves its rows."""
    gpu = selection.device.type == "cuda"
    ceilings = measured_ceilings(selection.dtype) if gpu else None
    result: dict[str, Any] = {
        "dtype": str(selection.dtype).removeprefix("torch."),
        "ceilings": ceilings,
        "work": {},
    }
    for work in selection.works():
        result["work"][work.title] = measure(work, selection.device, ceilings)
        save(result)
    return result


def selected_shapes(gpu: bool, tokens: Sequence[int], first: int | None) -> tuple[Shape, ...]:
    """The shapes of this kind of device with one of these token counts (all where none is named).

    Raises UserError: no shape has that many tokens.
    """
    shapes = ON_GPU if gpu else ON_CPU
    known = {shape.n for shape in shapes}
    for n in tokens:
        if n not in known:
            raise UserError(f"--tokens: got {n}; {nearest(n, map(str, sorted(known)))}")
    return tuple(shape for shape in shapes if not tokens or shape.n in tokens)[:first]


def write(out: Path | None, params: dict[str, Any], command: str, result: dict[str, Any]) -> None:
    """Write `<out>.json` and `<out>.md` where `out` is not None."""
    if out is not None:
        text = f"{result['dtype']}\n\n{table(result)}"
        record.write(out, SCHEMA, result, artifacts.provenance(params), command, text)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    gpu = torch.cuda.is_available()
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    selection = Selection(
        args.parts,
        selected_shapes(gpu, args.tokens, args.shapes),
        (STUDENTS if gpu else STUDENTS_ON_CPU)[: args.shapes],
        getattr(torch, dtype),
        torch.device("cuda" if gpu else "cpu"),
        gpu or args.compile,
    )
    params = {k: v for k, v in vars(args).items() if k != "out"}
    command = _command(args)
    result = run(selection, partial(write, args.out, params, command))
    print(table(result))


def _command(args: argparse.Namespace) -> str:
    """The command that repeats the measurement."""
    words = ["python -m benchmarks.kernels"]
    if tuple(args.parts) != PARTS:
        words += ["--parts", *args.parts]
    if args.tokens:
        words += ["--tokens", *map(str, args.tokens)]
    for name in ("shapes", "dtype"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    return " ".join([*words, *(["--compile"] if args.compile else [])])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    made.add_argument("--shapes", type=int, help="only the first so many")
    made.add_argument("--tokens", type=int, nargs="+", default=[], metavar="N", help="only these N")
    made.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    made.add_argument(
        "--compile", action="store_true", help="torch.compile too, on a CPU (needs g++)"
    )
    made.add_argument("--out", type=Path, help="where to write, without suffix")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
