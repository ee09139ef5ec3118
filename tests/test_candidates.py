"""Untrained candidates: which are listed, their ranking, that a kill loses nothing, and the pack for a device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from exporters.artifact.session import TARGETS
from exporters.bench import measure
from exporters.bench.energy import Meter
from exporters.bench.measure import Subject
from exporters.candidates import ranking, rounds, untrained
from exporters.candidates.catalogue import FAMILIES, Candidate, candidates
from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.core.students import Candidates, PackBench
from pipeline.models import checkpoint
from stages import students

TINY = "test_resnet:channels=[8,12,16,24],output_stride=8"
SMALL = ("--image-size", "32", "--classes", "10", "--rounds", "5", "--seconds", "0.05")


def test_families_and_networks_mix_and_each_is_listed_once() -> None:
    every = candidates(())
    assert 20 <= len(every) == sum(map(len, FAMILIES.values())) <= 24
    mixed = candidates(["repvgg", "resnet18", "repvgg_a0"])
    assert [one.name for one in mixed] == ["repvgg_a0", "repvgg_a1", "resnet18"]
    (tiny,) = candidates([TINY])
    assert tiny == Candidate(TINY, "test_resnet", {"channels": [8, 12, 16, 24], "output_stride": 8})
    assert tiny.slug == "test_resnet-channels-8-12-16-24-output_stride-8"
    strided = candidates(["resnet18", "test_resnet:channels=[8,8,8,8]"], [16, 8])
    assert [one.kwargs["output_stride"] for one in strided] == [16, 8, 16, 8]
    assert strided[-1].name == "test_resnet:channels=[8,8,8,8],output_stride=8"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("repvg", "did you mean 'repvgg'?"),
        ("resnet18:", "expected NAME:key=value"),
        ("resnet18:output_stride", "expected NAME:key=value"),
        ("resnet18:channels=[8,", "expected NAME:key=value"),
    ],
)
def test_what_is_no_candidate_is_refused_in_a_line(name: str, said: str) -> None:
    with pytest.raises(UserError, match=r"^--students: got ") as refused:
        candidates([name])
    assert said in str(refused.value)


def row(name: str, p50: float | None, macs: int, top1: float | None = None) -> dict[str, Any]:
    """A row as the ranking reads it."""
    status = "skipped" if p50 is None else "measured"
    return {
        "name": name,
        "status": status,
        "wall_ms": {"p50": p50},
        "macs": macs,
        "imagenet_top1": top1,
    }


def test_the_front_is_by_capacity_and_what_differs_by_noise_alone_is_level() -> None:
    rows = [
        row("slow", 10.0, 90),
        row("unknown", None, 0),
        row("small", 1.0, 10),
        row("bad", 2.0, 5),
        row("twin", 5.1, 50),
        row("middle", 5.0, 60),
    ]
    ranked = ranking.rank(rows, 5.05)
    assert [r["name"] for r in ranked] == ["small", "bad", "middle", "twin", "slow", "unknown"]
    assert [r["front"] for r in ranked] == ["front", None, "front", "level", "front", None]
    assert [r["fits"] for r in ranked] == ["yes", "yes", "level", "level", "no", None]
    assert all(r["fits"] is None for r in ranking.rank(rows, None))


def test_the_front_is_by_accuracy_where_it_is_known_of_all() -> None:
    rows = [row("wide", 2.0, 90, 60.0), row("deep", 1.0, 10, 70.0)]
    assert [r["front"] for r in ranking.rank(rows, None)] == ["front", None]
    half = [row("wide", 2.0, 90, None), row("deep", 1.0, 10, 70.0)]
    assert [r["front"] for r in ranking.rank(half, None)] == ["front", "front"]


def test_timms_results_give_the_best_accuracy_of_an_architecture(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("model,top1,top5\nresnet18.a1_in1k,71.5,90\nresnet18.tv_in1k,69.8,89\n")
    assert ranking.imagenet_top1(path) == {"resnet18": 71.5}
    for text in ("model,top5\nresnet18,90\n", "model,top1\nresnet18,high\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="not a CSV with columns model and top1"):
            ranking.imagenet_top1(path)
    with pytest.raises(UserError, match="FileNotFoundError"):
        ranking.imagenet_top1(tmp_path / "none.csv")


def test_a_network_is_built_once_and_one_that_cannot_be_built_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = untrained.Settings("ort-int8", 32, 10, 4)
    (tiny,) = candidates([TINY])
    first = untrained.build(tiny, settings, tmp_path)
    assert first.artefact and first.onnx and first.artefact.name == "student-int8.onnx"
    assert (first.tap, first.no_tap, first.reason) == ("layer4 4x4", None, None)
    model, _ = checkpoint.load(first.onnx.with_suffix(".safetensors"))
    counted = checkpoint.count(model, 32)  # as evaluate counts a trained one, which report judges
    assert {"params": first.params, "macs": first.macs} == counted
    (wrong,) = candidates(["test_resnet:depth=3"])
    assert "cannot create test_resnet with {'depth': 3}" in str(
        untrained.build(wrong, settings, tmp_path).reason
    )
    assert not list(tmp_path.glob("*depth*"))
    monkeypatch.setattr(untrained, "_export", None)
    monkeypatch.setattr(untrained, "_artefact", None)
    assert untrained.build(tiny, settings, tmp_path) == first


@pytest.mark.parametrize(
    ("budgets", "targets"),
    [
        ([], ["ort-fp32", "ort-int8"]),
        (["params_max", "top1_min"], ["ort-fp32", "ort-int8"]),
        (["ort-int8.size_mb_max", "ort-int8.wall_ms_max"], ["ort-int8"]),
        (["torch-eager.wall_ms_max"], ["torch-eager"]),
        (["ort-int8.size_mb_max", "wall_ms_max"], ["ort-int8", "ort-fp32"]),
        (["torch-eager.wall_ms_max", "size_mb_max"], ["torch-eager", "ort-fp32", "ort-int8"]),
    ],
)
def test_a_budget_without_a_target_is_measured_on_every_enabled_one(
    budgets: list[str], targets: list[str]
) -> None:
    assert students.deciding(budgets, ["ort-fp32", "torch-eager", "ort-int8"]) == targets


def test_a_network_that_cannot_be_tapped_is_measured_all_the_same(tmp_path: Path) -> None:
    coarse = untrained.build(
        Candidate("test_resnet", "test_resnet"),
        untrained.Settings("ort-fp32", 32, 10, 16),
        tmp_path,
    )
    assert coarse.artefact is not None and coarse.tap is None
    assert "expected one of the last two to have half the side" in str(coarse.no_tap)


@contextmanager
def metered(monkeypatch: pytest.MonkeyPatch, watts: float) -> Iterator[None]:
    """A machine with a power meter that always shows the same."""

    class Constant(Meter):
        source = "constant"

        def watts(self) -> float:
            return watts

    with monkeypatch.context() as patched:
        patched.setattr(measure, "find_meter", lambda: Constant())
        yield


def test_a_killed_measurement_goes_on_with_the_rounds_it_has(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject("tiny", exported / "student.onnx", TARGETS["ort-fp32"])
    protocol = rounds.Protocol(6, 0.01)
    made: list[int] = []

    def killed_in_the_third(runners: Any, count: int, seconds: float, seed: int) -> None:
        made.append(seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        measure.run_rounds(runners, count, seconds, seed)

    monkeypatch.setattr(rounds, "run_rounds", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        rounds.measure([subject], protocol, tmp_path)
    kept = sorted(tmp_path.rglob("*.json"))
    assert [path.name for path in kept] == ["0000.json", "0001.json"]
    with metered(monkeypatch, 4.0):
        (measured,) = rounds.measure([subject], protocol, tmp_path)
    assert measured.row["energy"]["watts"] == 4.0  # of the rounds after the kill
    assert made == [0, 1, 2, 2, 3, 4, 5]
    (blocks,) = measured.processes
    early = [artifacts.rounded(json.loads(json.dumps(vars(b)))) for b in blocks[:2]]
    assert len(blocks) == 6 and len(early[0]["wall_ms"]) >= 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_ranks_and_a_budget_that_none_fits_is_a_failed_gate(
    tmp_path: Path, command: Any
) -> None:
    arguments = ("exporters.candidates", "--students", TINY, "test_resnet:channels=[16,24,32,48]")
    places = ("--work", tmp_path / "work", "--json", tmp_path / "candidates.json")
    done = command(*arguments, *SMALL, *places, "--budget-ms", "1000", "--target", "ort-int8")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 measured fit 1000 ms" in done.stdout
    found = artifacts.read(tmp_path / "candidates.json", Candidates)
    assert {r["precision"] for r in found["rows"]} == {"int8"}
    assert all(r["fits"] == "yes" and r["wall_ms"]["p50_ci"] for r in found["rows"])
    done = command(*arguments, *SMALL, *places, "--budget-ms", "1e-6", "--target", "ort-int8")
    assert done.returncode == 3
    assert "--budget-ms: got 1e-06; expected" in done.stderr and done.stderr.count("\n") == 1
    done = command("exporters.candidates", "--students", "resnet99", *places)
    assert done.returncode == 2 and "resnet99" in done.stderr


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, command: Any) -> Path:
    """A pack of two networks and of one that cannot be built."""
    folder = tmp_path_factory.mktemp("packs")
    names = (TINY, "test_resnet:channels=[16,24,32,48]", "test_resnet:depth=3")
    done = command(
        "exporters.candidates",
        "--students",
        *names,
        *SMALL,
        "--work",
        folder / "work",
        "--pack",
        folder / "pack",
        "--target",
        "ort-int8",
    )
    assert done.returncode == 0, done.stderr
    assert "2 networks; on the device: python -m bundle.run --bench-all" in done.stdout
    return Path(folder / "pack")


def on_device(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """bundle.run in that folder, with none of our packages, torch, timm or onnx in reach."""
    blocked = ("torch", "timm", "onnx", "pipeline", "exporters", "stages", "benchmarks", "PIL")
    start = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r}));"
        "runpy.run_module('bundle.run', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def test_a_pack_is_measured_on_the_device_and_read_back(
    packed: Path, tmp_path: Path, command: Any
) -> None:
    done = on_device(packed, "--bench-all", "--json", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "device.json"
    path.write_text(done.stdout)
    found = artifacts.read(path, PackBench)
    assert [r["status"] for r in found["rows"]] == ["measured", "measured", "skipped"]
    assert all(r["precision"] == "int8" for r in found["rows"][:2])
    lines = on_device(packed, "--bench-all", "--seconds", "0.1").stdout.splitlines()
    assert lines[0].startswith(f"{TINY}: p50 ") and "skipped: " in lines[2]
    back = tmp_path / "candidates.json"
    done = command("exporters.candidates", "--from", path, "--budget-ms", "1000", "--json", back)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 measured fit 1000 ms" in done.stdout and "depth" in done.stdout
    assert artifacts.read_json(back)["target"].startswith("onnxruntime ")


def test_what_is_no_pack_or_a_damaged_one_is_refused(
    packed: Path, tmp_path: Path, command: Any
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "pack"))
    done = on_device(copy, "--bench")
    assert done.returncode == 2 and "got a pack of candidates" in done.stderr
    assert "run --bench-all" in done.stderr
    done = on_device(copy, "--bench-all", "--precision", "fp32")
    assert done.returncode == 2 and "expected int8, that of this pack" in done.stderr
    (network, *_) = sorted(copy.glob("*.onnx"))
    network.write_bytes(network.read_bytes()[:-1])
    done = on_device(copy, "--bench-all")
    assert done.returncode == 2 and "damaged: got " in done.stderr
    for text in ('{"schema": "cakd.pack/1"}', '{"schema": "cakd.pack/2"}', "none"):
        (copy / "manifest.json").write_text(text)
        done = on_device(copy, "--bench-all")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
    bad = tmp_path / "device.json"
    bad.write_text('{"schema": "cakd.pack-bench/1", "rows": []}')
    done = command("exporters.candidates", "--from", bad)
    assert done.returncode == 2 and "copy what `--bench-all --json` printed again" in done.stderr
