"""Verdict on a summary: its gates, and the status, failures and notes that follow from them. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.report.gain import no_gain

MODELS = ("student", "teacher")
PASSING = ("PASS", "ALLOWED")  # verdicts of a gate that passes; ALLOWED: accepted by --allow


@dataclass(frozen=True)
class ReportCheck:
    """One check of a run and its verdict. A check that does not decide is reported and never fails the report."""

    kind: str  # parity, budget, precision, baseline
    name: str
    verdict: str  # PASS, FAIL, INCONCLUSIVE, NOT MEASURED, FELL BACK, UNKNOWN, ...
    message: str
    decides: bool = True

    @property
    def failed(self) -> bool:
        """Whether it fails the report. A budget without a measurement does: it may be exceeded."""
        unknown = self.kind == "budget" and self.verdict == "NOT MEASURED"
        return self.decides and (self.verdict == "FAIL" or unknown)

    @property
    def open(self) -> bool:
        """Whether its verdict lets the run pass."""
        return self.verdict in PASSING


def gates(summary: Mapping[str, Any]) -> list[ReportCheck]:
    """Every gate of a summary: parity, budgets, effective precision, then the comparisons with a baseline."""
    return [
        *map(_parity, summary["parity"]),
        *map(_budget, summary["budgets"]),
        *_precision(summary["targets"]),
        *(gate for comparison in summary.get("comparisons", []) for gate in _compared(comparison)),
    ]


def _parity(row: Mapping[str, Any]) -> ReportCheck:
    precision, name = row["precision_effective"], f"{row['target']} {row['artifact']}"
    reason = row.get("reason") or "not the trained network"
    message = " ".join(filter(None, [precision, f"parity of {name}: {reason}"]))
    return ReportCheck("parity", name, row["verdict"], message, decides=precision == "fp32")


def _budget(budget: Mapping[str, Any]) -> ReportCheck:
    value = budget["value"]
    got = "no measurement" if value is None else round(value, 4)
    message = f"budget {budget['name']}: got {got}, limit {budget['limit']}"
    return ReportCheck("budget", budget["name"], budget["verdict"], message)


def _precision(targets: Iterable[Mapping[str, Any]]) -> Iterator[ReportCheck]:
    for target in targets:
        row = target["student"]
        if row.get("precision_requested") in (None, "default"):
            continue
        if row["status"] != "measured":
            verdict, message = "NOT MEASURED", str(row["reason"])
        elif fell_back(row):
            verdict, message = "FELL BACK", fall_back(row)
        else:
            verdict, message = "PASS", f"runs in {row['precision_effective']}"
        yield ReportCheck("precision", target["target"], verdict, message, decides=False)


def _compared(comparison: Mapping[str, Any]) -> Iterator[ReportCheck]:
    where = location(comparison)
    yield ReportCheck(
        "baseline", f"{where}: latency", of_latency(comparison), f"{where}: {_ratio(comparison)}"
    )
    for gate in comparison.get("gates", []):
        message = (
            f"{where}: {gate['name']}: baseline {gate['baseline']}, candidate {gate['candidate']}"
        )
        message += f", limit {gate['limit']}" * (gate["limit"] is not None)
        yield ReportCheck("baseline", f"{where}: {gate['name']}", gate["verdict"], message)


def of_latency(comparison: Mapping[str, Any]) -> str:
    """The verdict on the ratio alone: that of a comparison is the worst of the ratio and the gates beside it."""
    ratio, verdict = comparison.get("ratio"), str(comparison["verdict"])
    by_gate = any(gate["verdict"] == "FAIL" for gate in comparison.get("gates", []))
    if verdict != "FAIL" or not by_gate or not ratio:
        return verdict
    return str(ratio.get("verdict", verdict))


def location(comparison: Mapping[str, Any]) -> str:
    """Where a comparison was made: "student.onnx on ort-fp32, 1 thread"; with the batch where it is not 1."""
    where = f"{comparison['model']} on {comparison['target']}, {threads(comparison['threads'])}"
    batch = comparison.get("batch", 1)
    return where if batch == 1 else f"{where}, batch {batch}"


def threads(count: int) -> str:
    """`1 thread`, `4 threads`."""
    return f"{count} thread" + "s" * (count != 1)


def _ratio(comparison: Mapping[str, Any]) -> str:
    ratio = comparison.get("ratio")
    if not ratio:
        return str(comparison.get("reason") or "no ratio was measured")
    return (
        f"CPU time {ratio['median']:.3f} times the baseline's, 95 % interval {ratio['ci_low']:.3f} to "
        f"{ratio['ci_high']:.3f}, tolerated {1 + ratio['tol']:g}"
    )


def judge(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Status with its reasons, and notes: remarks that fail nothing.

    FAIL: a gate failed; NO GAIN: none did, but distillation gained nothing; INCONCLUSIVE: nor that, but a
    comparison with a baseline decided nothing; NOT JUDGED: there was no parity, no budget and no baseline.
    """
    checks = gates(summary)
    failures = [gate.message for gate in checks if gate.failed]
    undecided = any(c["verdict"] not in PASSING for c in summary.get("comparisons", []))
    judged = any(g.kind != "precision" for g in checks)
    without_gain = no_gain(summary)
    status = "INCONCLUSIVE" if undecided else "PASS" if judged else "NOT JUDGED"
    return {
        "status": "FAIL" if failures else "NO GAIN" if without_gain else status,
        "no_gain": without_gain,
        "failures": failures,
        "notes": list(_notes(summary, checks)),
    }


