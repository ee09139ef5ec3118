"""The teacher is trained on every label, and a killed training goes on to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from pipeline import teach as pipeline_teach
from pipeline.core import artifacts
from pipeline.core.config import parse
from pipeline.core.errors import UserError
from pipeline.data import mixing, views
from pipeline.models import checkpoint
from pipeline.teach import Teach
from pipeline.training import loop, seeds
from tests.conftest import CNN, ROOT, VIT
from tests.killed import command
from tests.test_compute import forked

QUICK = Teach("vit_tiny_patch16_224", kwargs=VIT | {"drop_path_rate": 0.2}, epochs=1, batch=128)
STEPS = 11  # of 1,297 images


def teach(config, prepared, folder):
    return pipeline_teach.teach(config, prepared, folder / "teacher", folder / "work")


def test_a_training_killed_at_any_step_goes_on_to_the_same_bits(prepared, tmp_path, monkeypatch):
    """With drop-path: random numbers of the model's own must come from the step too."""
    config = replace(QUICK, checkpoint_every=2)
    described = teach(config, prepared, tmp_path / "whole")
    assert described["labels_seen"] == 1297

    class Killed(Exception):
        pass

    exact, seen, doomed = seeds.step_seed, [], [9, 3]

    def killing(seed, step, stream):
        seen.append(step)
        if step in doomed[-1:]:
            raise Killed
        return exact(seed, step, stream)

    monkeypatch.setattr(seeds, "step_seed", killing)
    while doomed:
        with pytest.raises(Killed):
            teach(config, prepared, tmp_path / "killed")
        doomed.pop()
    seen.clear()
    teach(config, prepared, tmp_path / "killed")
    assert seen == list(range(8, STEPS))  # from the last checkpoint, not from the beginning
    for name in ("teacher.safetensors", "teacher.json"):
        whole, killed = (tmp_path / k / "teacher" / name for k in ("whole", "killed"))
        assert artifacts.sha256(whole) == artifacts.sha256(killed)
    assert not list((tmp_path / "killed" / "work").glob("*/"))


def hashes(folder):
    return [artifacts.sha256(path) for path in sorted((folder / "teacher").iterdir())]


MIXED = replace(
    QUICK, geometry=views.Geometry(mix=mixing.Mix(mixup=0.8, cutmix=1.0)), label_smoothing=0.1
)


