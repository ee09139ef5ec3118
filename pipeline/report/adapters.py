"""A summary in the formats that CI services read: figures over time, or gates as test cases. Torch-free.

Each format is a pure function of one summary (`cakd.edge/1`); FORMATS names them.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

from pipeline.report.pareto import wilson
from pipeline.report.verdict import ReportCheck, gates, location, noisy, threads
from pipeline.report.wording import board, measured

ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, 2.2
Summary = Mapping[str, Any]
Named = tuple[str, str, Mapping[str, Any]]


def github_action_benchmark(summary: Summary) -> list[dict[str, Any]]:
    """Figures of which less is better, for `tool: customSmallerIsBetter`.

    Format: https://github.com/benchmark-action/github-action-benchmark: a list of `name`, `unit`, `value` and,
    as free text, `range` and `extra`. Accuracy goes in as the error that is left.
    """
    return [*_costs(summary), *_errors(summary), *_slowdowns(summary)]


def _costs(summary: Summary) -> Iterator[dict[str, Any]]:
    for name, target, row in _rows(summary):
        noise = " NOISY" * noisy(row)
        extra = f"{row['precision_effective']} on {target}, {board(summary['machine'])}{noise}"
        spread = row["wall_ms"].get("p50_ci")
        entry = _entry(f"{name}: latency p50", "ms", row["wall_ms"]["p50"], extra)
        yield {**entry, "range": f"{spread[0]:g} to {spread[1]:g}"} if spread else entry
        for key, what in (("size_mb", "file"), ("rss_mb", "resident memory")):
            if row.get(key) is not None:
                yield _entry(f"{name}: {what}", "MB", row[key], extra)


def _errors(summary: Summary) -> Iterator[dict[str, Any]]:
    for name, model in summary["models"].items():
        clean = model["clean"]
        low, high = (100 * (1 - v) for v in reversed(wilson(clean["top1"], clean["n"])))
        error = round(100 * (1 - clean["top1"]), 4)
        entry = _entry(f"{name}: clean top-1 error", "%", error, f"{clean['n']} images")
        yield {**entry, "range": f"{low:.2f} to {high:.2f}"}


def _slowdowns(summary: Summary) -> Iterator[dict[str, Any]]:
    for comparison in summary.get("comparisons", []):
        if ratio := comparison.get("ratio"):
            name = f"{location(comparison)}: CPU time over the baseline's"
            entry = _entry(name, "ratio", ratio["median"], comparison["verdict"])
            yield {**entry, "range": f"{ratio['ci_low']:g} to {ratio['ci_high']:g}"}


def _entry(name: str, unit: str, value: float, extra: str) -> dict[str, Any]:
    return {"name": name, "unit": unit, "value": value, "extra": extra}


def bencher(summary: Summary) -> dict[str, Any]:
    """Bencher Metric Format, for `bencher run --adapter json --file F`.

    Format: https://bencher.dev/docs/reference/bencher-metric-format: benchmark -> measure -> `value` and, where
    there is an interval, `lower_value` and `upper_value`. Latency in ns and throughput in operations a second
    are Bencher's own measures; sizes are in bytes. A machine is a testbed: one upload each.
    """
    benchmarks: dict[str, dict[str, Any]] = {
        name: _measures(row) for name, _, row in _rows(summary)
    }
    for name, model in summary["models"].items():
        clean = model["clean"]
        top1 = _metric(clean["top1"], wilson(clean["top1"], clean["n"]))
        benchmarks[name] = {"top-1": top1, "parameters": _metric(model["params"])}
    for compared in summary.get("comparisons", []):
        if ratio := compared.get("ratio"):
            interval = (ratio["ci_low"], ratio["ci_high"])
            benchmarks[f"{location(compared)}, against its baseline"] = {
                "cpu-ratio": _metric(ratio["median"], interval)
            }
    return benchmarks


def _measures(row: Mapping[str, Any]) -> dict[str, Any]:
    wall = row["wall_ms"]
    spread = wall.get("p50_ci")
    measures = {
        "latency": _metric(1e6 * wall["p50"], spread and [1e6 * v for v in spread]),
        "throughput": _metric(1e3 * row["batch"] / wall["p50"]),
    }
    sizes = {"file-size": row.get("size_mb"), "resident-memory": row.get("rss_mb")}
    return measures | {k: _metric(1e6 * v) for k, v in sizes.items() if v is not None}


def _metric(value: float, interval: Any = None) -> dict[str, float]:
    metric = {"value": value}
    if interval:
        metric |= {"lower_value": interval[0], "upper_value": interval[1]}
    return {key: float(f"{v:.9g}") for key, v in metric.items()}


def junit(summary: Summary) -> str:
    """Every gate as a test case: FAIL is a failure, what decided nothing is skipped with the reason.

    Format: https://github.com/jenkinsci/xunit-plugin, its junit-10.xsd, which GitHub, GitLab and Jenkins read
    alike: `testsuites` of `testsuite` of `testcase`, in it `failure` or `skipped`.
    """
    root = ET.Element("testsuites", name=_legal(summary["title"]))
    for kind, of_kind in groupby(gates(summary), key=lambda gate: gate.kind):
        checks = list(of_kind)
        suite = ET.SubElement(root, "testsuite", name=kind, tests=str(len(checks)), errors="0")
        suite.set("failures", str(sum(_case(suite, gate) == "failure" for gate in checks)))
        suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, gate: ReportCheck) -> str | None:
    """One test case; the tag of what became of it, None where it passed."""
    case = ET.SubElement(suite, "testcase", classname=gate.kind, name=_legal(gate.name), time="0")
    if gate.open:
        return None
    failed = gate.decides and gate.verdict == "FAIL"
    tag = "failure" if failed else "skipped"
    message = gate.message if failed else f"{gate.verdict}: {gate.message}"
    ET.SubElement(case, tag, message=_legal(message))
    return tag


def _legal(text: str) -> str:
    """The text without what no XML file may hold."""
    return ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)


def _rows(summary: Summary) -> Iterator[Named]:
    """(name, target, row) of every measured row, those at more threads too."""
    for target in summary["targets"]:
        for row in measured(target):
            batch = f", batch {row['batch']}" * (row["batch"] != 1)
            name = f"{row['model']} on {target['target']}, {threads(row['threads'])}{batch}"
            yield name, target["target"], row


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Summary], str]] = {
    "github-action-benchmark": lambda summary: _json(github_action_benchmark(summary)),
    "bencher": lambda summary: _json(bencher(summary)),
    "junit": junit,
}
