"""Every method on one recipe, several seeds: `python -m benchmarks.methods digits --seeds 5 --teachers 3`.

Images, teacher and features are made once a teacher, below .work/benchmarks; the seed varies what the student
starts from, the order of the images, the swap masks and Trans. A finished run is stored, so a killed benchmark
goes on. Writes a table and its JSON: mean top-1, differences paired by seed, each the mean over the teachers,
with their 95 % intervals (Student's t over the seeds), top-1 under noise, and the time of a step. With --controls
every method that reads the teacher is also compared with its own control: its settings, batches and views, and
none of its terms.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks import record
from benchmarks.runs import Run, Runs, command, merged, recorded
from pipeline.core import artifacts, cli
from pipeline.distill.methods.table import paired, reads, terms_of
from pipeline.distill.settings import Distill

SCHEMA = "cakd.methods/3"
AGAINST = ("plain", "logits", "control", "plain+trans")


def control_of(method: str) -> str:
    """The method's control: the same transform of the student's images and no terms."""
    return "control+trans" if "trans" in terms_of(method) else "control"


def interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean of paired differences and the half width of its 95 % interval (Student's t); None of one run."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * error


def over_teachers(differences: Sequence[float], teachers: int) -> list[float]:
    """The mean of each seed: a baseline without a teacher is one run for all, so only seeds are independent."""
    starts = range(0, len(differences), teachers)
    return [statistics.fmean(differences[at : at + teachers]) for at in starts]


def compared(
    runs: dict[str, list[Run]],
    controls: dict[str, list[Run]] | None = None,
    teachers: int = 1,
) -> dict[str, dict[str, Any]]:
    """Of every method: means, paired differences in percentage points with half widths, step time over plain's.

    Runs are in the order of the seeds, and of the teachers within a seed.
    """
    cost = {m: statistics.median(r["step_ms"] for r in rows) for m, rows in runs.items()}
    table: dict[str, dict[str, Any]] = {}
    for method, rows in runs.items():
        row: dict[str, Any] = {
            what: 100 * statistics.fmean(r[what] for r in rows) for what in ("clean", "noisy")
        }
        others = {name: runs[name] for name in AGAINST if name in runs and name != method}
        if controls and method in controls:
            others["own_control"] = controls[method]
        for name, other in others.items():
            for what in ("clean", "noisy"):
                pairs = [100 * (a[what] - b[what]) for a, b in zip(rows, other, strict=True)]
                mean, half = interval(over_teachers(pairs, teachers))
                row[f"{what}_minus_{name}"] = {"mean": mean, "half_width_95": half}
        if "plain" in runs:
            row["step_over_plain"] = cost[method] / cost["plain"]
        table[method] = row
    return table


def cell(row: Mapping[str, Any], name: str) -> str:
    """A difference with its half width; empty where there is none."""
    if name not in row:
        return ""
    half = row[name]["half_width_95"]
    return f"{row[name]['mean']:+.1f}" + (f" ± {half:.1f}" if half is not None else "")


def teacher_row(first: Sequence[str], differences: int, noisy: str) -> str:
    """The teacher's row: its first cells, as many empty ones as other rows have differences, its noisy top-1."""
    return f"| {' | '.join([*first, *[''] * differences, noisy, '', '', ''])} |"


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, the teachers first."""
    controls = any("clean_minus_own_control" in row for row in result["methods"].values())
    against = [*AGAINST, *(["own_control"] if controls else [])]
    heads = [f"minus {name.replace('_', ' ')}" for name in against]
    lines = [
        f"| method | clean top-1 (%) | {' | '.join(heads)} | noisy top-1 (%) | minus plain | minus "
        f"{against[-1].replace('_', ' ')} | step / plain |",
        "|---|--:" + "|--:" * (len(against) + 4) + "|",
    ]
    teachers = result["teachers"]
    clean, noisy = (
        " ".join(f"{100 * teacher[what]:.1f}" for teacher in teachers)
        for what in ("clean", "noisy")
    )
    lines.append(teacher_row(["teacher", clean], len(against), noisy))
    for method, row in result["methods"].items():
        cost = f"{row['step_over_plain']:.1f}" if "step_over_plain" in row else ""
        differences = " | ".join(cell(row, f"clean_minus_{name}") for name in against)
        lines.append(
            f"| {method} | {row['clean']:.1f} | {differences} | {row['noisy']:.1f} "
            f"| {cell(row, 'noisy_minus_plain')} | {cell(row, f'noisy_minus_{against[-1]}')} | {cost} |"
        )
    plain = result["methods"].get("plain")
    if plain and 100 * statistics.fmean(t["clean"] for t in teachers) <= plain["clean"]:
        lines.insert(0, "**The teacher is not better than the plain student.**\n")
    lines += [
        "",
        f"{result['seeds']} seeds of the student under each of {len(teachers)} teachers; ± half a 95 % interval "
        "over the seeds of the difference, its mean over the teachers, points. `plain` sees labelled images only; "
        "`control` is plain on the batches of the distilled methods; a method's own control has its settings and "
        "no term.",
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    params = merged(args.recipe, args.data, args.set)
    by_teacher = [Runs.of(args.recipe, params, number) for number in range(args.teachers)]
    settings = by_teacher[0].section(Distill)
    methods = args.methods or list(settings.methods)
    for method in methods:
        terms_of(method)  # refuses unknown names before any training
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    controls: dict[str, list[Run]] = {}
    for seed in range(args.seeds):
        for shared in by_teacher:
            for method in methods:
                host = shared if reads(method, "teacher") else by_teacher[0]  # trained once
                runs[method].append(host.run(settings, method, seed))
                if args.controls and paired(method) and "control" not in method:
                    own = settings.of_method(method)
                    control = by_teacher[0].run(own, control_of(method), seed)
                    controls.setdefault(method, []).append(control)
    result = {
        "recipe": args.recipe,
        "seeds": args.seeds,
        "teachers": [shared.on_test(shared.teacher) for shared in by_teacher],
        "methods": compared(runs, controls, args.teachers),
        "runs": runs,
        "controls": controls,
    }
    text = markdown(result)
    print(text)
    if args.out is None:
        return
    teachers = {f"teacher {n}": shared.teacher for n, shared in enumerate(by_teacher)}
    made_by = artifacts.provenance(recorded(params), **teachers)
    own = [f"--seeds {args.seeds} --teachers {args.teachers}"]
    own += ["--controls"] if args.controls else []
    record.write(args.out, SCHEMA, result, made_by, command("methods", args, *own), text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.methods", description=__doc__)
    parser.add_argument("recipe", help="a name of recipes/")
    parser.add_argument("--data", metavar="PATH", help="where its images are (prepare.path)")
    parser.add_argument("--methods", nargs="+", help="default: distill.methods of the recipe")
    parser.add_argument("--seeds", type=int, default=5, help="of the student")
    parser.add_argument("--teachers", type=int, default=1, help="seeds of the teacher")
    parser.add_argument("--controls", action="store_true", help="compare each with its own control")
    parser.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    cli.run(main, parser)
