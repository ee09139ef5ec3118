"""Accidents leave no trace: a few rounds of `make chaos`, and that its eyes are open."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from tests import chaos
from tests.accidents import ACCIDENTS
from tests.chain import Stage
from tests.house import ROOT


@pytest.mark.ci
def test_a_few_accidents_leave_the_chain_as_it_was():
    """Rounds begin for 36 seconds; `make chaos` has 100."""
    seed = random.SystemRandom().randrange(1000)
    command = f"-m tests.chaos --rounds 100 --dvc 0 --minutes 0.6 --seed {seed}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-2000:]}"
    assert "0 rounds with another hash" in done.stdout and done.stdout.startswith("1: {")


@pytest.fixture
def two(tmp_path):
    """Two folders with the same artefacts."""
    train = {"steps": 21, "img_per_s": {"median": 1.0}, "curves": {"loss": [[1, 0.5]]}}
    for name in ("one", "other"):
        (tmp_path / name / "reports" / "train").mkdir(parents=True)
        (tmp_path / name / "data").mkdir()
        (tmp_path / name / "data" / "images").write_text("pixels")
        (tmp_path / name / "reports" / "train" / "plain.json").write_text(json.dumps(train))
    return tmp_path / "one", tmp_path / "other", train


def differing(two):
    return chaos.differing(*two[:2], ("data", "reports/train"), same_bench=True)


def test_another_byte_another_loss_and_a_missing_file_are_seen_another_speed_is_not(two):
    _, other, train = two
    assert differing(two) == ()
    path = other / "reports" / "train" / "plain.json"
    path.write_text(json.dumps({**train, "img_per_s": {"median": 2.0}}))
    assert differing(two) == ()
    path.write_text(json.dumps({**train, "curves": {"loss": [[1.0, 0.5]]}}))
    assert differing(two) == ("reports/train/plain.json",)
    (other / "data" / "images").write_text("pixelz")
    assert differing(two) == ("data/images", "reports/train/plain.json")
    (other / "data" / "images").unlink()
    assert differing(two) == ("data/images", "reports/train/plain.json")


TRACEBACK = 'Traceback (most recent call last):\n  File "/x/{}/run.py", line 1, in f\n    g()\nOSError: no\n'


@pytest.mark.parametrize(
    ("through", "said", "failed", "of_others"),
    [
        ("dvc", "all is well\n", False, 0),
        ("dvc", TRACEBACK.format("site-packages/dvc"), False, 1),
        ("dvc", TRACEBACK.format("pipeline"), True, 0),
        ("stage", TRACEBACK.format("site-packages/torch"), True, 0),
    ],
)
def test_a_traceback_is_a_failure_where_our_code_is_in_it(
    through, said, failed, of_others, tmp_path
):
    (tmp_path / "log").write_text(said + "ERROR: 'x' is busy, blocked by 1234\n")
    happened = chaos.Round(through, "teach", "killed")
    happened.read(tmp_path / "log")
    assert (happened.failed, happened.of_others) == (failed, of_others)
    assert happened.dvc_said == ("'x' is busy, blocked by N",)


def test_a_hundred_rounds_meet_every_stage_with_every_accident():
    names = ("prepare", "teach", "distill@plain", "bench@ort-fp32")
    stages = [Stage(name, (), ()) for name in names]
    drawn = chaos.plan(stages, 100, 20, random.Random(0))
    assert len(drawn) == 100 and sum(real for real, _, _ in drawn) == 20
    met = {(stage.name, accident) for real, stage, accident in drawn if not real}
    missing = {(n, a) for n in names for a in ACCIDENTS} - met
    assert missing == {("prepare", "worker killed"), ("teach", "worker killed")}
