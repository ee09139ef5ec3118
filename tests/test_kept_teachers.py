"""Teachers that are kept in git: written in float16, judged as written, and judged again with the same figures."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from benchmarks import runs, teacher
from pipeline.core.errors import GateFailed
from pipeline.models import checkpoint
from tests.house import ROOT

CIFAR100 = ROOT.parent / "shared" / "data" / "cifar100"
KEPT = sorted(p.with_suffix("") for p in (ROOT / teacher.ASSETS).glob("*.safetensors"))


@pytest.fixture
def call(tmp_path, monkeypatch):
    """`benchmarks.teacher digits` with one short pass, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "RECIPES", ROOT / "recipes")
    changes = ["teach.epochs=1", "teach.kwargs.depth=1"]
    line = ["digits", *(word for change in changes for word in ("-S", change))]

    def call(*more):
        teacher.main(teacher.parser().parse_args([*line, *more]))

    return call


def test_a_teacher_is_kept_in_half_precision_with_the_figures_of_that_file(
    call, tmp_path, capsys, monkeypatch
):
    call()
    kept = tmp_path / "benchmarks" / "assets" / "digits.safetensors"
    dtypes = {str(t.dtype) for t in load_file(kept).values() if t.is_floating_point()}
    assert dtypes == {"torch.float16"}
    description = checkpoint.describe(kept)
    assert description["role"] == "teacher" and description["labels_seen"] > 0
    record = json.loads(kept.with_name("digits-figures.json").read_text())
    assert record["passes"] == 1 and 0 < record["figures"]["clean"] <= 1
    assert record["cpu_hours"] > 0
    text = kept.with_name("digits-figures.md").read_text()
    assert "`python -m benchmarks.teacher digits -S teach.epochs=1 -S teach.kwargs.depth=1`" in text
    capsys.readouterr()
    monkeypatch.setattr(runs.teach, "teach", None)  # trains nothing
    call("--check")
    clean = 100 * record["figures"]["clean"]
    assert f"clean: {clean:.2f} %, recorded {clean:.2f} %" in capsys.readouterr().out
    record["figures"]["clean"] += 0.01
    kept.with_name("digits-figures.json").write_text(json.dumps(record))
    with pytest.raises(GateFailed, match="clean top-1: got"):
        call("--check")


def test_a_training_whose_time_is_over_keeps_nothing_and_the_next_call_goes_on(
    call, tmp_path, capsys
):
    epochs = ("-S", "teach.epochs=4")
    call("--minutes", "0.001", *epochs)
    assert "not trained to its end yet" in capsys.readouterr().out
    assets = tmp_path / "benchmarks" / "assets"
    assert not assets.exists()
    (spent,) = (tmp_path / ".work" / "benchmarks").glob("*/teacher-seconds.json")
    before = json.loads(spent.read_text())["seconds"]
    call(*epochs)
    record = json.loads((assets / "digits-figures.json").read_text())
    assert record["passes"] == 4 and 3600 * record["cpu_hours"] > before > 0


@pytest.mark.ci
@pytest.mark.skipif(
    not CIFAR100.is_dir(), reason="no CIFAR-100 parquet files beside the repository"
)
@pytest.mark.parametrize("kept", KEPT, ids=[k.name for k in KEPT])
def test_the_figures_of_a_kept_teacher_are_those_of_its_file(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "RECIPES", ROOT / "recipes")
    line = [kept.name, "--data", str(CIFAR100), "--check", "--out", str(kept)]
    teacher.main(teacher.parser().parse_args(line))
