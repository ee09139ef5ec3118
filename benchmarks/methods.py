"""Every method on one recipe, several seeds: `python -m benchmarks.methods params.yaml --seeds 3`.

The prepared images, the teacher and its features are those of the last `dvc repro`; the seed varies what the
student starts from, the order of the images, the swap masks and Trans. Writes a table and its JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import statistics
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks import record
from pipeline import cli, config, data, evaluate, files, models, training
from pipeline.errors import UserError

SCHEMA = "cakd.methods/1"
PREPARED = Path("data/prepared")
TEACHER = Path("artifacts/teacher/teacher.safetensors")
FEATURES = Path("data/features")
WORK = Path(".work/benchmarks")


def override(params: dict[str, Any], assignments: list[str]) -> None:
    """Apply `distill.cakd.swap_p=0` and the like; values are read as YAML. Raises UserError: no such key."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        *folders, last = key.split(".")
        place = params
        for folder in folders:
            place = place.get(folder, {})
        if not equals or last not in place:
            raise UserError(
                f"-S: got {assignment!r}; allowed: an existing key of the recipe, key=value"
            )
        place[last] = YAML(typ="safe", pure=True).load(io.StringIO(text))


def measure(
    settings: training.Distill, judge: evaluate.Evaluate, method: str, seed: int, folder: Path
) -> dict[str, float]:
    """Train one student and judge it: top-1 clean and noisy as fractions, milliseconds a step."""
    prepared = data.Prepared.open(PREPARED)
    seeded = dataclasses.replace(settings, seed=seed)
    out = folder / f"{method}-{seed}"
    figures = training.distill(
        seeded, method, prepared, TEACHER, FEATURES, out, WORK / "unfinished"
    )
    model, description = models.load(out / "student.safetensors")
    found = evaluate.accuracy(model, description["preprocess"], prepared, judge)
    return {
        "clean": found["clean"]["top1"],
        "noisy": found["noisy"]["top1"],
        "step_ms": sum(figures["stage_ms"].values()),
    }


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """The Markdown table: mean and range over the seeds, in percent; step cost as a ratio to the first method."""
    first = statistics.median(r["step_ms"] for r in next(iter(runs.values())))
    lines = [
        "| method | clean top-1 (%) by seed | mean | noisy top-1 (%) by seed | mean | step time / "
        f"{next(iter(runs))} |",
        "|---|---|--:|---|--:|--:|",
    ]
    for method, rows in runs.items():
        cells = []
        for what in ("clean", "noisy"):
            values = [100 * r[what] for r in rows]
            cells += [" ".join(f"{v:.1f}" for v in values), f"{statistics.fmean(values):.1f}"]
        cost = statistics.median(r["step_ms"] for r in rows) / first
        lines.append(f"| {method} | {' | '.join(cells)} | {cost:.1f} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    params = config.read(args.recipe)
    override(params, args.set)
    settings = config.parse(training.Distill, params.get("distill"), "distill")
    judge = config.parse(evaluate.Evaluate, params.get("evaluate"), "evaluate")
    methods = args.methods or list(settings.methods)
    dataclasses.replace(
        settings, methods=tuple(methods)
    )  # refuses unknown names before any training
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for seed in range(args.seeds):
        for method in methods:
            runs[method].append(measure(settings, judge, method, seed, WORK))
    shown = table(runs)
    print(shown)
    if args.out is None:
        return
    made_by = files.provenance(dataclasses.asdict(settings), teacher=TEACHER)
    changes = "".join(f" -S {s}" for s in args.set)
    chosen = f" --methods {' '.join(args.methods)}" if args.methods else ""
    command = f"python -m benchmarks.methods {args.recipe}{chosen} --seeds {args.seeds}{changes}"
    record.write(args.out, SCHEMA, {"runs": runs}, made_by, command, shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.methods", description=__doc__)
    parser.add_argument(
        "recipe", type=Path, help="a params file; its distill and evaluate sections count"
    )
    parser.add_argument("--methods", nargs="+", help="default: distill.methods of the recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    cli.run(main, parser)
