"""Samples and curves beside the JSON: drawn, told to be missing, or refused as others'."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.bench.latency import Block
from exporters.bench.measure import Measurement, save_samples
from pipeline.core.errors import UserError
from pipeline.distill import curves
from pipeline.report import machines, raw
from pipeline.report import page as report_page
from pipeline.report.charts import ecdf
from tests.test_report import (
    OUT,
    TARGETS,
    Run,
    board,
    command,
    run,  # noqa: F401 - the fixture
    stage,
    summary,
)
from tests.test_schemas import problems

LINES = {"cross_entropy": [[2, 2.5], [4, 0.1 + 0.2]], "discriminator": [[4, 1e-9]]}


def beside(run: Run, *targets: str) -> None:  # noqa: F811
    """Move the samples of a made-up run out of its JSON, as the bench writes them, and its curves."""
    for target in targets:
        found = run.read(f"bench/{target}.json")
        calls = [row.pop("samples_ms") for row in found["rows"]]
        run.write(f"bench/{target}.json", found)
        processes = [[Block(ms, ms)] if ms else [] for ms in calls]
        rows = [Measurement({}, [blocks], None) for blocks in processes]  # type: ignore[arg-type]
        save_samples(run.folder / "bench" / f"{target}.npz", rows)
    perf = run.read("train_perf.json")
    for method, figures in perf["methods"].items():
        curves.write_csv(figures.pop("curves"), run.folder / "curves" / f"{method}.csv")
    run.write("train_perf.json", perf)


def test_a_report_of_files_beside_is_that_of_files_that_hold_everything(run: Run) -> None:  # noqa: F811
    before = summary(run)
    beside(run, *TARGETS)
    after = summary(run, curves=run.folder / "curves")
    assert after["training"] == before["training"]
    for old, new in zip(before["targets"], after["targets"], strict=True):
        for model in ("student", "teacher"):
            samples = new[model].pop("samples_ms")
            np.testing.assert_allclose(samples, old[model].pop("samples_ms"), rtol=1e-6)
        assert new == old


def test_the_summary_leaves_them_out_and_the_page_shows_them(run: Run) -> None:  # noqa: F811
    beside(run, *TARGETS)
    assert stage(run, "--curves", run.folder / "curves").returncode == 0
    edge = run.read("out/edge.json")
    assert "samples_ms" not in json.dumps(edge) and "curves" not in json.dumps(edge)
    assert not [p for p in problems(edge) if p.startswith(("$.training", "$.targets"))]
    page = (run.folder / OUT / "index.html").read_text()
    assert "<h3>cross_entropy</h3>" in page and "Latency distribution" in page
    assert "No single calls" not in page and "loss curves are in" not in page


def test_a_summary_alone_is_drawn_by_percentiles_and_says_so(run: Run) -> None:  # noqa: F811
    beside(run, *TARGETS)
    assert stage(run, "--curves", run.folder / "curves").returncode == 0
    found = machines.read_machine(run.folder / OUT / "edge.json")
    page = report_page.page([found])
    assert "Single calls are not available for torch-eager, ort-fp32," in page
    assert "The loss curves are in <code>reports/curves</code>" in page
    assert "<h2>Training</h2>" in page and "<h3>cross_entropy</h3>" not in page
    row = found["targets"][0]["student"]
    wall = row["wall_ms"]
    assert ecdf.points(row) == [(wall["min"], 0.0), (wall["p50"], 0.5), (wall["p90"], 0.9)]


def test_a_bench_json_is_merged_with_its_calls_and_without_them(run: Run) -> None:  # noqa: F811
    path = board(run)
    found = json.loads(path.read_text())
    calls = [row.pop("samples_ms") for row in found["rows"]]
    path.write_text(json.dumps(found))
    (target,) = machines.read_machine(path)["targets"]
    assert target["student"]["samples_ms"] == []
    rows = [Measurement({}, [[Block(ms, ms)]], None) for ms in calls]  # type: ignore[arg-type]
    save_samples(path.with_suffix(".npz"), rows)
    (target,) = machines.read_machine(path)["targets"]
    assert len(target["student"]["samples_ms"]) == raw.KEPT_SAMPLES
    assert target["student"]["samples_ms"][-1] == pytest.approx(max(calls[0]))


def others(path: Path, row: dict[str, Any]) -> None:
    save_samples(path, [Measurement({}, [[Block([99.0] * row["wall_ms"]["n"], [])]], None)])  # type: ignore[arg-type]


def one_call_less(path: Path, row: dict[str, Any]) -> None:
    np.savez(path, **{"0.wall_ms": np.array(row["samples_ms"][1:])})


def many_more(path: Path, _: Any) -> None:
    np.savez_compressed(path, **{"0.wall_ms": np.zeros(10**6)})


def negative(path: Path, row: dict[str, Any]) -> None:
    calls = np.array(row["samples_ms"])
    calls[calls.argmin()] = -1
    np.savez(path, **{"0.wall_ms": calls})


def pickled(path: Path, row: dict[str, Any]) -> None:
    np.savez(path, **{"0.wall_ms": np.array([{}] * row["wall_ms"]["n"], dtype=object)})


def cut(path: Path, row: dict[str, Any]) -> None:
    others(path, row)
    path.write_bytes(path.read_bytes()[:-100])


def rotten(path: Path, row: dict[str, Any]) -> None:
    others(path, row)
    found = bytearray(path.read_bytes())
    found[80:90] = bytes(10)
    path.write_bytes(found)


@pytest.mark.parametrize(
    "write",
    [
        others,
        one_call_less,
        many_more,
        negative,
        pickled,
        cut,
        rotten,
        lambda p, _: np.savez(p, x=np.ones(3)),
        lambda p, _: p.write_bytes(b""),
    ],
)
def test_calls_that_are_not_those_of_the_figures_are_refused(run: Run, write: Any) -> None:  # noqa: F811
    path = board(run)
    write(path.with_suffix(".npz"), json.loads(path.read_text())["rows"][0])
    with pytest.raises(UserError, match="board.npz: not the calls of board.json"):
        machines.read_machine(path)


def test_a_row_of_more_calls_than_anyone_makes_is_not_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", **{"0.wall_ms": np.ones(raw.MAX_CALLS + 1000)})
    wall = {"n": raw.MAX_CALLS + 1000, "p50": 1.0}
    with pytest.raises(UserError, match="or than 10000000"):
        raw.with_samples({"rows": [{"status": "measured", "wall_ms": wall}]}, tmp_path / "a.json")


def test_curves_come_back_as_they_were_written(tmp_path: Path) -> None:
    curves.write_csv(LINES, tmp_path / "a.csv")
    assert raw.read_curves(tmp_path / "a.csv") == LINES
    assert curves.final(LINES) == {"cross_entropy": 0.1 + 0.2, "discriminator": 1e-9}
    before = (tmp_path / "a.csv").read_bytes()
    curves.write_csv(raw.read_curves(tmp_path / "a.csv"), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == before


@pytest.mark.parametrize(
    "text", [f"step,a\n1,{math.nan}\n", "step,a\n1,x\n", "a\n1\n", "step,a\n1.5,1\n", "a,b\n1,2\n"]
)
def test_a_table_that_holds_no_losses_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match="a.csv: no table of losses"):
        raw.read_curves(tmp_path / "a.csv")


def test_a_method_without_its_table_names_the_stage(run: Run) -> None:  # noqa: F811
    done = stage(run, "--curves", run.folder)
    assert done.returncode == 2 and "plain.csv: no such file; run the stage distill" in done.stderr
    assert command(["--help"]).returncode == 0
