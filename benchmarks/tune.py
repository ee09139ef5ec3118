"""Settings of every method chosen on val: `python -m benchmarks.tune digits --methods plain logits --trials 8`.

Every method gets the same budget: trial 0 is the recipe as it is, the others are draws of the learning rate, the
labelled share and the weights and temperatures of the method's own terms, the same draws for the same method and
number of trials. `--grid` adds points of the caller's own: every combination of its values, of the keys that the
method reads; several grids are several lists. The best is that with the highest clean top-1 on val; of equals that
with the lowest negative log-likelihood. Test is never opened. Each finished trial is stored, so a killed search
goes on. The choices are written to recipes/tuned/<recipe>.yaml, which `make repro RECIPE=` and the benchmarks
merge into `distill.tuned`.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.runs import Run, Runs, command, merged, recorded, value
from pipeline.core import artifacts, cli
from pipeline.core.errors import UserError
from pipeline.distill.methods.table import TERMS, WITHOUT_LOSS, paired, terms_of
from pipeline.distill.settings import Distill
from pipeline.project import recipes

SCHEMA = "cakd.tune/1"
LR = (0.5, 1.0, 2.0)  # times the recipe's
ALONE = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of a method without weights to draw
MAX_DRAWS = 1000  # until every trial differs from the others
WEIGHT = (0.3, 1.0, 3.0, 10.0)  # times the recipe's
SHARES = (0.25, 0.5, 0.75)
TEMPERATURES = (1.0, 2.0, 4.0)
TUNED_TEMPERATURES = ("logits", "dkd")  # the others' are part of their definition

Choice = dict[str, Any]  # dotted key below `distill` -> value


def trials(settings: Distill, method: str, count: int) -> Iterator[Choice]:
    """`count` choices that make different settings, the first empty: a function of the method and the recipe.

    Every method gets as many settings, one without a teacher too; fewer only where there are no more.
    """
    yield {}
    draw = random.Random(f"tune {method}")
    tried = [settings.with_choice({}, method)]
    rates = ALONE if all(term in WITHOUT_LOSS for term in terms_of(method)) else LR
    for _ in range(MAX_DRAWS):
        if len(tried) == count:
            return
        choice: Choice = {"lr": settings.lr * draw.choice(rates)}
        if paired(method):
            choice["labelled_share"] = draw.choice(SHARES)
        for term in dict.fromkeys(terms_of(method)):
            choice |= _of_term(settings, term, draw)
        if (made := settings.with_choice(choice, method)) not in tried:
            tried.append(made)
            yield choice


def _of_term(settings: Distill, term: str, draw: random.Random) -> Choice:
    """Draws of one term: every weight it has, and the temperature where it is free."""
    if term == "adversarial":
        weight = settings.cakd.adversarial_weight
        return {"cakd.adversarial_weight": _times(weight, draw)}
    if term in WITHOUT_LOSS:
        return {}
    (kind, name), section = TERMS[term], _section(term)
    own = settings.of_term(name)
    weights = dict.fromkeys(kind.losses.values())
    choice = {f"{section}.{key}": _times(getattr(own, key), draw) for key in weights}
    if term in TUNED_TEMPERATURES:
        choice[f"{section}.temperature"] = draw.choice(TEMPERATURES)
    return choice


def parsed(text: str) -> tuple[str, list[Any]]:
    """Read `lr=0.002,0.004`, values as YAML. Raises UserError: no key, or no value."""
    key, _, values = text.partition("=")
    if not key or not values:
        raise UserError(
            f"--grid: got {text!r}; expected key=value,value with a key below distill; correct it"
        )
    return key, value(f"[{values}]")


def points(settings: Distill, method: str, grid: Mapping[str, Sequence[Any]]) -> Iterator[Choice]:
    """Every combination of the grid's values, of the keys that the method reads, but for the recipe's own."""
    others = {_section(term) for term in TERMS} - {_section(term) for term in terms_of(method)}
    read = {
        key: values
        for key, values in grid.items()
        if not any(key.startswith(f"{section}.") for section in others)
        and (key != "labelled_share" or paired(method))
    }
    for values in itertools.product(*read.values()):
        choice = dict(zip(read, values, strict=True))
        if settings.with_choice(choice, method) != settings:
            yield choice


def _section(term: str) -> str:
    """Where below `distill` the settings of a term are."""
    name = "cakd" if term in WITHOUT_LOSS else TERMS[term][1]
    return name if name in ("logits", "cakd") else f"terms.{name}"


def _times(weight: float, draw: random.Random) -> float:
    return float(f"{weight * draw.choice(WEIGHT):.6g}")


def best(scores: list[Run]) -> int:
    """The trial with the highest top-1, of equals that with the lowest negative log-likelihood."""
    return max(range(len(scores)), key=lambda i: (scores[i]["top1"], -scores[i]["nll"]))


def markdown(result: dict[str, Any]) -> str:
    """A row a method: val of the recipe as it is, val of the best trial, what that changed; then a row a trial."""
    lines = [
        "| method | val top-1 (%), recipe | val nll, recipe | val top-1 (%), best | val nll, best | chosen |",
        "|---|--:|--:|--:|--:|---|",
    ]
    every = ["", "| method | trial | val top-1 (%) | val nll |", "|---|---|--:|--:|"]
    for method, row in result["methods"].items():
        scored = [
            (changes(c), *figures(s)) for c, s in zip(row["trials"], row["scores"], strict=True)
        ]
        (_, *first), (chosen, *last) = scored[0], scored[row["best"]]
        lines.append(f"| {' | '.join([method, *first, *last, chosen])} |")
        every += [f"| {' | '.join([method, *trial])} |" for trial in scored]
    return "\n".join(lines + every)


def changes(choice: Choice) -> str:
    """What a trial changes."""
    words = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in choice.items())
    return ", ".join(words) or "the recipe"


def figures(score: Run) -> tuple[str, str]:
    """Top-1 in per cent and negative log-likelihood of a trial."""
    return f"{100 * score['top1']:.1f}", f"{score['nll']:.3f}"


def main(args: argparse.Namespace) -> None:
    """Search, print, write the choices beside the recipe and the record of the search to `<out>`."""
    changes = [*args.set, "distill.tuned={}"]
    params = merged(args.recipe, args.data, changes)
    shared = Runs.of(args.recipe, params)
    settings = shared.section(Distill)
    grids = [dict(parsed(text) for text in grid) for grid in args.grid]
    methods = args.methods or list(settings.methods)
    rows: dict[str, Any] = {}
    for method in methods:
        choices = [*trials(settings, method, args.trials)]
        for choice in itertools.chain(*(points(settings, method, grid) for grid in grids)):
            choices += [choice] if choice not in choices else []
        scores = [
            shared.run(settings.with_choice(choice, method), method, settings.seed, "val")
            for choice in choices
        ]
        rows[method] = {"trials": choices, "scores": scores, "best": best(scores)}
        recipes.write_tuned(args.recipe, args.recipes, method, choices[rows[method]["best"]])
    result = {"recipe": args.recipe, "methods": rows}
    text = markdown(result)
    print(text)
    if args.out is None:
        return
    made_by = artifacts.provenance(recorded(params), teacher=shared.teacher)
    given = [f"--grid {' '.join(grid)}" for grid in args.grid]
    line = command("tune", args, f"--trials {args.trials}", *given)
    record.write(args.out, SCHEMA, result, made_by, line, text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__)
    parser.add_argument("recipe", help="a name of recipes/")
    parser.add_argument("--data", metavar="PATH", help="where its images are (prepare.path)")
    parser.add_argument("--methods", nargs="+", help="default: distill.methods of the recipe")
    parser.add_argument(
        "--trials", type=int, default=8, help="of each method, the recipe's own included"
    )
    parser.add_argument(
        "--grid",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="further trials, every combination of these values; may be given again",
    )
    parser.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="folder of recipes")
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    cli.run(main, parser)
