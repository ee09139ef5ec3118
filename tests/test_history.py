"""Earlier runs: which are read, which are shown beside this one, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.report import history
from pipeline.report.page import markdown
from tests import compared
from tests.test_report import OUT, Run, cells, change_row, command, run, stage, summary  # noqa: F401


def test_runs_stand_in_the_order_they_were_measured_this_one_last(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    found = history.beside(edge, compared.past(edge)[::-1])
    assert found and [r["name"] for r in found["runs"]] == ["run-1", "run-2", "run-3", "this run"]
    first, last = found["runs"][0], found["runs"][-1]
    assert first["time"] == "2026-11-01T10:00:00+00:00"
    ratio = first["p50_ms"]["ort-fp32"] / last["p50_ms"]["ort-fp32"]
    assert ratio == pytest.approx(1.1) and last["top1"] == 0.885
    assert "trt-fp16" not in first["p50_ms"]


def test_milliseconds_of_another_machine_are_left_out_and_told(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    others = compared.past(edge, 2, cpu="Other CPU")
    assert history.beside(edge, others) is None
    found = history.beside(edge, [*compared.past(edge, 1), *others])
    assert found and (len(found["runs"]), found["elsewhere"]) == (2, 2)
    text = markdown([edge], [*compared.past(edge, 1), *others])
    assert "2 earlier runs of other machines not shown." in text


def test_this_run_among_the_earlier_ones_is_not_shown_twice(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    assert history.beside(edge, [("again", json.loads(json.dumps(edge)))]) is None


def test_only_the_last_runs_are_kept(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    found = history.beside(edge, compared.past(edge, 9), last=4)
    assert found and [r["name"] for r in found["runs"]] == ["run-7", "run-8", "run-9", "this run"]


def test_a_commit_names_a_run(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    earlier = compared.past(edge, 1)
    earlier[0][1]["provenance"]["commit"] = "0123456789abcdef"
    found = history.beside(edge, earlier)
    assert found and found["runs"][0]["name"] == "0123456789"


def test_a_folder_gives_its_summaries_and_a_file_must_be_one(run: Run) -> None:  # noqa: F811
    edge, folder = summary(run), run.folder / "past"
    for name, value in (
        ("abc/edge.json", edge),
        ("abc/parity.json", {"schema": "cakd.parity/1"}),
        ("2026.json", edge),
    ):
        run.write(f"past/{name}", value)
    assert [name for name, _ in history.read([folder])] == ["2026", "abc"]
    assert history.read([folder / "2026.json"])[0][0] == "2026"
    with pytest.raises(UserError, match=r"parity\.json: schema: got 'cakd.parity/1'"):
        history.read([folder / "abc" / "parity.json"])
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        history.read([Path("nowhere")])


def test_both_commands_show_earlier_runs(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    for name, earlier in compared.past(edge):
        run.write(f"past/{name}.json", earlier)
    assert stage(run).returncode == 0
    now = run.folder / OUT / "edge.json"
    done = command(["--merge", now, "--history", run.folder / "past", "--out", run.folder / "both"])
    assert (done.returncode, done.stderr) == (0, "")
    text = (run.folder / "both" / "edge.md").read_text()
    assert cells(text, "run-2")[1:3] == ["2026-11-02", "cakd"]
    assert cells(text, "this run")[3] == r"88.5 \[85.0, 91.3\]"
    page = (run.folder / "both" / "index.html").read_text()
    assert "Latency by run" in page and "Accuracy by run" in page


def test_a_noisy_run_is_marked_and_a_missing_target_is_a_gap(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    earlier = compared.past(edge, 1)
    student = earlier[0][1]["targets"][1]["student"]
    student["flags"] = ["NOISY", "load"]
    del earlier[0][1]["targets"][0]
    row = cells(markdown([edge], earlier), "run-1")
    assert row[4] == "not measured" and row[5].endswith(" NOISY")


def test_an_old_summary_without_conditions_has_no_date(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    change_row(run, "ort-fp32", flags=["NOISY", "load"])
    assert cells(markdown([edge], [("old", summary(run))]), "old")[1] == "–"
