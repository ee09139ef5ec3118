"""Latency of any artefact in any runtime: one row each, or a paired verdict per target. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from exporters.artifact.input_shape import add_shape_option, fixed_input
from exporters.artifact.session import TARGETS
from exporters.bench import checks
from exporters.bench.measure import Measurement, Subject, measure_rows, save_samples
from exporters.bench.subjects import Bench, bench_document, subjects_of
from exporters.bench.verdicts import baseline_file, noise_floor, run_comparisons, verdict_line
from exporters.bench.worker import read_reference
from pipeline.core import artifacts, cli
from pipeline.core.errors import GateFailed, UserError
from pipeline.core.machine import usable_cores

COLUMNS = (
    *("model", "target", "threads", "batch", "precision", "p50_ms", "p90_ms", "p99_ms", "min_ms"),
    *("cpu_p50_ms", "load_ms", "first_ms", "size_mb", "rss_mb"),
)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned plain text; a skipped row ends with its reason, a noisy one with its flags."""
    cells = [[*COLUMNS, ""]]
    for r in rows:
        wall = r["wall_ms"]
        numbers = [*(wall[k] for k in ("p50", "p90", "p99", "min")), r["cpu_ms"]["p50"]]
        numbers += [r[k] for k in ("load_ms", "first_ms", "size_mb", "rss_mb")]
        remark = f"skipped: {r['reason']}" if r["reason"] else ", ".join(r["flags"])
        precision = r["precision_effective"] or r["precision_requested"]
        texts = ["n/a" if n is None else f"{n:.4g}" for n in numbers]
        counts = [str(r["threads"]), str(r["batch"])]
        cells.append([r["model"], r["target"], *counts, precision, *texts, remark])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 5 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line[:-1], widths[:-1], strict=True))
        )
        + f"  {line[-1]}".rstrip()
        for line in cells
    )


def main(args: argparse.Namespace) -> None:
    """Measure or compare, print, write the files, and raise what failed."""
    with ExitStack() as stack:
        args.inputs = input_files(args)
        fixed = [stack.enter_context(fixed_input(path, args.shape)) for path in args.models]
        args.baselines = {}
        if args.against:
            args.baselines = {
                path.name: stack.enter_context(fixed_input(baseline_file(path, args), args.shape))
                for path in args.models
            }
        args.models = fixed
        measure(args)


def input_files(args: argparse.Namespace) -> dict[str, Path]:
    """The measured files as the user named them, by unique names for the provenance."""
    files: dict[str, Path] = {}
    for path in args.models:
        same = sum(other.name == path.name for other in files.values())
        files[f"{path.name} ({same + 1})" if same else path.name] = path
    if args.against:
        baselines = dict.fromkeys(baseline_file(path, args) for path in args.models)
        files |= {f"baseline/{path.name}": path for path in baselines}
    return files


def measure(args: argparse.Namespace) -> None:
    """Measure or compare artefacts of fixed input size, and write the files."""
    subjects = subjects_of(args.models, args.targets, args.threads, args.batch)
    if args.reference:
        read_reference(args.reference)
    verdicts: dict[str, Any] = {}
    if args.against or args.self_test:
        verdicts, results = run_comparisons(args, subjects)
    else:
        seconds = args.seconds / args.rounds
        results = measure_rows(subjects, args.rounds, seconds, args.seed, args.reference)
    rows = [result.row for result in results]
    print("\n".join([format_table(rows), *map(verdict_line, verdicts.get("comparisons", []))]))
    write_files(args, subjects, results, {**verdicts, "rows": rows})
    raise_failures(args, results, verdicts)


