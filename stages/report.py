"""Stage report: write edge.json, edge.md, index.html and the merged parity.json of a run; then check its gates.

`--merge A.json B.json` merges the edge.json (or bench JSON) of several machines instead;
`--from A.json --as FORMAT` writes one of them for another service.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import artifacts, cli, config
from pipeline.core.atomic import atomic
from pipeline.core.errors import GateFailed
from pipeline.data.prepared import Prepared
from pipeline.report import adapters, gallery, history, machines, page, pareto, raw, wording
from pipeline.report.formats.accuracy import Evidence
from pipeline.report.summary import Report, Sources, summarise


def main(args: argparse.Namespace) -> None:
    """Write the files. Raises GateFailed: a budget or an fp32 parity, after writing."""
    started = time.perf_counter()
    section = config.load(Report, args.params)
    folders = (args.build, args.bench)
    files = (
        args.accuracy,
        args.selection,
        args.train_perf,
        *folders,
        args.device,
        args.curves,
        args.students,
        args.quantize,
    )
    summary = summarise(Sources(*files), config.value("bench.enabled", args.params), section)
    earlier = history.read(args.history)
    artifacts.write_json(args.edge_json, raw.without_raw(summary))
    artifacts.write_json(args.parity, parity(summary, args.build))
    if args.pareto:
        publish(args.pareto, pareto.table(pareto.points(summary)))
    publish(args.edge_md, page.markdown([summary], earlier))
    evidence = artifacts.read(args.evidence, Evidence)
    images = gallery.gallery(evidence, Prepared.open(args.prepared), summary["shipped"])
    publish(args.index_html, page.page([summary], images, earlier))
    print(
        f"{args.index_html}: {args.index_html.stat().st_size / 1e6:.2f} MB, "
        f"{time.perf_counter() - started:.1f} s, {summary['verdict']['status']}: {wording.headline(summary)}"
    )
    fail_if([summary])


def parity(summary: Mapping[str, Any], build: Path) -> dict[str, Any]:
    """Merge the parity rows of the enabled targets for reports/parity.json."""
    files = {t["target"]: build / t["target"] / "parity.json" for t in summary["targets"]}
    return {
        "schema": "cakd.parity/1",
        "rows": artifacts.rounded(summary["parity"]),
        "machine": summary["machine"],
        "provenance": artifacts.provenance(**files),
    }


def merge(args: argparse.Namespace) -> None:
    """Merge several machines into one report: on stdout as Markdown, with --out as edge.md and index.html."""
    summaries = [machines.read_machine(path) for path in args.merge]
    earlier = history.read(args.history)
    text = page.markdown(summaries, earlier)
    if args.out is None:
        print(text, end="")
    else:
        publish(args.out / "edge.md", text)
        publish(args.out / "index.html", page.page(summaries, earlier=earlier))
        print(f"{args.out / 'index.html'}: {len(summaries)} runs")
    fail_if(summaries)


def convert(args: argparse.Namespace) -> None:
    """Write one machine's figures in another format, to stdout or --out, without checking any gate."""
    text = adapters.FORMATS[args.format](machines.read_machine(args.source))
    if args.out is None:
        print(text, end="")
    else:
        publish(args.out, text)
        print(f"{args.out}: {args.source} as {args.format}")


def fail_if(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Check the gates of all summaries. Raises GateFailed: a budget, an fp32 parity or a baseline's gate."""
    failures = [failure for summary in summaries for failure in summary["verdict"]["failures"]]
    if failures:
        raise GateFailed("; ".join(failures))


def publish(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def run_parser() -> argparse.ArgumentParser:
    """Build the command line of one run."""
    parser = _parser()
    add = parser.add_argument
    add("accuracy", type=Path, help="reports/accuracy.json")
    add("selection", type=Path, help="reports/selection.json")
    add("train_perf", type=Path, help="reports/train_perf.json")
    add("build", type=Path, help="artifacts/build, a folder per target")
    add("bench", type=Path, help="reports/bench, a JSON per target")
    add("device", type=Path, help="reports/device.json")
    add("prepared", type=Path, help="data/prepared")
    add("evidence", type=Path, help="reports/evidence.json")
    add("edge_json", type=Path, help="out: the summary, for machines")
    add("parity", type=Path, help="out: the parity rows of all targets")
    add("edge_md", type=Path, help="out: the report for CI")
    add("index_html", type=Path, help="out: the report for people")
    add("--curves", type=Path, metavar="DIR", help="reports/curves, a CSV of losses per method")
    add("--quantize", type=Path, metavar="JSON", help="reports/quantize.json")
    add("--pareto", type=Path, metavar="CSV", help="out: accuracy and latency, for `dvc plots`")
    add("--students", type=Path, metavar="JSON", help="reports/students.json, of several students")
    add("--params", type=Path, default=Path("params.yaml"))
    _takes_history(parser)
    return parser


def merge_parser() -> argparse.ArgumentParser:
    """Build the command line that merges several machines."""
    parser = _parser()
    add = parser.add_argument
    add("--merge", type=Path, nargs="+", required=True, metavar="JSON", help="one file per run")
    add("--out", type=Path, metavar="DIR", help="write edge.md and index.html here")
    _takes_history(parser)
    return parser


def convert_parser() -> argparse.ArgumentParser:
    """Build the command line that writes another format."""
    parser = _parser()
    add = parser.add_argument
    add("--from", dest="source", type=Path, required=True, metavar="JSON", help="edge or bench")
    add("--as", dest="format", choices=adapters.FORMATS, required=True)
    add("--out", type=Path, metavar="F", help="write here; default: stdout")
    return parser


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="python -m stages.report", description=__doc__, allow_abbrev=False
    )


def _takes_history(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--history",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="edge.json of earlier runs, or folders of them: shown beside this run where the machine is the same",
    )


MODES = {"--merge": (merge, merge_parser), "--from": (convert, convert_parser)}

if __name__ == "__main__":
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    mode = next((option for option in MODES if option in given), None)
    action, command_line = MODES[mode] if mode else (main, run_parser)
    cli.run(action, command_line())
