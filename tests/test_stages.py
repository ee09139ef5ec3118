"""The stages of dvc.yaml one after the other on tiny parameters, in this process: the chain without DVC."""

from __future__ import annotations

import json
import shutil

import pytest
from ruamel.yaml import YAML

from tests import chain, command_line, tiny
from tests.conftest import VIT
from tests.house import ROOT
from tests.test_schemas import problems

SMALL = {
    "teach": {"epochs": 1, "kwargs": {**VIT, "global_pool": "avg", "fc_norm": False}},
    "distill": {**tiny.PARAMS["distill"], "methods": ["plain", "cakd+logits"], "workers": 0},
    "bench": {**tiny.PARAMS["bench"], "enabled": ["ort-fp32"]},
}
OWN = ("cakd.prepared/", "cakd.source/", "cakd.plan/")  # read by their writers alone


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder in which every stage ran, and what each said, by its name in dvc.yaml."""
    folder = tmp_path_factory.mktemp("a chain")
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    for section, values in (*tiny.PARAMS.items(), *SMALL.items()):
        params[section].update(values)
    yaml.dump(params, folder / "params.yaml")
    shutil.copy(ROOT / "dvc.yaml", folder)
    said = {}
    for stage in chain.stages(folder):
        said[stage.name] = command_line.here(*stage.argv, folder=folder)
        assert said[stage.name].returncode == 0, (stage.argv, said[stage.name].stderr)
        assert all((folder / out).exists() for out in stage.outs), stage
    return folder, said


def test_every_stage_says_in_one_line_what_it_made(finished):
    _, said = finished
    for name, done in said.items():
        assert done.stderr == "" and done.stdout.count("\n") >= 1, (name, done)
    assert "5 classes" not in said["prepare"].stdout and "10 classes" in said["prepare"].stdout


def test_the_report_has_the_targets_and_the_accuracy_of_every_method(finished):
    folder, _ = finished
    accuracy = json.loads((folder / "reports" / "accuracy.json").read_text())
    assert set(accuracy["models"]) == {"teacher", "plain", "cakd+logits"}
    assert accuracy["models"]["plain"]["labels_seen"] == 50
    assert {"schema", "machine", "provenance"} <= set(accuracy)
    selected = json.loads((folder / "reports" / "selection.json").read_text())["selected"]
    made = json.loads((folder / "artifacts" / "export" / "export.json").read_text())
    student = json.loads((folder / "artifacts" / "export" / "student.json").read_text())
    assert made["method"] == student["method"] == selected
    assert "student" not in made  # there is one
    edge = (folder / "reports" / "edge.md").read_text()
    assert "| ort-fp32 |" in edge and "cakd+logits" in edge
    assert (folder / "reports" / "index.html").stat().st_size > 20_000
    perf = json.loads((folder / "reports" / "train_perf.json").read_text())
    keys = {"img_per_s", "stage_ms", "stall_fraction", "peak_mb"}
    assert all(keys <= set(method) for method in perf["methods"].values())


def test_every_json_of_the_chain_is_what_its_schema_says(finished):
    folder, _ = finished
    made = {
        path.relative_to(folder).as_posix(): json.loads(path.read_text())
        for name in ("artifacts", "data", "reports")
        for path in (folder / name).rglob("*.json")
    }
    judged = {name: d for name, d in made.items() if not d["schema"].startswith(OWN)}
    assert {"artifacts/export/export.json", "data/features/manifest.json"} < set(judged)
    assert {name: found for name, d in judged.items() if (found := problems(d))} == {}


def test_a_stage_run_again_leaves_the_same_bytes_and_nothing_unfinished(finished):
    folder, _ = finished
    assert chain.litter(folder) == []
    again = [s for s in chain.stages(folder) if s.name in ("prepare", "distill@cakd+logits")]
    before = [chain.hashes(folder, stage.outs, same_bench=True) for stage in again]
    for stage in again:
        chain.remove(folder, stage.outs)
        assert command_line.here(*stage.argv, folder=folder).returncode == 0
    assert [chain.hashes(folder, stage.outs, same_bench=True) for stage in again] == before
