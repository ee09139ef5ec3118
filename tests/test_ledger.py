"""Runs that are kept in git, and the tables that are made of them."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from benchmarks import evidence, ledger
from benchmarks.ledger import Identity, Ledger, identity
from pipeline.core.errors import UserError
from pipeline.distill.settings import Distill, LogitsConfig
from pipeline.training.compute import Compute
from pipeline.training.resume import Interrupts
from tests.house import ROOT

PARAMS = {
    "prepare": {"source": "digits", "path": "/data/mine", "image_size": 32},
    "cache": {"views": 4, "geometry": {"flip": False}, "seed": 0, "dtype": "float16"},
    "evaluate": {"split": "test", "seed": 0, "device": "auto"},
}
SETTINGS = Distill(methods=("plain", "logits"), student="test_resnet", steps=10)


def run(clean: float, noisy: float = 0.2, step_ms: float = 10.0) -> dict[str, float]:
    return {"clean": clean, "noisy": noisy, "step_ms": step_ms}


def test_what_decides_a_run_is_its_own_settings_and_the_teacher_it_reads():
    plain, logits = (identity(PARAMS, SETTINGS, m, 0, "t" * 64) for m in ("plain", "logits"))
    assert plain.teacher is None and logits.teacher == "t" * 64
    assert plain == identity(PARAMS, SETTINGS, "plain", 0, "u" * 64)
    warmer = replace(SETTINGS, logits=LogitsConfig(temperature=2.0))
    assert plain == identity(PARAMS, warmer, "plain", 0, "t")
    assert logits != identity(PARAMS, warmer, "logits", 0, "t" * 64)
    assert "/data/mine" not in json.dumps(logits.settings)  # nor any path of a machine
    same = replace(SETTINGS, methods=("dkd",), workers=4, checkpoint_every=7)
    assert logits == identity(PARAMS, same, "logits", 0, "t" * 64)
    for other in (replace(SETTINGS, steps=11), replace(SETTINGS, lr=0.1)):
        assert plain != identity(PARAMS, other, "plain", 0, "")
    assert plain != identity(PARAMS, SETTINGS, "plain", 1, "")


def test_a_run_is_read_back_and_one_of_other_settings_is_refused_by_the_setting(tmp_path):
    kept = Ledger(tmp_path)
    made_of = identity(PARAMS, SETTINGS, "logits", 3, "t" * 64)
    assert kept.read("logits", 3, made_of) is None
    kept.write("logits", 3, made_of, run(0.123456789))
    assert kept.read("logits", 3, made_of) == run(0.123457)
    slower = identity(PARAMS, replace(SETTINGS, lr=0.5), "logits", 3, "t" * 64)
    with pytest.raises(UserError, match=r"logits-3.json: .*distill.lr 0.002; expected 0.5"):
        kept.read("logits", 3, slower)
    with pytest.raises(UserError, match="got teacher tttttttttttt; expected uuuuuuuuuuuu"):
        kept.read("logits", 3, replace(made_of, teacher="u" * 64))
    colder = replace(SETTINGS, logits=LogitsConfig(temperature=1.5))
    with pytest.raises(UserError, match=r"distill.own.logits.temperature 4.0; expected 1.5"):
        kept.read("logits", 3, identity(PARAMS, colder, "logits", 3, "t" * 64))
    (tmp_path / "logits-3.json").rename(tmp_path / "logits-4.json")
    with pytest.raises(UserError, match="logits-4.json: got a run of logits, seed 3"):
        kept.entries()


@pytest.mark.parametrize(
    "other, teacher, said",
    [
        ({"prepare": {**PARAMS["prepare"], "image_size": 16}}, "t", "prepare.image_size 32; exp"),
        ({"evaluate": {"split": "val", "seed": 0}}, "t", "evaluate.split test; expected val"),
        ({"cache": {**PARAMS["cache"], "views": 2}}, "t", "cache.views 4; expected 2"),
        ({"steps": 11}, "t", "distill.steps 10; expected 11"),
        ({"student_kwargs": {"depth": 2}}, "t", "distill.student_kwargs.depth None; expected 2"),
        ({}, "u", "got teacher t; expected u"),
    ],
)
def test_runs_of_two_methods_share_images_steps_student_and_teacher(tmp_path, other, teacher, said):
    kept = Ledger(tmp_path)
    kept.write("dkd", 0, identity(PARAMS, SETTINGS, "dkd", 0, "t"), run(0.5))
    params = PARAMS | {key: value for key, value in other.items() if key in PARAMS}
    settings = replace(SETTINGS, **{k: v for k, v in other.items() if k not in PARAMS})
    made_of = identity(params, settings, "logits", 1, teacher)
    with pytest.raises(UserError, match=f"dkd-0.json: a run of other settings: .*{said}"):
        kept.read("logits", 1, made_of)
    kept.write("logits", 1, made_of, run(0.5))
    with pytest.raises(UserError, match="logits-1.json: a run of other settings"):
        kept.entries()
    slower = identity(PARAMS, replace(SETTINGS, lr=0.5), "dkd", 1, "t")
    with pytest.raises(UserError, match="dkd-0.json: .*distill.lr 0.002; expected 0.5"):
        kept.read("dkd", 1, slower)
    tuned = identity(PARAMS, replace(SETTINGS, lr=0.1, labelled_share=0.1), "plain", 0, "v")
    (tmp_path / "logits-1.json").unlink()
    kept.write("plain", 0, tuned, run(0.5))
    assert [*kept.entries()] == ["dkd", "plain"]


def test_another_memory_format_or_compiler_is_the_same_run(tmp_path):
    kept, made_of = Ledger(tmp_path), identity(PARAMS, SETTINGS, "plain", 0, "")
    kept.write("plain", 0, made_of, run(0.5))
    for how in (Compute(channels_last=False), Compute(compile=True), Compute(device="cpu")):
        same = identity(PARAMS, replace(SETTINGS, compute=how), "plain", 0, "")
        assert kept.read("plain", 0, same) == run(0.5)
    rounder = identity(PARAMS, replace(SETTINGS, compute=Compute(precision="bf16")), "plain", 0, "")
    with pytest.raises(UserError, match=r"compute.precision fp32; expected bf16"):
        kept.read("plain", 0, rounder)


def test_a_setting_that_did_not_exist_yet_counts_as_its_default(tmp_path):
    kept, made_of = Ledger(tmp_path), identity(PARAMS, SETTINGS, "plain", 0, "")
    older = json.loads(json.dumps(made_of.settings))
    del older["distill"]["clip_norm"], older["distill"]["compute"]["ema"]
    kept.write("plain", 0, Identity(older, None), run(0.5))
    assert kept.read("plain", 0, made_of) == run(0.5)
    clipped = identity(PARAMS, replace(SETTINGS, clip_norm=3.0), "plain", 0, "")
    with pytest.raises(UserError, match="distill.clip_norm"):
        kept.read("plain", 0, clipped)
    gone = made_of.settings | {"distill": {**made_of.settings["distill"], "forgotten": 2}}
    kept.write("plain", 0, Identity(gone, None), run(0.5))
    with pytest.raises(UserError, match="distill.forgotten 2; expected None"):
        kept.read("plain", 0, made_of)


def test_a_table_compares_over_the_seeds_that_both_methods_have(tmp_path):
    kept = Ledger(tmp_path)
    made = {"plain": (0.50, 0.52, 0.54), "logits": (0.55, 0.57), "cakd+logits": (0.60,)}
    for method, tops in made.items():
        for seed, top in enumerate(tops):
            made_of = identity(PARAMS, SETTINGS, method, seed, "t")
            kept.write(method, seed, made_of, run(top, step_ms=10.0 if method == "plain" else 15.0))
    kept.write("teacher", 0, ledger.identity_of_teacher(PARAMS, "t"), {"clean": 0.7, "noisy": 0.3})
    summary = evidence.result(kept.entries(), "few")
    rows = summary["methods"]
    assert [*rows] == ["plain", "logits", "cakd+logits"] and summary["teacher"]["clean"] == 0.7
    assert rows["logits"]["clean_minus_plain"]["mean"] == pytest.approx(5.0)
    assert rows["logits"]["clean_minus_plain"]["half_width_95"] == pytest.approx(0, abs=1e-9)
    assert rows["cakd+logits"]["clean_minus_logits"] == {
        "mean": pytest.approx(5.0),
        "half_width_95": None,
    }
    assert rows["logits"]["step_over_plain"] == 1.5
    text = evidence.markdown(summary)
    assert "| logits | 2 | 56.0 | +5.0 ± 0.0 |" in text and "| teacher |  | 70.0 |" in text


def test_committed_tables_are_those_of_the_committed_runs_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipes = [path.name for path in sorted(ledger.FOLDER.glob("*")) if path.is_dir()]
    for recipe in recipes:
        out = tmp_path / recipe
        line = [recipe, "--table", "--out", str(out)]
        evidence.main(evidence.parser().parse_args(line))
        for suffix in (".md", ".json"):
            committed = ledger.FOLDER.parent / f"evidence-{recipe}{suffix}"
            assert out.with_suffix(suffix).read_bytes() == committed.read_bytes()


def test_every_row_of_a_committed_table_has_a_cell_under_every_head():
    pages = [*(ROOT / "benchmarks/results").glob("*.md"), *(ROOT / "docs").glob("*.md")]
    tables = 0
    for page in pages:
        lines = page.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if not line.startswith("|---"):
                continue
            tables += 1
            head = lines[number - 1].replace(r"\|", "").count("|")
            for row in itertools.takewhile(lambda x: x.startswith("|"), lines[number + 1 :]):
                assert row.replace(r"\|", "").count("|") == head, (page.name, row)
    assert tables > 50


def test_without_runs_a_table_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = evidence.parser().parse_args(["none", "--table"])
    with pytest.raises(UserError, match=r"none: got no runs; expected one or more"):
        evidence.main(line)


def test_the_time_given_ends_in_good_order():
    done = []
    with evidence.deadline(0.2 / 60):
        time.sleep(5)
        done.append("slept on")
    with evidence.deadline(0.2 / 60):  # a training that leaves after its checkpoint
        before = signal.signal(signal.SIGINT, lambda *_: done.append("saved"))
        time.sleep(0.4)
        signal.signal(signal.SIGINT, before)
        raise SystemExit(128 + signal.SIGINT)
    assert done == ["saved"]
    with pytest.raises(SystemExit), evidence.deadline(10):
        os.kill(os.getpid(), 0)
        raise SystemExit(128 + signal.SIGINT)  # the user's own Ctrl-C
    with evidence.deadline(None) as over:
        assert not over()
    with pytest.raises(evidence.Stopped), suppress(Exception):  # as where timm's errors are caught
        raise evidence.Stopped


def test_a_deadline_in_the_last_step_of_a_training_ends_the_queue_behind_it(tmp_path, monkeypatch):
    """A training in its last step records the signal and ends as if there were none."""
    fake = FakeRuns(tmp_path)
    monkeypatch.setattr(evidence.Runs, "of", lambda *_: fake)
    monkeypatch.setattr(evidence, "merged", lambda *_: PARAMS)
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "runs")
    made = fake.run

    def last_step(*args):
        with Interrupts():
            time.sleep(0.5)
        return made(*args)

    fake.run = last_step
    evidence.main(evidence.parser().parse_args(["few", "--minutes", str(0.2 / 60)]))
    assert fake.made == [("plain", 0)]


def sleep(_):
    time.sleep(60)


def test_a_signal_ends_the_further_processes_too(monkeypatch):
    monkeypatch.setattr(evidence, "assist", sleep)
    line = argparse.Namespace(jobs=2)
    began = time.monotonic()
    with pytest.raises(SystemExit), evidence.assisted(line):
        raise SystemExit(128 + signal.SIGTERM)
    assert time.monotonic() - began < 30


class FakeRuns:
    """Runs that take no time; `stop` ends the one of this method and seed as a signal would."""

    stop: tuple[str, int] | None = None

    def __init__(self, folder):
        self.folder, self.teacher, self.made = folder, folder / "teacher.safetensors", []
        self.teacher.with_suffix(".json").write_text(json.dumps({"weights_sha256": "t" * 64}))

    def section(self, _):
        return SETTINGS

    def run(self, _, method, seed):
        if (method, seed) == self.stop:
            time.sleep(0.5)
            raise SystemExit(128 + signal.SIGINT)
        self.made.append((method, seed))
        return run(0.5 + 0.01 * seed)

    def on_test(self, _):
        return {"clean": 0.7, "noisy": 0.3}


def test_missing_runs_are_made_in_the_order_of_the_seeds_and_none_twice(tmp_path, monkeypatch):
    fake = FakeRuns(tmp_path)
    monkeypatch.setattr(evidence.Runs, "of", lambda *_: fake)
    monkeypatch.setattr(evidence, "merged", lambda *_: PARAMS)
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "runs")

    def call(*line):
        evidence.main(evidence.parser().parse_args(["few", *line]))
        return json.loads((tmp_path / "evidence-few.json").read_text())["methods"]

    assert "step_over_plain" not in call("--seeds", "1", "--untimed")["logits"]
    assert call("--seeds", "2")["logits"]["step_over_plain"] == 1.0  # of the seed that has it
    assert fake.made == [("plain", 0), ("logits", 0), ("plain", 1), ("logits", 1)]
    fake.made.clear()
    call("--seeds", "2")
    assert fake.made == []
    with evidence.claimed(tmp_path / "claims" / "plain-2.lock") as first:  # by another process
        call("--seeds", "3")
    assert first and fake.made == [("logits", 2)]
    (tmp_path / "runs" / "few" / "logits-2.json").unlink()
    fake.made.clear()
    fake.stop = ("logits", 2)
    signal_before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(evidence.threading, "Timer", SoonTimer)
    summary = call("--seeds", "3", "--minutes", "60")
    assert fake.made == [("plain", 2)] and summary["plain"]["seeds"] == [0, 1, 2]
    assert summary["logits"]["seeds"] == [0, 1]
    assert signal.getsignal(signal.SIGINT) == signal_before
    lines = (tmp_path / "evidence-few.md").read_text()
    assert "| logits | 2 |" in lines and "| plain | 3 |" in lines


class SoonTimer:
    """A timer whose time is over, in a training that has seen the signal already."""

    def __init__(self, *_):
        self.daemon = False

    def start(self):
        pass

    def cancel(self):
        pass

    def is_alive(self):
        return False


@pytest.mark.ci
def test_several_students_at_a_time_make_the_runs_of_one_at_a_time(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    changes = ["teach.epochs=1", "cache.views=1", "distill.steps=6", "distill.batch=16"]
    line = ["digits", "--methods", "plain", "logits", "--seeds", "2"]
    line += [word for change in changes for word in ("-S", change)]

    def figures(*jobs):
        command = [sys.executable, "-m", "benchmarks.evidence", *line, *jobs]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        runs = tmp_path / "benchmarks" / "results" / "runs" / "digits"
        made = {p.name: json.loads(p.read_text())["figures"] for p in sorted(runs.glob("*.json"))}
        shutil.rmtree(runs)
        (folder,) = (tmp_path / ".work" / "benchmarks").iterdir()
        shutil.rmtree(folder / "runs")
        return {name: (run["clean"], run["noisy"]) for name, run in made.items()}

    several = figures("--jobs", "3")
    assert len(several) == 5 and several == figures()