@pytest.mark.parametrize("config", [QUICK, MIXED], ids=["plain", "mixed"])
def test_views_made_by_workers_train_to_the_same_bits(config, prepared, tmp_path):
    for workers in (0, 2):
        teach(replace(config, workers=workers), prepared, tmp_path / str(workers))
    assert hashes(tmp_path / "0") == hashes(tmp_path / "2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.parametrize("config", [QUICK, MIXED], ids=["plain", "mixed"])
def test_two_ranks_train_what_one_process_trains_with_the_whole_batch(
    config, prepared, tmp_path, monkeypatch
):
    """1,297 images in batches of 81: the last batch of the epoch has one, and nothing for the second rank."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda g, lr: torch.optim.SGD(g, lr))
    config = replace(config, kwargs=VIT, batch=81, workers=1)
    teach(replace(config, workers=0), prepared, tmp_path / "one")

    def train(ranks):
        pipeline_teach.teach(
            config, prepared, tmp_path / "two" / "teacher", tmp_path / "two" / "work", ranks
        )

    forked(2, train, tmp_path)
    one, two = (
        checkpoint.load(tmp_path / name / "teacher" / "teacher.safetensors")[0]
        for name in ("one", "two")
    )
    one, two = (torch.cat([p.flatten() for p in vit.parameters()]) for vit in (one, two))
    assert 0 < ((one - two).norm() / one.norm()).item() <= 1e-5
    assert not list((tmp_path / "two" / "work").glob("*/"))


def torchrun(folder):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", *command("teach", folder)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_all(launcher):
    """Kill torchrun and its ranks, each of which has a session of its own."""
    for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
        process.kill()


@pytest.mark.ci
def test_two_ranks_killed_in_a_training_go_on_to_the_same_bits(digits, tmp_path):
    recipe = {
        "model": "vit_tiny_patch16_224",
        "kwargs": {**VIT, "drop_path_rate": 0.2},
        "epochs": 8,
        "batch": 64,
        "workers": 1,
        "checkpoint_every": 3,
    }
    for name in ("whole", "killed"):
        shutil.copytree(digits, tmp_path / name / "prepared")
        (tmp_path / name / "params.yaml").write_text(json.dumps({"teach": recipe}))
    running = torchrun(tmp_path / "killed")
    until = time.monotonic() + 60
    while not list((tmp_path / "killed" / "work").rglob("checkpoint.safetensors")):
        assert time.monotonic() < until and running.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    kill_all(running)
    running.communicate()
    assert not (tmp_path / "killed" / "teacher").exists()
    for name in ("killed", "whole"):
        running = torchrun(tmp_path / name)
        output, _ = running.communicate(timeout=240)
        assert running.returncode == 0, output[-3000:]
        assert output.count("labels seen") == 1
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_a_killed_worker_is_named_as_the_teachers(prepared, tmp_path, monkeypatch):
    exact = loop.learning_rate
    before = {*psutil.Process().children()}

    def kill(step, *more):
        if step == 2:
            (worker,) = {*psutil.Process().children()} - before
            worker.kill()
            time.sleep(1)
        return exact(step, *more)

    monkeypatch.setattr(loop, "learning_rate", kill)
    with pytest.raises(UserError, match="teach.workers: one of 1 was killed .* lower teach.work"):
        teach(replace(QUICK, workers=1), prepared, tmp_path)


def test_unfinished_work_of_another_recipe_is_not_gone_on_with(prepared, tmp_path, monkeypatch):
    config = replace(QUICK, checkpoint_every=2)

    def stop(step, *_):
        if step == 5:
            raise KeyboardInterrupt
        return 1e-3

    with monkeypatch.context() as patched:
        patched.setattr(loop, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            teach(config, prepared, tmp_path)
    seen = []
    exact = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda *a: seen.append(a[0]) or exact(*a))
    teach(replace(config, lr=1e-3), prepared, tmp_path)
    assert seen[0] == 0


def test_a_training_that_diverges_is_stopped_and_publishes_nothing(prepared, tmp_path):
    config = replace(QUICK, lr=1e30, weight_decay=0.0)
    with pytest.raises(
        UserError, match=r"teach: training diverged: loss: got .* at step \d+.*lower teach.lr"
    ):
        teach(config, prepared, tmp_path)
    assert not (tmp_path / "teacher").exists()


def test_a_cnn_is_not_left_with_one_image_for_its_last_batch(prepared, tmp_path):
    config = Teach("test_resnet", kwargs=CNN, epochs=1, batch=162)  # 1,297 = 8 x 162 + 1
    with pytest.raises(UserError, match=r"teach.batch: got 162, which leaves 1 of 1297 images"):
        teach(config, prepared, tmp_path)
    teach(replace(config, model="vit_tiny_patch16_224", kwargs=VIT), prepared, tmp_path / "vit")


def test_a_grid_that_does_not_fit_the_images_is_refused_with_both_sizes(prepared, tmp_path):
    config = replace(QUICK, kwargs=VIT | {"img_size": 64})
    with pytest.raises(UserError, match="for images of 64x64 px; expected 32x32 px, as prepared"):
        teach(config, prepared, tmp_path)


def test_a_pickle_is_never_loaded_as_weights(tmp_path, prepared):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a safetensors file.*never loaded"):
        teach(replace(QUICK, kwargs=VIT, weights=str(path)), prepared, tmp_path)


def test_weights_that_are_not_there_are_named(prepared, tmp_path):
    with pytest.raises(
        UserError, match="teach.weights: got scrach, which is not a file; expected scratch"
    ):
        teach(replace(QUICK, weights="scrach"), prepared, tmp_path)


def test_given_weights_are_used_as_they_are_when_epochs_is_0(teacher_path, prepared, tmp_path):
    teach(replace(QUICK, kwargs=VIT, weights=str(teacher_path), epochs=0), prepared, tmp_path)
    given, ours = (
        checkpoint.load(p)[0].state_dict()
        for p in (teacher_path, tmp_path / "teacher" / "teacher.safetensors")
    )
    assert all(torch.equal(given[name], ours[name]) for name in given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -1}, "teach.epochs: got -1; expected 0 or more"),
        ({"epochs": 0}, "teach: got epochs 0 with weights 'scratch'"),
        ({"lr": 0.0}, "teach.lr: got 0.0; expected above 0"),
    ],
)
def test_impossible_recipes_are_refused_with_the_value(change, message):
    with pytest.raises(UserError, match=message):
        parse(Teach, {"model": "vit", **change}, "teach")
