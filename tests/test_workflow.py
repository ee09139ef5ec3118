"""Every `run:` line of the latency workflow executed, in order, with what its actions would leave."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests import tiny
from tests.house import ROOT

WORKFLOW = YAML(typ="safe").load(ROOT / ".github" / "workflows" / "edge-latency.yml")
TARGETS = {"bench": {"enabled": ["ort-fp32", "ort-int8", "ov-fp32"], "seconds_per_row": 0.2}}
BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")
INSTALLS_NOTHING = {  # pip resolves and prepares the package, no more
    "PIP_DRY_RUN": "1",
    "PIP_NO_DEPS": "1",
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as --no-build-isolation given
}
TENSORRT = """
import importlib.util
spec = importlib.util.spec_from_file_location("fake_jetson", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.install()
"""


class Host:
    """A runner: jobs in folders of their own, artifacts and the cache kept between them."""

    def __init__(self, root: Path, repository: Path, base: str) -> None:
        self.root, self.repository = root, repository
        self.summary = root / "summary.md"
        self.commented = root / "commented"
        self.values = {
            "matrix.runner": "ubuntu-24.04",
            "github.event.pull_request.base.sha": base,
            "github.event.pull_request.number": "7",
            "github.repository": "example/edge",
            "github.token": "none",
        }
        tools, stand_in = root / "bin", root / "stand-in"
        tools.mkdir()
        stand_in.mkdir()
        gh = tools / "gh"
        gh.write_text('#!/bin/sh\necho "$@" > "$COMMENTED"; cat comment.md >> "$COMMENTED"\n')
        gh.chmod(0o755)
        fake = str(ROOT / "tests" / "fake_jetson.py")
        (stand_in / "sitecustomize.py").write_text(TENSORRT.format(path=fake))
        ours = tiny.environment()
        self.environment = {
            **ours,
            **INSTALLS_NOTHING,
            **{key: str(value) for key, value in WORKFLOW["env"].items()},
            "PATH": f"{tools}{os.pathsep}{ours['PATH']}",
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "COMMENTED": str(self.commented),
        }

    def filled(self, text: str) -> str:
        """`${{ ... }}` replaced; an expression this host does not know fails the test."""
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: self.values[found[1]], text)

    def job(self, name: str) -> list[str]:
        """Execute a job; returns the scripts that ran. A script that fails fails the test."""
        folder = self.root / name / "edge"
        folder.mkdir(parents=True)
        ran = []
        for step in WORKFLOW["jobs"][name]["steps"]:
            if "uses" in step:
                self.action(step["uses"].split("@")[0], step.get("with", {}), folder)
                continue
            script = self.filled(step["run"])
            where = folder / step.get("working-directory", "")
            environment = dict(self.environment)
            environment |= {k: self.filled(v) for k, v in step.get("env", {}).items()}
            if name == "jetson":
                environment["PYTHONPATH"] = str(self.root / "stand-in")
            done = subprocess.run(
                [*BASH, script], cwd=where, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
            ran.append(script)
        return ran

    def action(self, name: str, options: dict[str, Any], folder: Path) -> None:
        """What a step of somebody else's does here."""
        kept = self.root / "artifacts"
        if name == "actions/checkout":
            subprocess.run(["git", "clone", "-q", str(self.repository), str(folder)], check=True)
        elif name == "actions/cache":
            shutil.copytree(self.repository / options["path"], folder / options["path"])
        elif name == "actions/upload-artifact":
            for path in options["path"].split():
                source, target = folder / path, kept / self.filled(options["name"]) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if source.is_dir() else shutil.copy
                copy(source, target)
        elif name == "actions/download-artifact":
            source = kept / options["name"] if "name" in options else kept
            shutil.copytree(source, folder / options.get("path", ""), dirs_exist_ok=True)
        else:
            assert name == "actions/setup-python"


@pytest.fixture(scope="module")
def host(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A repository with a finished run as the base, and a change of the report's title as the head."""
    pytest.importorskip("openvino", reason="the openvino extra is not installed")
    root = tmp_path_factory.mktemp("host")
    repository = root / "repository"
    repository.mkdir()
    tiny.copy(repository, "docs", run=finished_run, **TARGETS)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org")

    def commit(message: str) -> str:
        subprocess.run([*git, "add", "-A"], cwd=repository, check=True)
        subprocess.run([*git, "commit", "-qm", message], cwd=repository, check=True)
        told = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True
        )
        return told.stdout.strip()

    done = tiny.dvc(repository, "repro")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    base = commit("base")
    params = repository / "params.yaml"
    params.write_text(params.read_text().replace("Digits at the edge", "Another title"))
    assert tiny.dvc(repository, "repro").returncode == 0
    commit("head")
    return Host(root, repository, base)


@pytest.mark.ci
@pytest.mark.timeout(1800)
def test_every_line_of_the_workflow_runs(host: Host) -> None:
    ran = {name: host.job(name) for name in WORKFLOW["jobs"]}
    lines = sum("run" in step for job in WORKFLOW["jobs"].values() for step in job["steps"])
    assert sum(map(len, ran.values())) == lines
    told = host.summary.read_text()
    assert "Another title" in (host.root / "gate" / "edge" / "edge" / "index.html").read_text()
    assert "Baseline comparison" in told and "| ort-int8 |" in told
    assert "PASS" in told and '"schema": "cakd.bundle-bench/1"' in told
    commented = host.commented.read_text()
    assert commented.startswith("pr comment 7 --edit-last --create-if-none --body-file")
    assert "Baseline comparison" in commented


@pytest.mark.ci
def test_a_lock_of_other_code_is_refused(host: Host, tmp_path: Path) -> None:
    clone = tmp_path / "edge"
    subprocess.run(["git", "clone", "-q", str(host.repository), str(clone)], check=True)
    path = clone / "pipeline" / "distill" / "objective.py"
    path.write_text(path.read_text() + "\n# edited\n")
    steps = WORKFLOW["jobs"]["gate"]["steps"]
    (script,) = [step["run"] for step in steps if "--dry" in step.get("run", "")]
    done = subprocess.run(
        [*BASH, script], cwd=clone, env=host.environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "dvc.lock is not of this code" in done.stdout


def test_gitlab_measures_as_github_does() -> None:
    page = (ROOT / "docs" / "ci.md").read_text()
    example = YAML(typ="safe").load(page.split("```yaml")[1].split("```")[0])
    script = " ".join(example["edge-latency"]["script"])
    for step in WORKFLOW["jobs"]["gate"]["steps"]:
        for command in re.findall(r"python -m (?:exporters|stages)[^>|]*", step.get("run", "")):
            assert " ".join(command.split()) in script
