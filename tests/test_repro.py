"""`dvc repro` from an empty cache to the report, with tiny parameters, in a copy of the repository."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys

import pytest

from pipeline.project import dvc_locks
from tests import tiny
from tests.house import ROOT
from tests.test_schemas import problems
from tests.tiny import dvc

# `dvc repro` of all stages may be in the first test's time, on a machine that others share.
pytestmark = [pytest.mark.ci, pytest.mark.timeout(1800)]


def stages_run(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [
        line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")
    ]


@pytest.fixture(scope="module")
def house(finished_run, tmp_path_factory):
    """A finished tiny run of these tests' own."""
    folder = tmp_path_factory.mktemp("house with a space")
    tiny.copy(folder, run=finished_run)
    return folder


def test_the_chain_ends_in_a_report_with_a_row_for_every_target(house):
    edge = (house / "reports" / "edge.md").read_text()
    assert "| ort-fp32 |" in edge and "| rtx-fp16 |" in edge and "skipped" in edge
    accuracy = json.loads((house / "reports" / "accuracy.json").read_text())
    assert set(accuracy["models"]) == {"teacher", "plain", "logits", "cakd+logits"}
    assert accuracy["models"]["plain"]["labels_seen"] == 50
    assert {"schema", "machine", "provenance"} <= set(accuracy)
    bench = json.loads((house / "reports" / "bench" / "rtx-fp16.json").read_text())
    assert all(r["status"] == "skipped" and r["reason"] for r in bench["rows"])
    assert (house / "reports" / "index.html").stat().st_size > 20_000
    keys = {"img_per_s", "stage_ms", "stall_fraction", "peak_mb"}
    perf = json.loads((house / "reports" / "train_perf.json").read_text())
    assert all(keys <= set(m) for m in perf["methods"].values())


def test_every_json_of_the_run_is_what_its_schema_says(house):
    own = ("cakd.prepared/", "cakd.source/", "cakd.plan/")  # read by their writers alone
    made = {
        path.relative_to(house).as_posix(): json.loads(path.read_text())
        for folder in ("artifacts", "data", "reports")
        for path in (house / folder).rglob("*.json")
    }
    judged = {name: d for name, d in made.items() if not d["schema"].startswith(own)}
    assert {"artifacts/export/export.json", "data/features/manifest.json"} < set(judged)
    assert {name: found for name, d in judged.items() if (found := problems(d))} == {}


def test_a_second_repro_runs_nothing_but_the_look_at_the_device(house):
    assert stages_run(dvc(house, "repro")) == ["device"]


@pytest.mark.parametrize(
    ("edited", "first", "spared"),
    [
        ("pipeline/report/summary.py", {"report"}, None),
        (
            "pipeline/distill/kernels/reference.py",
            {"distill@plain", "evaluate"},
            {"prepare", "teach", "cache"},
        ),
        (
            "exporters/bench/latency.py",
            {"bench@ort-fp32"},
            {"teach", "distill@plain", "evaluate"},
        ),
    ],
)
def test_editing_code_reruns_the_stages_that_run_it(edited, first, spared, house):
    path = house / edited
    before = path.read_text()
    try:
        path.write_text(before + "\n# edited\n")
        done = dvc(house, "status", "--json")
        changed = {
            name for name, why in json.loads(done.stdout).items() if "always changed" not in why
        }
    finally:
        path.write_text(before)
    assert first <= changed
    assert changed == first if spared is None else not (changed & spared)


@pytest.fixture(scope="module")
def mend(house):
    """Run what `make repro` runs right before DVC; what it says."""
    asked = ["make", "-n", "-C", str(ROOT), "--no-print-directory", "repro"]
    shown = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    before_dvc = next(n for n, line in enumerate(shown) if line.endswith("/dvc repro")) - 1
    command = [sys.executable, *shown[before_dvc].split()[1:]]

    def run():
        done = subprocess.run(command, cwd=house, capture_output=True, text=True, check=True)
        return done.stdout

    return run


def test_what_a_killed_dvc_left_torn_is_set_aside_and_nothing_learns_again(house, mend):
    """DVC writes both in place and refuses them for ever after: treeverse/dvc#7615."""
    lock, rwlock = house / "dvc.lock", house / ".dvc" / "tmp" / "rwlock"
    torn = lock.read_text()[:-1].rpartition(":")[0]
    for path, text, refusal in (
        (lock, "", "validation failed"),
        (lock, torn, "'./dvc.lock' is invalid"),
        (rwlock, "", "JSON structure is corrupted"),
        (rwlock, '{"read": {"a', "JSON structure is corrupted"),
    ):
        path.write_text(text)
        refused = dvc(house, "status", "report") if path is lock else dvc(house, "repro", "device")
        assert refused.returncode and refusal in refused.stdout + refused.stderr
        aside = f".dvc/tmp/{path.name}.torn"
        assert mend() == f"{path.name}: half-written by a killed dvc; moved to {aside}\n"
        assert (house / aside).read_text() == text and not path.exists()
    again = dvc(house, "repro")
    assert again.returncode == 0, again.stderr
    # What `students` and `select` write is in git, not in DVC's cache, so a lost lock lets them run again.
    assert sorted(stages_run(again)) == ["check", "device", "select", "students"]


def test_a_whole_lock_one_in_conflict_and_one_that_is_being_written_stay(house, mend):
    lock, tmp = house / "dvc.lock", house / ".dvc" / "tmp"
    rwlock, before = tmp / "rwlock", lock.read_text()
    rwlock.write_text('{"read": {}, "write": {}}')
    assert mend() == "" and lock.exists() and rwlock.exists()
    rwlock.unlink()
    assert mend() == ""
    lock.write_text(f"<<<<<<< HEAD\n{before}")
    assert dvc_locks.set_aside(house) == []
    lock.write_text("")
    with (tmp / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert dvc_locks.set_aside(house) == [] and lock.exists()
    lock.write_text(before)


def test_a_wrong_student_is_told_before_the_teacher_learns(house):
    path = house / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("epochs: 1", "epochs: 2").replace("test_resnet", "test_resnets"))
    told = dvc(house, "repro")
    path.write_text(before)
    assert told.returncode == 255 and stages_run(told) == ["device", "check"]
    assert "'test_resnets'" in told.stdout + told.stderr
    assert (house / "artifacts" / "teacher" / "teacher.safetensors").is_file()
    again = dvc(house, "repro")
    assert again.returncode == 0 and stages_run(again) == ["device", "check"]
