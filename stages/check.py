"""Stage check: validate params.yaml as a whole, in seconds, before any stage that takes time.

Every section is parsed strictly, the sections are compared with each other, and teacher and student are built once
without weights. With `--recipe NAME` params.yaml is written from that recipe first; with
`--data PATH` alone from the recipe that fits these images.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from exporters.bench.subjects import Bench
from exporters.build import Build
from exporters.ort.export import Export
from pipeline.core import cli, config
from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError, nearest
from pipeline.core.students import BEST, MAIN
from pipeline.distill import settings
from pipeline.distill.methods.table import check_stored, reads
from pipeline.evaluate.accuracy import Evaluate
from pipeline.models import checkpoint
from pipeline.models.student import check_feature_maps, find_tap, probe_student
from pipeline.prepare.settings import Prepare
from pipeline.prepare.survey import survey
from pipeline.project import choosing, recipes
from pipeline.project.rehearsal import rehearse
from pipeline.quantize.settings import Quantize
from pipeline.report.budgets import check_targets
from pipeline.report.summary import Report
from pipeline.store.policy import Cache, check_layout
from pipeline.teach import Teach, check_fits

SECTIONS: dict[str, type[Any]] = {
    section.__name__.lower(): section
    for section in (
        *(Prepare, Teach, Cache, settings.Distill, Quantize),
        *(Evaluate, Export, Build, Bench, Report),
    )
}
# The same bytes every time: the stages that depend on this file do not run again because of it.
CHECKED = "params.yaml was correct\n"
CLASSES = 10  # any number: the shapes that are checked do not depend on it


def main(args: argparse.Namespace) -> None:
    """Write params.yaml from the recipe where one is named, check it, and write `args.out` where it is named."""
    params, recipe = args.params, args.recipe
    values: choosing.Values = {}
    if recipe is None and args.data is not None:
        if not args.force and recipes.written_for(args.data, params):
            print(f"{params}: chosen for {args.data} before, kept; to choose again: FORCE=1")
        else:
            if not args.force:
                recipes.check_unedited(args.recipes, params, SECTIONS)
            recipe, values = chosen(args.data, args.recipes)
    if recipe is not None:
        arguments = (recipe, args.recipes, params, SECTIONS, args.data, args.force, values)
        print(recipes.apply(*arguments))
    elif args.force:
        raise UserError(
            f"--force: got --recipe {recipe} and --data {args.data}; expected one of them; "
            "pass RECIPE=NAME or DATA=PATH"
        )
    print(f"{params}: correct; {check_params(params)}")
    if args.out is not None:
        with atomic(args.out) as file:
            file.write_text(CHECKED)


def chosen(data: str, folder: Path) -> tuple[str, choosing.Values]:
    """Choose a recipe and its budgets for these images, say why and how long it takes here, and return both.

    On a CPU the budgets are cut where the run would not end within the hour.
    """
    surveyed, gpu = survey(Path(data).expanduser()), torch.cuda.is_available()
    choice = choosing.choose(surveyed, gpu)
    print(f"{data}: recipe {choice.recipe}, for {choice.reason}; another one: RECIPE=NAME")
    params = recipes.merged(choice.recipe, folder, SECTIONS, data, choice.values)
    images = choosing.sizes(surveyed, params)
    asked = choosing.budget(params, images)
    print(
        "timing a few steps of every stage on generated images, half a minute or more", flush=True
    )
    costs = rehearse(params, surveyed.reading)
    plan = asked if gpu else choosing.within(choosing.LIMIT_MINUTES, costs, images, asked)
    busy = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    print(f"here it takes about {choosing.duration(costs, images, plan)}, as measured now ({busy})")
    if plan.passes > params["teach"]["epochs"]:
        more = f"{params['teach']['epochs']} to {plan.passes}"
        print(f"teach.epochs raised from {more}: {images.labelled:,} labelled images are few")
    if plan != asked:
        cut = [
            f"{section}.{key} {before} to {plan.values()[section][key]}"
            for section, keys in asked.values().items()
            for key, before in keys.items()
            if before != plan.values()[section][key]
        ]
        print(
            f"cut so that it ends within the hour: {', '.join(cut)}; uncut about "
            f"{choosing.duration(costs, images, asked).partition(' (')[0]}: RECIPE={choice.recipe}"
        )
    values = plan.values()
    for section, keys in choice.values.items():
        values[section] = values.get(section, {}) | keys
    return choice.recipe, values


def check_params(params: Path) -> str:
    """Check every section, and return models, image size and tap in a line. Raises UserError: any mistake."""
    prepare = config.load(Prepare, params)
    teach = config.load(Teach, params)
    distill = config.load(settings.Distill, params)
    export = config.load(Export, params)
    bench = config.load(Bench, params)
    report = config.load(Report, params)
    cache = config.load(Cache, params)
    for section in (Evaluate, Build, Quantize):
        config.load(section, params)
    if export.method not in (BEST, *distill.methods):
        raise UserError(
            f"export.method: got {export.method!r}, which is not in distill.methods; "
            f"{nearest(export.method, (BEST, *distill.methods))}"
        )
    names = (BEST, MAIN, *distill.students)
    if export.student not in names:
        raise UserError(
            f"export.student: got {export.student!r}, which is not in distill.students; "
            f"{nearest(export.student, names)}"
        )
    check_targets(report.budgets, bench.enabled)
    if "gain_min" in report.budgets and "plain" not in distill.methods:
        raise UserError(
            f"report.budgets: got gain_min, a gain over plain, with distill.methods {', '.join(distill.methods)}; "
            "expected plain too; add it"
        )
    for method in {*distill.methods, *distill.tuned}:
        distill.of_method(method)
    tap = check_models(prepare, teach, cache, distill)
    for name in distill.students:
        try:
            check_models(prepare, teach, cache, distill.of_student(name))
        except UserError as error:
            raise UserError(f"distill.students.{name}: {error}") from None
    return f"{teach.model} teaches {distill.student} at {prepare.image_size} px, {tap}"


def check_models(prepare: Prepare, teach: Teach, cache: Cache, distill: settings.Distill) -> str:
    """Build teacher and student without weights, and return tap and tokens in a line.

    Raises UserError: unknown models, kwargs that they do not take, another image size, no replayable block,
    a method that reads an attention the teacher does not have, no feature map for the tap.
    """
    vit = checkpoint.create(teach.model, teach.kwargs, CLASSES, "teach")
    spec = check_fits(vit, teach, prepare.image_size)
    for method in distill.methods:
        stored = {"mode": cache.mode, "layout": cache.layout, "no_attention": spec.no_attention}
        check_stored(method, stored, distill.cakd.layer)
    check_layout(cache, spec)
    _warn_token_pooled(teach, vit, distill)
    student = checkpoint.create(distill.student, distill.student_kwargs, CLASSES, "distill")
    if not any(reads(method, "teacher") for method in distill.methods):
        return "no method reads a teacher"
    student_spec = probe_student(student, prepare.image_size)
    read = frozenset().union(*(reads(method, "student") for method in distill.methods))
    if "stages" in read:
        check_feature_maps(student, student_spec)
    if "tap" not in read:
        return "no method reads a tap"
    tap = find_tap(student, prepare.image_size, spec.grid, distill.cakd.tap)
    rows, columns = tap.grid
    return f"tap {tap.module} {rows}x{columns} for {tap.tokens[0]}x{tap.tokens[1]} tokens"


def _warn_token_pooled(teach: Teach, vit: Any, distill: settings.Distill) -> None:
    """Warn on stderr where methods read patch tokens that the teacher's own training gives no gradient."""
    if getattr(vit, "global_pool", None) != "token" or distill.cakd.layer == "before_last":
        return
    reading = [m for m in distill.methods if reads(m, "teacher") & {"tokens", "qkv"}]
    if reading:
        print(
            f"warning: teach.model {teach.model} pools by its class token, so its training gives the patch tokens "
            f"of its last block no gradient; {', '.join(reading)} read these; set teach.kwargs global_pool: avg, "
            "fc_norm: false, or distill.cakd.layer: before_last (docs/decisions.md, 4)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.check", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="a file to write where all is correct")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--recipe", metavar="NAME", help="write params.yaml from recipes/NAME.yaml")
    parser.add_argument(
        "--data", metavar="PATH", help="images (prepare.path); without --recipe it chooses one"
    )
    parser.add_argument("--force", action="store_true", help="overwrite edits of params.yaml")
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="folder of recipes")
    cli.run(main, parser)
