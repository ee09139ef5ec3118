"""A teacher of the project's own, trained, judged and kept: `python -m benchmarks.teacher cifar100-vit --data P`.

Trains the teacher of a recipe, or goes on with it; `--minutes` stops at a checkpoint. Writes the weights in
float16 and the JSON that rebuilds them to `--out` (benchmarks/assets/<recipe>), for `teach.weights` and
`teach.guide`, and beside them `<out>-figures`: top-1 of that very file on val and test, passes over the images,
hours of processor time (of calls that ended in good order). `--check` trains nothing: it evaluates the kept file
and refuses figures that are not those of its record.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.evidence import deadline
from benchmarks.runs import RECIPES, Runs, command, merged, recorded
from pipeline.core import artifacts, cli
from pipeline.core.errors import GateFailed
from pipeline.models import checkpoint
from pipeline.teach import Teach

SCHEMA = "cakd.teacher/1"
ASSETS = Path("benchmarks/assets")
# Of top-1: another processor rounds otherwise, and a few of 10,000 images change sides.
TOLERANCE = 0.001


def train(runs: Runs, minutes: float | None) -> None:
    """Train the teacher unless it is there, and add this call's processor time to that of the calls before."""
    spent = runs.folder / "teacher-seconds.json"
    before = artifacts.read_json(spent)["seconds"] if spent.exists() else 0.0
    started = time.process_time()
    try:
        with deadline(minutes):
            runs.make_teacher()
    finally:
        artifacts.write_json(spent, {"seconds": before + time.process_time() - started})


def judged(runs: Runs, path: Path) -> dict[str, float]:
    """Top-1 of a checkpoint, as fractions: on val, on test, and on test under noise."""
    on_test = runs.on_test(path)
    return {"val": runs.on_val(path)["top1"], "clean": on_test["clean"], "noisy": on_test["noisy"]}


def keep(runs: Runs, out: Path, line: str) -> None:
    """Write the trained weights in float16 to `out`, evaluate what was written, and record the figures."""
    model, description = checkpoint.load(runs.teacher)
    weights = out.with_suffix(".safetensors")
    checkpoint.save(weights, model.half(), description)
    settings: Teach = runs.section(Teach)
    parameters = sum(p.numel() for p in model.parameters())
    result: dict[str, Any] = {
        "figures": judged(runs, weights),
        "parameters": parameters,
        "passes": settings.epochs,
        "cpu_hours": artifacts.read_json(runs.folder / "teacher-seconds.json")["seconds"] / 3600,
    }
    made_by = artifacts.provenance(recorded(runs.params), weights=weights)
    record.write(figures_of(out), SCHEMA, result, made_by, line, markdown(result))


def figures_of(out: Path) -> Path:
    """Where the record of a kept teacher is, without suffix."""
    return out.with_name(f"{out.name}-figures")


def markdown(result: dict[str, Any]) -> str:
    """The record as a table of one row."""
    tops = (f"{100 * result['figures'][name]:.2f}" for name in ("val", "clean", "noisy"))
    row = [f"{result['parameters']:,}", f"{result['passes']}", f"{result['cpu_hours']:.1f}", *tops]
    heads = "weights", "passes", "CPU hours", "val top-1 (%)", "test top-1 (%)", "under noise (%)"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["--:"] * len(heads), row))


def check(runs: Runs, out: Path) -> None:
    """Evaluate the kept file. Raises GateFailed: figures that are not those of its record."""
    expected = artifacts.read_json(figures_of(out).with_suffix(".json"), SCHEMA)["figures"]
    for name, got in judged(runs, out.with_suffix(".safetensors")).items():
        print(f"{name}: {100 * got:.2f} %, recorded {100 * expected[name]:.2f} %")
        if abs(got - expected[name]) > TOLERANCE:
            raise GateFailed(
                f"{out}: {name} top-1: got {got:.4f}; expected {expected[name]:.4f}, as recorded; the data or the "
                "evaluation has changed"
            )


def main(args: argparse.Namespace) -> None:
    """Train, judge and keep a teacher, or check a kept one."""
    out = args.out or ASSETS / args.recipe
    runs = Runs.at(args.recipe, merged(args.recipe, args.data, args.set))
    runs.make_prepared()
    if args.check:
        check(runs, out)
        return
    train(runs, args.minutes)
    if not runs.teacher.exists():
        print(f"{runs.folder}: not trained to its end yet; run again to go on")
        return
    keep(runs, out, command("teacher", args))
    print(figures_of(out).with_suffix(".md").read_text(encoding="utf-8"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(prog="benchmarks.teacher", description=__doc__)
    line.add_argument("recipe", help=f"a name of {RECIPES}/")
    line.add_argument("--data", metavar="PATH", help="where its images are (prepare.path)")
    line.add_argument("--minutes", type=float, help="stop after them, in good order")
    line.add_argument("--check", action="store_true", help="evaluate the kept file again")
    line.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE")
    line.add_argument("--out", type=Path, help="where the weights are kept, without suffix")
    line.set_defaults(methods=None)  # of `command`
    return line


if __name__ == "__main__":
    cli.run(main, parser())
