"""Fill the README's result table from the last run: `python -m benchmarks.readme`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline.core import cli
from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError
from pipeline.report import machines, wording

START, END = "<!-- results: python -m benchmarks.readme -->", "<!-- end of results -->"


def table(edge: dict[str, Any]) -> str:
    """Accuracy of every model, then latency of the exported student and the teacher by target."""
    lines = [
        "| model | labels | clean top-1 (%) | noisy top-1 (%) | parameters |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, figures in edge["models"].items():
        label = f"**{name}** (exported)" if name == edge["shipped"] else name
        clean, noisy = (f"{100 * figures[k]['top1']:.1f}" for k in ("clean", "noisy"))
        lines.append(
            f"| {label} | {figures['labels_seen']:,} | {clean} | {noisy} | {figures['params']:,} |"
        )
    lines += [
        "",
        "| target | effective precision | student p50 (ms) | teacher p50 (ms) | speed-up |",
        "|---|---|--:|--:|--:|",
    ]
    for target in edge["targets"]:
        lines.append(_latency(target))
    machine = edge["machine"]
    gpu = machine["gpu"]["name"] if machine["gpu"] else "no GPU"
    lines += [
        "",
        f"Measured by `make repro` on {machine['cpu']}, {machine['cores']['usable']} cores, {gpu}: "
        "batch 1, 1 thread, wall time; one training run per model.",
    ]
    return "\n".join(lines)


def _latency(target: dict[str, Any]) -> str:
    student, teacher = target["student"], target["teacher"]
    if student["status"] != "measured":
        return f"| {target['target']} | – | not measured: {student['reason']} | | |"
    faster = ""
    if teacher["status"] == "measured":
        faster = f"{teacher['wall_ms']['p50'] / student['wall_ms']['p50']:.1f}×"
    name, precision = target["target"], student["precision_effective"]
    return f"| {name} | {precision} | {wording.p50(student)} | {wording.p50(teacher)} | {faster} |"


def main(args: argparse.Namespace) -> None:
    """Replace the text between the two markers of the README."""
    edge = machines.read_machine(args.edge)
    text = args.readme.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise UserError(
            f"{args.readme}: got no markers; expected {START!r} and {END!r}; restore them"
        )
    before, after = text.split(START)[0], text.split(END)[1]
    with atomic(args.readme) as temporary:
        temporary.write_text(f"{before}{START}\n{table(edge)}\n{END}{after}", encoding="utf-8")
    print(f"{args.readme}: results of {edge['machine']['cpu']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.readme", description=__doc__)
    parser.add_argument("edge", type=Path, nargs="?", default=Path("reports/edge.json"))
    parser.add_argument("readme", type=Path, nargs="?", default=Path("README.md"))
    cli.run(main, parser)