def _notes(summary: Mapping[str, Any], checks: Iterable[ReportCheck]) -> Iterator[str]:
    exported = summary["models"].get(summary["shipped"], {})
    if split := summary.get("split"):
        yield f"accuracies are of the {split} images (evaluate.split), not of test"
    for baseline, points in exported.get("points", {}).items():
        if points < 0:
            yield f"the exported {summary['shipped']} is {-points:.1f} points below {baseline}"
    for target in summary["targets"]:
        yield from _of_target(target)
    disturbed = [t[m] for t in summary["targets"] for m in MODELS if noisy(t[m])]
    if disturbed:
        yield (
            f"{len(disturbed)} of {2 * len(summary['targets'])} rows are NOISY: the machine was disturbed, their "
            "latencies are unreliable"
        )
    for budget in summary["budgets"]:
        if budget["verdict"] == "INCONCLUSIVE":
            yield f"budget {budget['name']} is inconclusive: only the noise is above {budget['limit']}"
    for gate in checks:
        if gate.kind == "baseline" and gate.verdict not in ("PASS", "FAIL", "UNKNOWN"):
            yield f"{gate.verdict.lower()}: {gate.message}"


def _of_target(target: Mapping[str, Any]) -> Iterator[str]:
    remarks: dict[str, list[str]] = {}  # remark -> its models
    for model in MODELS:
        for remark in _remarks(target[model], target["student"]):
            remarks.setdefault(remark, []).append(model)
    for remark, models in remarks.items():
        yield f"{target['target']} {' and '.join(models)}: {remark}"


def _remarks(row: Mapping[str, Any], student: Mapping[str, Any]) -> Iterator[str]:
    if "skipped" == row["status"] == student["status"]:  # a skipped teacher alone is in the table
        yield f"skipped, {row['reason']}"
    if fell_back(row):
        yield fall_back(row)
    if row["parity"] in ("FAIL", "UNDECIDED"):
        yield f"parity {row['parity']}"


def noisy(row: Mapping[str, Any]) -> bool:
    """Whether the bench flagged the row: its latency is unreliable."""
    return "NOISY" in row.get("flags", [])


def fell_back(row: Mapping[str, Any]) -> bool:
    """Whether a measured row computes in another precision than it was asked for."""
    requested = row.get("precision_requested")
    return row["status"] == "measured" and requested not in (
        None,
        "default",
        row["precision_effective"],
    )


def fall_back(row: Mapping[str, Any]) -> str:
    """Why a row computes in another precision than the requested one."""
    requested, got = row["precision_requested"], row["precision_effective"]
    return row["reason"] or f"requested {requested}, runs in {got}, no reason given"
