"""The tests that need a GPU: parity with float64, the same bits each time, no wait for the host, CUDA graphs.

Runs with plain pytest; with pytest-xdist where that is installed, because most of the time is Triton's compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu_parts.part import COMMAND, Part, Row, parser
from pipeline.core import artifacts, cli, machine
from pipeline.core.errors import GateFailed

SCHEMA = "cakd.benchmark.gpu.tests/1"
RESULT = "tests"
MARK = "mark.gpu"
WRITE_EVERY = 5.0  # seconds between two writes of the result
MAX_WORKERS = 8
OUTCOMES = ("passed", "failed", "skipped")


class Recorder:
    """A pytest plugin that writes the outcomes while the tests run, so that a killed run leaves them."""

    def __init__(self, out: Path, params: dict[str, Any]) -> None:
        self.out, self.params = out, params
        self.counts: Counter[str] = Counter()
        self.by_test: dict[str, Counter[str]] = {}
        self.seconds: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.not_collected: dict[str, str] = {}
        self._written = time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record a test once: by its call, or by the setup or teardown that failed or skipped it."""
        name = report.nodeid.partition("::")[2].partition("[")[0]
        self.seconds[name] += report.duration
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        self.by_test.setdefault(name, Counter())[report.outcome] += 1
        if report.skipped:
            self.skips[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
        if report.failed:
            self.failures[report.nodeid] = last_line(report.longreprtext)
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file that cannot be imported."""
        if report.failed:
            lines = [v for v in report.longreprtext.splitlines() if v.startswith("E ")]
            self.not_collected[report.nodeid] = last_line("\n".join(lines) or report.longreprtext)

    def result(self) -> dict[str, Any]:
        """The outcomes so far."""
        return {
            "counts": {name: self.counts[name] for name in OUTCOMES},
            "by_test": {
                name: {**{k: counts[k] for k in OUTCOMES}, "seconds": self.seconds[name]}
                for name, counts in self.by_test.items()
            },
            "skips": dict(self.skips),
            "failures": self.failures,
            "not_collected": self.not_collected,
        }

    def write(self) -> None:
        """Write the outcomes so far."""
        result = self.result()
        text = "\n".join(
            ["| test | outcome |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows(result))]
        )
        command = f"{COMMAND} --parts tests"
        record.write(self.out, SCHEMA, result, artifacts.provenance(self.params), command, text)
        self._written = time.monotonic()


def last_line(text: str) -> str:
    """The last line that is not empty, without pytest's `E   `."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("E").strip() if lines else ""


def rows(result: dict[str, Any]) -> list[Row]:
    """Totals, each test function, skips with their reason, and files that were not collected."""
    total = ", ".join(f"{result['counts'][k]} {k}" for k in OUTCOMES)
    lines = [("all", total)] + [
        (name, ", ".join(f"{counts[k]} {k}" for k in OUTCOMES if counts[k]))
        for name, counts in result["by_test"].items()
    ]
    skipped = [(f"skipped: {reason}", str(count)) for reason, count in result["skips"].items()]
    return [
        *lines,
        *skipped,
        *((f"not collected: {file}", reason) for file, reason in result["not_collected"].items()),
        *((f"FAILED {name}", reason) for name, reason in result["failures"].items()),
    ]


def options(dry: bool) -> list[str]:
    """Arguments of pytest: the files with tests for a GPU, without the options of pyproject.toml."""
    tests = [p for p in sorted(Path("tests").glob("test_*.py")) if MARK in p.read_text("utf-8")]
    arguments = ["-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider"]
    arguments += ["--continue-on-collection-errors", "--tb=short"]
    if not dry and importlib.util.find_spec("xdist"):
        arguments += ["-p", "xdist.plugin", "-n", str(min(MAX_WORKERS, machine.usable_cores()))]
    return [*arguments, *map(str, tests)]


def main(args: argparse.Namespace) -> None:
    """Run the tests. Raises GateFailed: one failed."""
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what else is installed there is not ours
    recorder = Recorder(args.out / RESULT, {"dry": args.dry, "options": options(args.dry)})
    pytest.main(options(args.dry), plugins=[recorder])
    recorder.write()
    missing = ("ModuleNotFoundError", "ImportError")
    broken = {k: v for k, v in recorder.not_collected.items() if not v.startswith(missing)}
    for name, reason in {**recorder.failures, **broken}.items():
        total = sum(recorder.counts.values())
        raise GateFailed(f"{len(recorder.failures)} of {total} failed; first {name}: {reason}")


PART = Part(__name__, 4, [RESULT], rows)

if __name__ == "__main__":
    cli.run(main, parser("benchmarks.gpu tests", __doc__))