def write_files(
    args: argparse.Namespace,
    subjects: Sequence[Subject],
    results: Sequence[Measurement],
    content: dict[str, Any],
) -> None:
    """Write the files of `--json` and `--samples`; without the latter the calls go beside the JSON."""
    samples = args.samples or (args.json and args.json.with_suffix(".npz"))
    if samples:
        save_samples(samples, results)
    if args.json:
        names = dict.fromkeys(s.target.name for s in subjects)
        params: dict[str, Any] = {"seed": args.seed}
        if not content.get("comparisons"):  # those have a protocol of their own, and their rounds
            params |= {"rounds": args.rounds, "seconds": args.seconds}
        document = bench_document(",".join(names), params, args.inputs, **content)
        artifacts.write_json(args.json, document)


def raise_failures(
    args: argparse.Namespace, results: Sequence[Measurement], verdicts: dict[str, Any]
) -> None:
    """Raise what failed; after a self-test that passed, print the noise floor.

    Raises UserError: nothing could be measured or compared; GateFailed: a verdict is FAIL.
    """
    comparisons = verdicts.get("comparisons", [])
    failed = [verdict_line(c) for c in comparisons if c["verdict"] == "FAIL"]
    if failed:
        what = "self-test failed, the machine is too noisy" if args.self_test else "regression"
        raise GateFailed(f"{args.models[0]}: {what}: {'; '.join(failed)}")
    if not any(result.measured for result in results):
        raise UserError(f"no row could be measured: {results[0].row['reason']}")
    if comparisons and not any(c["ratio"] for c in comparisons):
        raise UserError(f"no comparison: {comparisons[0]['reason']}")
    if args.self_test:
        print(noise_floor(comparisons))


def _counts(text: str) -> list[int]:
    return [cli.count(part) for part in text.split(",")]


def _threads(text: str) -> list[int]:
    """As `_counts`, without duplicates; `all` is every core this process may use."""
    counts = [usable_cores() if part == "all" else cli.count(part) for part in text.split(",")]
    return list(dict.fromkeys(counts))


def _json(text: str) -> Path:
    if (path := Path(text)).suffix == ".npz":
        raise argparse.ArgumentTypeError(
            f"got {text}; .npz is the suffix of the samples; use .json"
        )
    return path


def _seconds(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; expected more than 0")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m exporters.bench`."""
    p = argparse.ArgumentParser(prog="python -m exporters.bench", description=__doc__)
    add = p.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help=".onnx, .xml, .safetensors, .plan")
    add(
        "--targets",
        type=lambda s: s.split(","),
        help=f"comma-separated list of {', '.join(TARGETS)}; default: by suffix",
    )
    add(
        "--threads",
        type=_threads,
        default=[1],
        metavar="N[,all]",
        help="threads, a row each; default 1",
    )
    add(
        "--batch",
        type=_counts,
        default=[None],
        metavar="N[,N]",
        help="images per call, a row each; default 1",
    )
    add(
        "--rounds",
        type=cli.count,
        default=Bench.rounds,
        help=f"blocks per row, default {Bench.rounds}",
    )
    add(
        "--seconds",
        type=_seconds,
        default=Bench.seconds_per_row,
        help="timed per row, default 3; a block, SECONDS/ROUNDS, should stay near 0.15",
    )
    add("--seed", type=int, default=0, help="of the shuffled order of the blocks, default 0")
    add("--reference", type=Path, metavar="NPZ", help="run its images x instead of smooth ones")
    add("--json", type=_json, metavar="F", help="write the rows and verdicts to F")
    add("--samples", type=Path, metavar="NPZ", help="write every call; default: F's name with .npz")
    add_shape_option(p)
    mode = p.add_mutually_exclusive_group()
    mode.add_argument(
        "--against",
        type=Path,
        metavar="BASELINE",
        help="a file, or a folder with a file of each MODEL's name: paired verdicts; FAIL exits 3",
    )
    mode.add_argument(
        "--self-test",
        action="store_true",
        help="compare MODEL with itself: the noise of this machine",
    )
    add("--against-target", metavar="NAME", help="target of BASELINE; default: that of MODEL")
    add("--allow", nargs="+", default=(), choices=checks.CHECKS, help="hard gates that may fail")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
