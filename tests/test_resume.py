"""Killed anywhere in teach, cache or distill, a chain goes on to the same student as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.core import artifacts
from pipeline.core.atomic import PARTIAL, atomic_dir, sweep
from pipeline.training import resume
from tests.conftest import CNN, VIT
from tests.house import ROOT

PARAMS = {
    "teach": {
        "model": "vit_tiny_patch16_224",
        "kwargs": {**VIT, "drop_path_rate": 0.1},
        "epochs": 2,
        "batch": 64,
        "checkpoint_every": 3,
    },
    "cache": {"views": 2, "shard_mb": 1},
    "distill": {
        "methods": ["cakd+logits"],
        "student": "test_resnet",
        "student_kwargs": CNN,
        "steps": 21,
        "checkpoint_every": 3,
    },
}


def chains(folder, digits, kills, seed):
    shutil.copytree(digits, folder / "prepared")
    (folder / "params.yaml").write_text(json.dumps(PARAMS))
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(folder), str(kills), str(seed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    found = chains(tmp_path_factory.mktemp("undisturbed"), digits, 0, 0)
    assert len(found["hashes"]) == 1 and not found["litter"]
    return found["hashes"][0]


@pytest.mark.ci
@pytest.mark.parametrize("kills", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_student_is_the_same(kills, undisturbed, digits, tmp_path):
    found = chains(tmp_path, digits, kills, seed=kills)
    assert len(found["fell"]) == kills and set(found["hashes"]) == {undisturbed}
    assert not found["litter"]


def start(stage, folder, **environment):
    from tests.killed import command

    return subprocess.Popen(
        [sys.executable, "-m", *command(stage, folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(found, seconds=60.0):
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.ci)]
)
def test_a_signal_saves_and_leaves_and_the_next_run_goes_on(number, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "prepared")
    long = {**PARAMS["teach"], "epochs": 40, "checkpoint_every": 100_000}
    (tmp_path / "params.yaml").write_text(json.dumps({"teach": long}))
    running = start("teach", tmp_path)
    wait_for(lambda: list((tmp_path / "work" / "teach").glob("*.lock")))
    time.sleep(1)
    running.send_signal(number)
    _, said = running.communicate(timeout=240)
    assert running.returncode == 128 + number
    assert "saved" in said and "run again to resume" in said and said.count("\n") == 1
    (checkpoint,) = (tmp_path / "work" / "teach").rglob("checkpoint.safetensors")
    assert checkpoint.stat().st_size > 10_000 and not (tmp_path / "teacher").exists()


@pytest.mark.ci
def test_a_stage_of_dvc_leaves_with_its_dvc(digits, tmp_path):
    """The parent of the stage is killed; the stage saves and goes, and nothing is left to write a second time."""
    shutil.copytree(digits, tmp_path / "prepared")
    long = {**PARAMS["teach"], "epochs": 400, "checkpoint_every": 100_000}
    (tmp_path / "params.yaml").write_text(json.dumps({"teach": long}))
    from tests.killed import command

    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', *sys.argv[1:]])"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, *command("teach", tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DVC_STAGE": "teach"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: list((tmp_path / "work" / "teach").glob("*.lock")))
    time.sleep(1)
    parent.kill()
    parent.wait()
    wait_for(lambda: list((tmp_path / "work" / "teach").rglob("checkpoint.safetensors")), 20)
    wait_for(lambda: not any(str(tmp_path) in line for line in processes()), 20)


def test_who_waited_for_another_writer_finds_a_work_folder_of_its_own(tmp_path):
    def second():
        with resume.work_folder(tmp_path, "f" * 16) as folder:
            return folder.is_dir()

    with ThreadPoolExecutor(1) as pool:
        with resume.work_folder(tmp_path, "f" * 16) as folder:
            waiting = pool.submit(second)
            time.sleep(0.3)
            assert folder.is_dir() and not waiting.done()
        assert waiting.result()


def processes():
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if "stages.teach" in line]


def test_what_a_killed_run_left_beside_its_output_is_swept_away(tmp_path):
    code = (
        "import os, signal\nfrom pipeline.core import atomic\n"
        "with atomic.atomic_dir('out') as folder, atomic.atomic('a.json') as file:\n"
        "    (folder / 'half').write_text('')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(p.name.endswith(PARTIAL) for p in tmp_path.iterdir())
    with atomic_dir(tmp_path / "out") as mine:
        sweep(tmp_path / "out")  # a live writer's folder stays
        assert mine.exists()
    artifacts.write_json(tmp_path / "a.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "out"]
