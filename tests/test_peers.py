"""Ours and the peers that are installed take turns; a peer without figures is a row with its reason."""

from __future__ import annotations

import json
import statistics
import sys

import pytest

from benchmarks import peers
from benchmarks.peer_parts import process, table, worker
from pipeline.core.errors import UserError
from tests import house

DIES = "import sys; print('{}', flush=True); input(); sys.exit('out of memory')"


def test_ours_and_the_peers_take_turns_and_one_without_figures_is_a_row(tmp_path, capsys):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 3\n")
    broken.chmod(0o755)
    line = "--teacher test_vit --student test_resnet --size 160 --batch 4 --images 20 --rounds 2"
    paths = f"--env torchdistill={broken} --folder {tmp_path} --out {tmp_path}/out"
    peers.main(peers.parser().parse_args([*line.split(), *paths.split()]))
    result = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["system"], row["method"]): row for row in result["rows"]}
    modes = ("cached", "online")
    assert [*rows][:4] == [(f"ours, {m}", method) for m in modes for method in peers.METHODS]
    assert rows["torchdistill", "SPKD"]["reason"] == "ended with 3: no such library"
    absent = rows["LightlyTrain", "distillationv3"]["reason"]
    assert absent == "not installed: no package lightly-train in its environment"
    measured = [row for row in result["rows"] if "reason" not in row]
    assert [row["system"] for row in measured[4:]] == ["plain loop", "timm.task", "timm.task"]
    for row in measured:
        assert len(row["rounds"]) == 2 and all(r["images"] == 4 for r in row["rounds"])
        assert all(0 < r["data_s"] < r["wall_s"] and r["cpu_s"] > 0 for r in row["rounds"])
        for method, ratio in row["cpu_over_cached"].items():
            own = rows["ours, cached", method]["rounds"]
            pairs = zip(row["rounds"], own, strict=True)
            assert ratio == pytest.approx(
                statistics.median(a["cpu_s"] / b["cpu_s"] for a, b in pairs)
            )
    assert set(result["versions"]["timm.task"]) == {"timm", "torch"}
    text = (tmp_path / "out.md").read_text()
    assert table.table(result) in text and table.table(result) in capsys.readouterr().out
    assert f"| timm.task {result['versions']['timm.task']['timm']} | feature |" in text
    assert "--env torchdistill=PYTHON" in text and str(tmp_path) not in text


def test_writing_has_paid_when_the_saved_time_has_reached_its_cost():
    cached = {"system": "ours, cached", "method": "logits", "cpu_s_per_100_images": 10.0}
    result = {"rows": [cached], "writing": {"cpu_s_per_view": 0.3}}
    assert table.payback(result, {"cpu_s_per_100_images": 40.0}, "logits", 1) == pytest.approx(1)
    assert table.payback(result, {"cpu_s_per_100_images": 25.0}, "logits", 4) == pytest.approx(8)
    assert table.epochs(table.payback(result, cached, "logits", 1)) == "never"


def test_a_peer_that_dies_or_is_silent_gives_the_reason_and_the_others_go_on(tmp_path):
    def start(code, timeout=60):
        command = [sys.executable, "-I", "-c", code]
        return process.Worker(command, 1, tmp_path / "log", timeout)

    dying = start(DIES)
    assert dying.answer() == {}
    rows = [peers.peer_row(dying, "a", "KD", {}), peers.Row("b", "KD", lambda n: {"images": n})]
    peers.take_turns(rows, rounds=2, steps=3)
    dying.close()
    assert rows[0].reason == "ended with 1: out of memory" and rows[0].steps is None
    assert rows[1].rounds == [{"images": 3}] * 2
    refused = peers.peer_row(dying, "a", "KD", {"KD": "ValueError: no"})
    assert refused.steps is None and refused.reason == "ValueError: no"
    for code, reason in (("input()", "no answer in 0.1 s"), ("print(1, 2)", "answered '1 2")):
        slow = start(code, timeout=0.1 if "input" in code else 60)
        with pytest.raises(process.PeerError, match=reason):
            slow.answer()
        slow.close()


@pytest.mark.parametrize("text", ["torch-distill=python", "torchdistill=nowhere/python", "timm"])
def test_an_environment_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--env"):
        peers.environment(text)
    assert peers.environment(f"timm={sys.executable}") == ("timm", sys.executable)


def test_the_peers_script_imports_nothing_of_ours():
    source = house.modules()["benchmarks.peer_parts.worker"]
    assert not house.imports(source) and worker.SYSTEMS
