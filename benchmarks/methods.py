"""Every method on one recipe, several seeds: `python -m benchmarks.methods digits --seeds 5`.

The images, the teacher and its features are made once, below .work/benchmarks; the seed varies what the student
starts from, the order of the images, the swap masks and Trans. A finished run is kept, so a killed benchmark goes
on. Writes a table and its JSON: mean top-1, differences paired by seed to `plain` and to `logits` with their 95 %
intervals (Student's t over the seeds), top-1 under noise, and the time of a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from scipy import stats

from benchmarks import record
from pipeline import teach
from pipeline.core import artifacts, cli, config, progress
from pipeline.core.errors import UserError
from pipeline.data.prepared import Prepared
from pipeline.distill import distill
from pipeline.distill.methods.table import terms_of
from pipeline.distill.settings import Distill
from pipeline.evaluate import accuracy
from pipeline.models import checkpoint
from pipeline.models.teacher import load
from pipeline.prepare import prepare
from pipeline.project import recipes
from pipeline.store import policy, writing
from stages.check import SECTIONS

SCHEMA = "cakd.methods/2"
RECIPES = Path("recipes")
WORK = Path(".work/benchmarks")
AGAINST = ("plain", "logits")
Run = dict[str, float]


def override(params: dict[str, Any], assignments: Sequence[str]) -> None:
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


@dataclasses.dataclass(frozen=True)
class Bench:
    """One recipe with what all its methods share: images, teacher, features."""

    params: dict[str, Any]
    folder: Path

    def section(self, kind: type[Any]) -> Any:
        """A section of the recipe as its dataclass."""
        name = kind.__name__.lower()
        return config.parse(kind, self.params.get(name), name)

    @property
    def prepared(self) -> Prepared:
        """The prepared images."""
        return Prepared.open(self.folder / "prepared")

    @property
    def teacher(self) -> Path:
        """The teacher's weights."""
        return self.folder / "teacher" / "teacher.safetensors"

    def make_shared(self) -> None:
        """Prepare the images, teach and cache, each unless it is there."""
        folder = self.folder
        if not (folder / "prepared").exists():
            prepare.prepare(self.section(prepare.Prepare), folder / "prepared")
        if not self.teacher.exists():
            settings = self.section(teach.Teach)
            teach.teach(settings, self.prepared, folder / "teacher", folder / "work")
        if not (folder / "features").exists():
            cache = self.section(policy.Cache)
            told = progress.Progress("cache", cache.views * len(self.prepared.rows("train")))
            live = load(self.teacher)
            work = folder / "work"
            writing.write(cache, self.prepared, live, folder / "features", work, told)

    def judge(self, path: Path) -> Run:
        """Top-1 of a model, clean and under noise, as fractions."""
        model, description = checkpoint.load(path)
        settings = self.section(accuracy.Evaluate)
        found, _ = accuracy.accuracy(model, description["preprocess"], self.prepared, settings)
        return {"clean": found["clean"]["top1"], "noisy": found["noisy"]["top1"]}

    def run(self, settings: Distill, method: str, seed: int) -> Run:
        """Train one student and judge it; milliseconds a step too. A finished run is read, not repeated."""
        seeded = dataclasses.replace(settings, seed=seed, methods=(method,))
        features = self.folder / "features"
        mark = artifacts.digest(
            [
                dataclasses.asdict(seeded),
                artifacts.sha256(features / "manifest.json"),
                artifacts.code(distill.ROOMS),
            ]
        )
        kept = self.folder / "runs" / f"{method}-{seed}-{mark[:12]}.json"
        if kept.exists():
            found: Run = artifacts.read_json(kept)
            return found
        out = self.folder / "students" / f"{method}-{seed}"
        arguments = (seeded, method, self.prepared, self.teacher, features, out)
        figures = distill.distill(*arguments, self.folder / "work")
        found = self.judge(out / "student.safetensors")
        found["step_ms"] = sum(figures["stage_ms"].values())
        artifacts.write_json(kept, found)
        return found


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and the half width of its 95 % interval (Student's t); NaN for one seed."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * error


def compared(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Of every method: means, paired differences in percentage points with half widths, step time over plain's."""
    cost = {m: statistics.median(r["step_ms"] for r in rows) for m, rows in runs.items()}
    found: dict[str, dict[str, Any]] = {}
    for method, rows in runs.items():
        row: dict[str, Any] = {
            what: 100 * statistics.fmean(r[what] for r in rows) for what in ("clean", "noisy")
        }
        for other in AGAINST:
            if other not in runs or other == method:
                continue
            for what in ("clean", "noisy"):
                pairs = [100 * (a[what] - b[what]) for a, b in zip(rows, runs[other], strict=True)]
                mean, half = interval(pairs)
                row[f"{what}_minus_{other}"] = {"mean": mean, "half_width_95": half}
        if "plain" in runs:
            row["step_over_plain"] = cost[method] / cost["plain"]
        found[method] = row
    return found


def table(found: dict[str, Any]) -> str:
    """The Markdown table of what `compared` found, the teacher first."""
    lines = [
        "| method | clean top-1 (%) | minus plain | minus logits | noisy top-1 (%) | minus plain | step / plain |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    taught = found["teacher"]
    lines.append(f"| teacher | {100 * taught['clean']:.1f} | | | {100 * taught['noisy']:.1f} | | |")

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        return f"{row[name]['mean']:+.1f} ± {row[name]['half_width_95']:.1f}"

    for method, row in found["methods"].items():
        cost = f"{row['step_over_plain']:.1f}" if "step_over_plain" in row else ""
        lines.append(
            f"| {method} | {row['clean']:.1f} | {cell(row, 'clean_minus_plain')} "
            f"| {cell(row, 'clean_minus_logits')} | {row['noisy']:.1f} "
            f"| {cell(row, 'noisy_minus_plain')} | {cost} |"
        )
    plain = found["methods"].get("plain")
    if plain and 100 * taught["clean"] <= plain["clean"]:
        lines.insert(0, "**The teacher is not better than the plain student.**\n")
    lines += [
        "",
        f"{found['seeds']} seeds; ± half a 95 % interval of the paired difference, points.",
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    params = recipes.merged(args.recipe, RECIPES, SECTIONS, args.data)
    override(params, args.set)
    for name, kind in SECTIONS.items():
        config.parse(kind, params.get(name), name)
    shared = {name: params[name] for name in ("prepare", "teach", "cache")}
    bench = Bench(params, WORK / f"{args.recipe}-{artifacts.digest(shared)[:8]}")
    settings = bench.section(Distill)
    methods = args.methods or list(settings.methods)
    for method in methods:
        terms_of(method)  # refuses unknown names before any training
    bench.make_shared()
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    for seed in range(args.seeds):
        for method in methods:
            runs[method].append(bench.run(settings, method, seed))
    found = {
        "recipe": args.recipe,
        "seeds": args.seeds,
        "teacher": bench.judge(bench.teacher),
        "methods": compared(runs),
        "runs": runs,
    }
    shown = table(found)
    print(shown)
    if args.out is None:
        return
    params["prepare"]["path"] = None  # a place of this machine
    made_by = artifacts.provenance(params, teacher=bench.teacher)
    changes = "".join(f" -S {s}" for s in args.set)
    chosen = f" --methods {' '.join(args.methods)}" if args.methods else ""
    data_path = " --data PATH" if args.data else ""
    command = f"python -m benchmarks.methods {args.recipe}{data_path}{chosen} --seeds {args.seeds}{changes}"
    record.write(args.out, SCHEMA, found, made_by, command, shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.methods", description=__doc__)
    parser.add_argument("recipe", help="a name of recipes/")
    parser.add_argument("--data", metavar="PATH", help="where its pictures are (prepare.path)")
    parser.add_argument("--methods", nargs="+", help="default: distill.methods of the recipe")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    cli.run(main, parser)
