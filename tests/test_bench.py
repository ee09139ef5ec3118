"""The bench end to end: real worker processes, most of them with a session made for the test, some with ORT."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.artifact import counts, onnx_file
from exporters.artifact.session import TARGETS
from exporters.bench import __main__ as bench_command
from exporters.bench import checks, compare, latency, measure, worker
from exporters.bench.measure import Subject
from exporters.bench.subjects import Bench, subjects_of
from exporters.device import timing
from exporters.ort.session import OrtSession
from pipeline.core import artifacts
from pipeline.core.config import parse
from pipeline.core.errors import GateFailed, UserError
from pipeline.report import raw
from tests import artefacts, command_line
from tests.test_shape import network

ROOT = Path(__file__).parents[1]
PLAYER = '''
"""A worker whose session does what the artefact's text says."""
import ctypes, functools, os, signal, sys, time
import numpy as np
import exporters.bench.worker
from exporters.artifact.session import Unavailable
from exporters.device import timing
from pipeline.core.errors import UserError

class Session:
    runtime = "player 1.0"
    precision_effective = "bf16"
    metadata = {}

    def __init__(self, target, artefact, threads):
        self.calls, self.threads = 0, threads
        self.play = artefact.read_text().split()
        self.input_shape = (3 if "batch3" in self.play else None, 3, 8, 8)
        print("a chatty library on stdout")
        os.system("echo and one below Python")
        if "unavailable" in self.play:
            raise Unavailable("no such device here")
        if "damaged" in self.play:
            raise UserError("not a model; export it again")
        if "segfault-on-load" in self.play:
            ctypes.string_at(0)

    def run(self, x):
        assert x.shape == (self.input_shape[0] or 1, 3, 8, 8) and x.dtype == np.float32 and x.any()
        assert x.flags["C_CONTIGUOUS"] and os.environ["OMP_NUM_THREADS"] == str(self.threads)
        self.calls += 1
        if "killed" in self.play and self.calls > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        if "segfault" in self.play and self.calls > 20:
            ctypes.string_at(0)
        if "raises" in self.play and self.calls > 20:
            raise RuntimeError("out of\\nmemory")
        if "exits" in self.play and self.calls > 20:
            sys.stderr.write("assertion failed in a library\\n")
            os._exit(7)
        if "hangs" in self.play and self.calls > 20:
            time.sleep(60)
        milliseconds = 4.0 if "slow" in self.play else 2.0
        end = time.thread_time() + milliseconds / 1e3
        while time.thread_time() < end:
            pass
        return x.mean(axis=(2, 3))

exporters.bench.worker.open_session = Session
timing.warm_up = functools.partial(timing.warm_up, limit=0.3)
exporters.bench.worker.main()
'''


@pytest.fixture
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers play the text of their artefact; a short warm-up, so that these tests are quick."""
    script = tmp_path / "player.py"
    script.write_text(PLAYER)
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.06)


def artefact(folder: Path, play: str, name: str = "model.onnx") -> Path:
    path = folder / f"{play or 'plain'}-{name}"
    path.write_text(play)
    return path


def subject(folder: Path, play: str, **changes: Any) -> Subject:
    return Subject(play, artefact(folder, play), TARGETS["ort-fp32"], **changes)


def rows_of(subjects: list[Subject], reference: Path | None = None) -> list[dict[str, Any]]:
    return [one.row for one in measure.measure_rows(subjects, 2, 0.05, 0, reference)]


def run_main(*argv: object) -> None:
    bench_command.main(bench_command.parser().parse_args([str(a) for a in argv]))


def test_a_row_carries_every_figure_of_the_contract(player: None, tmp_path: Path) -> None:
    (row,) = rows_of([subject(tmp_path, "")])
    assert (row["status"], row["reason"]) == ("measured", None)
    assert (row["precision_requested"], row["precision_effective"]) == ("fp32", "bf16")
    assert (row["runtime"], row["threads"], row["batch"]) == ("player 1.0", 1, 1)
    assert row["wall_ms"]["min"] >= 2 and row["wall_ms"]["n"] >= 2
    assert 2 <= row["cpu_ms"]["p50"] < 3
    assert row["load_ms"] > 0 and row["first_ms"] >= 2 and row["rss_mb"] > 10
    assert set(row["conditions"]) >= {"load_1m", "time", "governor"}
    json.dumps(row, allow_nan=False)


def test_rows_that_cannot_run_do_not_end_the_others(player: None, tmp_path: Path) -> None:
    plays = ["unavailable", "damaged", "segfault-on-load", "segfault", "killed", "raises", "exits"]
    rows = rows_of([subject(tmp_path, p) for p in plays] + [subject(tmp_path, "")])
    assert [r["status"] for r in rows] == ["skipped"] * 7 + ["measured"]
    assert [r["reason"] for r in rows[:7]] == [
        "no such device here",
        "not a model; export it again",
        "the worker was killed by SIGSEGV: and one below Python",
        "the worker was killed by SIGSEGV: and one below Python",
        "the worker was killed by SIGKILL: and one below Python",
        "RuntimeError: out of memory",
        "the worker was ended with exit 7: assertion failed in a library",
    ]
    for row in rows[:7]:
        assert set(row["wall_ms"].values()) == {None, 0} and row["wall_ms"]["n"] == 0
        assert row["rss_mb"] is None and row["flags"] == []
    assert set(rows[0]) == set(rows[7])  # one schema for both


def test_a_worker_that_hangs_is_killed_and_told_so(
    player: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "ANSWER_SECONDS", 4.0)
    began = time.monotonic()
    (row,) = rows_of([subject(tmp_path, "hangs")])
    assert row["reason"] == "no answer to 'warm_up' in 4 s"
    assert time.monotonic() - began < 20


def test_no_worker_outlives_the_bench(player: None, tmp_path: Path) -> None:
    with measure.warmed_runners([subject(tmp_path, "")] * 2, None) as runners:
        processes = [r.worker.process for r in runners if r.worker]
        assert [p.poll() for p in processes] == [None, None]
    assert [p.poll() for p in processes] == [0, 0]


def test_more_threads_than_cores_is_a_skipped_row(player: None, tmp_path: Path) -> None:
    (row,) = rows_of([subject(tmp_path, "", threads=4096)])
    assert row["status"] == "skipped" and row["reason"].startswith("threads: got 4096;")


def test_a_fixed_batch_is_fed_and_counted(player: None, tmp_path: Path) -> None:
    (row,) = rows_of([subject(tmp_path, "batch3")])
    assert row["batch"] == 3
    assert row["img_per_s"] == pytest.approx(3e3 / row["wall_ms"]["p50"], rel=1e-3)


def test_a_free_batch_is_as_large_as_asked_and_a_fixed_one_refuses(
    player: None, tmp_path: Path
) -> None:
    asked = [subject(tmp_path, play, batch=batch) for play, batch in (("batch3", 3), ("batch3", 5))]
    fed, refused = rows_of(asked)
    assert (fed["batch"], fed["status"]) == (3, "measured")
    assert refused["reason"] == "--batch: got 5; the artefact's batch is fixed at 3; leave it out"
    assert refused["batch"] == 5
    made = worker.input_batches(Shape(None), None, 8)
    assert {len(b) for b in made} == {8} and len({b.tobytes() for b in made}) == len(made) >= 4


class Shape:
    """As much of a session as the choice of its pictures needs."""

    metadata: dict[str, str] = {}
    runtime = precision_effective = ""

    def __init__(self, batch: int | None) -> None:
        self.input_shape = (batch, 3, 8, 8)

    def run(self, x: np.ndarray) -> np.ndarray:
        return x


@pytest.mark.parametrize(("batch", "count"), [(None, 2), (1, 5), (4, 3), (4, 9)])
def test_the_reference_pictures_are_run_each_in_turn(
    tmp_path: Path, batch: int | None, count: int
) -> None:
    x = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 8, 8), np.float32)
    np.savez(tmp_path / "reference.npz", x=x)
    made = worker.input_batches(Shape(batch), tmp_path / "reference.npz")
    assert len(made) >= 4
    seen = np.concatenate(made)[:, 0, 0, 0]
    assert all(len(b) == (batch or 1) for b in made)
    assert list(seen) == [i % count for i in range(len(seen))]


def test_pictures_without_a_reference_are_smooth_different_and_seeded() -> None:
    made, again = worker.input_batches(Shape(None), None), worker.input_batches(Shape(None), None)
    assert len({b.tobytes() for b in made}) == len(made) == worker.IMAGES
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))


def test_a_reference_of_another_size_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", x=np.ones((4, 3, 9, 9), np.float32))
    with pytest.raises(UserError, match=r"\(4, 3, 9, 9\).*\(N, 3, 8, 8\)"):
        worker.input_batches(Shape(None), tmp_path / "reference.npz")


def test_an_object_array_in_a_reference_is_refused_unread(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", x=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="not an .npz with an array 'x'"):
        worker.read_reference(tmp_path / "reference.npz")


def test_a_file_twice_as_slow_fails_the_verdict_with_exit_3_after_writing(
    player: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, plain, out = artefact(tmp_path, "slow"), artefact(tmp_path, ""), tmp_path / "o.json"
    with pytest.raises(GateFailed, match="regression: FAIL"):
        run_main(slow, "--against", plain, "--json", out)
    written = json.loads(out.read_text())
    (told,) = written["comparisons"]
    assert written["verdict"] == told["verdict"] == "FAIL"
    assert told["ratio"]["ci_low"] > 1.5 and told["ratio"]["median"] == pytest.approx(2, rel=0.15)
    assert [r["artefact"] for r in written["rows"]] == [slow.name, plain.name]
    assert told["processes"] == 3 and told["rounds"] == 8 and told["reason"] is None
    assert {g["name"]: g["verdict"] for g in told["gates"]} == {
        **dict.fromkeys(checks.CHECKS, "UNKNOWN"),  # a text file tells little
        "precision": "PASS",
        "bytes": "PASS",
    }
    assert "FAIL: CPU p50" in capsys.readouterr().out


def test_every_target_gets_its_verdict_and_the_worst_is_that_of_the_command(
    player: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PROCESSES", 1)
    base, head, out = tmp_path / "base", tmp_path / "head", tmp_path / "o.json"
    for folder, plays in ((base, ("", "", "segfault-on-load")), (head, ("", "segfault", ""))):
        folder.mkdir()
        for name, play in zip(("a.onnx", "b.onnx", "c.onnx"), plays, strict=True):
            (folder / name).write_text(play)
    models = [head / name for name in ("a.onnx", "b.onnx", "c.onnx")]
    with pytest.raises(GateFailed, match="candidate b.onnx: the worker was killed by SIGSEGV"):
        run_main(*models, "--against", base, "--json", out)
    written = json.loads(out.read_text())
    told = {c["model"]: c for c in written["comparisons"]}
    assert told["a.onnx"]["verdict"] in ("PASS", "INCONCLUSIVE") and told["a.onnx"]["ratio"]
    assert told["b.onnx"]["verdict"] == written["verdict"] == "FAIL"
    assert told["c.onnx"]["verdict"] == "INCONCLUSIVE"
    assert told["c.onnx"]["reason"].startswith("baseline c.onnx: the worker was killed by SIGSEGV")
    assert [told[n]["ratio"] for n in ("b.onnx", "c.onnx")] == [None, None]
    assert [r["status"] for r in written["rows"]] == [
        *("measured", "measured"),
        *("skipped", "measured"),
        *("measured", "skipped"),
    ]


def test_a_gate_fails_the_verdict_whatever_the_time_unless_it_is_allowed(
    player: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "PROCESSES", 1)
    plain = artefact(tmp_path, "")
    fat = tmp_path / "fat.onnx"
    fat.write_text(" " * 2 * checks.METADATA_BYTES)
    with pytest.raises(GateFailed, match="bytes: 8192, baseline 0, limit 4096"):
        run_main(fat, "--against", plain)
    run_main(fat, "--against", plain, "--allow", "bytes")
    assert "bytes: 8192, baseline 0, limit 4096 (allowed); CPU p50" in capsys.readouterr().out


def test_an_undecided_verdict_runs_as_long_again_once(
    player: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def undecided(a: list[list[float]], b: list[list[float]], seed: int) -> latency.Ratio:
        seen.append((np.shape(a), np.shape(b)))
        return latency.Ratio(1.0, 0.9, 1.2, 0.1)

    monkeypatch.setattr(latency, "cpu_ratio", undecided)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.01)
    monkeypatch.setattr(compare, "PROCESSES", 1)
    same = subject(tmp_path, "")
    told, found = compare.compare_artefacts(same, same, 0, None)
    assert (told["verdict"], told["rounds"]) == ("INCONCLUSIVE", 16)
    assert seen == [((1, 8), (1, 8)), ((1, 16), (1, 16))]
    assert found[0].row["wall_ms"]["n"] >= 16


def test_the_self_test_passes_a_file_against_itself(
    player: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "PROCESSES", 1)
    run_main(artefact(tmp_path, ""), "--self-test")
    shown = capsys.readouterr().out
    assert ": CPU p50" in shown and "FAIL" not in shown
    assert "noise floor of this machine now: changes of CPU time below " in shown.splitlines()[-1]


def test_batches_of_two_sizes_are_not_compared(
    player: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PROCESSES", 1)
    free, fixed = artefact(tmp_path, ""), artefact(tmp_path, "batch3")
    with pytest.raises(UserError, match="batch: got 1 for .*, 3 for .*; pass --batch 3"):
        run_main(free, "--against", fixed)


def test_a_comparison_names_both_files_and_its_own_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def compared(candidate: Subject, baseline: Subject, *_: Any) -> Any:
        seen.extend(tuple(OrtSession(one.artefact, 1).input_shape) for one in (candidate, baseline))
        return {"verdict": "PASS", "ratio": {}}, []

    monkeypatch.setattr(compare, "compare_artefacts", compared)
    monkeypatch.setattr(bench_command, "verdict_line", lambda _: "PASS")
    monkeypatch.setattr(bench_command, "raise_failures", lambda *_: None)
    files = [tmp_path / name / "net.onnx" for name in ("head", "again", "old")]
    for path in files:
        path.parent.mkdir()
        network(path, 3)
    head, again, old = files
    onnx_file.write_onnx(onnx_file.add_metadata(onnx_file.read_onnx(head), role="old"), old)
    out = tmp_path / "v.json"
    run_main(head, again, "--against", old.parent, "--shape", "2,3,16,8", "--json", out)
    assert seen == [(2, 3, 16, 8)] * 4
    provenance = json.loads(out.read_text())["provenance"]
    assert provenance["inputs"] == {
        "net.onnx": artifacts.sha256(head),
        "net.onnx (2)": artifacts.sha256(again),
        "baseline/net.onnx": artifacts.sha256(old),
    }
    assert provenance["params"] == {"seed": 0}


def test_a_comparison_with_what_cannot_run_is_refused(
    player: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PROCESSES", 1)
    plain, gone = artefact(tmp_path, ""), artefact(tmp_path, "unavailable")
    with pytest.raises(UserError, match="no comparison: baseline .*: no such device here"):
        run_main(plain, "--against", gone)


def test_a_table_and_a_json_hold_every_model_and_thread_count(
    player: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, gone, out = artefact(tmp_path, ""), artefact(tmp_path, "unavailable"), tmp_path / "o.json"
    run_main(a, gone, "--rounds", 2, "--seconds", 0.05, "--threads", "1,4096", "--json", out)
    written = json.loads(out.read_text())
    assert list(written)[:3] == ["schema", "target", "rows"]
    assert written["schema"] == "cakd.bench/2" and written["machine"]["cores"]
    assert set(written["provenance"]["inputs"]) == {a.name, gone.name}
    assert [(r["model"], r["threads"], r["status"]) for r in written["rows"]] == [
        (a.name, 1, "measured"),
        (a.name, 4096, "skipped"),
        (gone.name, 1, "skipped"),
        (gone.name, 4096, "skipped"),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["model", "target", "threads", "batch", "precision"]
    assert len(lines) == 5 and lines[3].endswith("skipped: no such device here")


def test_samples_hold_every_call_with_its_block_and_process(player: None, tmp_path: Path) -> None:
    a, gone, out = artefact(tmp_path, ""), artefact(tmp_path, "unavailable"), tmp_path / "o.npz"
    run_main(a, gone, "--rounds", 3, "--seconds", 0.1, "--samples", out, "--json", tmp_path / "o")
    (row, _) = json.loads((tmp_path / "o").read_text())["rows"]
    with np.load(out, allow_pickle=False) as held:
        found = {key: held[key] for key in held}
    assert len(found["0.wall_ms"]) == len(found["0.cpu_ms"]) == row["wall_ms"]["n"]
    assert np.median(found["0.wall_ms"]) == pytest.approx(row["wall_ms"]["p50"], rel=1e-3)
    assert len(found["0.block_start"]) == len(found["0.block_process"]) == 3
    assert found["0.block_start"][0] == 0 and (np.diff(found["0.block_start"]) > 0).all()
    assert not found["1.wall_ms"].size and not found["0.engine_ms"].size


def test_the_calls_stand_beside_the_json_and_the_report_reads_them(
    player: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, gone = artefact(tmp_path, ""), artefact(tmp_path, "unavailable")
    run_main(gone, student, "--rounds", 3, "--seconds", 0.1, "--json", tmp_path / "o.json")
    written = json.loads((tmp_path / "o.json").read_text())
    assert [set(r) & {"samples_ms", "p50"} for r in written["rows"]] == [set(), set()]
    skipped, row = raw.with_samples(written, tmp_path / "o.json")["rows"]
    assert "samples_ms" not in skipped
    assert row["samples_ms"][0] == pytest.approx(row["wall_ms"]["min"], rel=1e-3)
    with pytest.raises(SystemExit):
        run_main(student, "--json", tmp_path / "o.npz")
    assert ".npz is the suffix of the samples" in capsys.readouterr().err


def test_the_same_calls_make_the_same_bytes(tmp_path: Path) -> None:
    block = latency.Block([0.1, 0.2, 0.3], [0.1, 0.1, 0.2])
    found = [measure.Measurement({}, [[block, block]], counts.ModelCounts())]
    for name in ("a", "b"):
        measure.save_samples(tmp_path / name, found)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:  # no clock in it
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_nothing_measured_is_the_users_to_know(player: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row could be measured: no such device here"):
        run_main(artefact(tmp_path, "unavailable"))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("m.onnx", "ort-fp32"),
        ("m-int8.onnx", "ort-int8"),
        ("m.xml", "ov-fp32"),
        ("m-int8.xml", "ov-int8"),
        ("m.safetensors", "torch-eager"),
    ],
)
def test_a_file_alone_goes_to_the_target_of_its_kind(
    tmp_path: Path, name: str, target: str
) -> None:
    (tmp_path / name).touch()
    (found,) = subjects_of([tmp_path / name], None, [1])
    assert found.target.name == target


def test_every_model_meets_every_target_that_reads_it(tmp_path: Path) -> None:
    models = [tmp_path / "m.onnx", tmp_path / "m.xml"]
    for model in models:
        model.touch()
    found = subjects_of(models, ["ort-fp32", "ov-fp32"], [1, 2])
    assert [(s.model, s.target.name, s.threads) for s in found] == [
        ("m.onnx", "ort-fp32", 1),
        ("m.onnx", "ort-fp32", 2),
        ("m.xml", "ov-fp32", 1),
        ("m.xml", "ov-fp32", 2),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gone.onnx"], "gone.onnx: no such file"),
        (["m.onnx", "--targets", "ort-fp23"], "did you mean 'ort-fp32'"),
        (
            ["m.onnx", "--targets", "torch-eager"],
            "got targets torch-eager; none reads it; pass --targets",
        ),
        (["m.plan"], "got suffix '.plan' and no target; pass --targets, of rtx-fp32"),
        (["m.pth"], "no target reads this suffix"),
        (["m.onnx", "--against", "folder"], "folder/m.onnx: no such file"),
        (["m.onnx", "--against", "gone.onnx"], "gone.onnx: no such file"),
        (["m.plan", "--targets", "trt-fp16", "--self-test"], "trt-fp16: runs on a GPU"),
        (["m.onnx", "--reference", "m.onnx"], "not an .npz with an array 'x'"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.setattr(worker, "COMMAND", ("false",))
    (tmp_path / "folder").mkdir()
    for name in ("m.onnx", "m.plan", "m.pth"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run_main(*argv)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enabled": ["ort-fp23"]}, "did you mean 'ort-fp32'"),
        ({"threads": [0]}, r"bench.threads\[0\]: got 0; expected 1 or more"),
        ({"batches": [1, 0]}, r"bench.batches\[1\]: got 0; expected 1 or more"),
        ({"batches": []}, r"bench.batches: got \[\]; expected a list of 1 or more"),
        ({"rounds": 0}, "bench.rounds: got 0; expected 1 or more"),
        ({"seconds_per_row": 0.0}, "bench.seconds_per_row: got 0.0; expected above 0"),
    ],
)
def test_params_that_make_no_sense_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(Bench, {"enabled": [], **values}, "bench")


def test_size_counts_the_weights_beside_the_file(tmp_path: Path) -> None:
    for name in ("a.xml", "a.bin", "b.onnx", "b.onnx.data", "c.onnx", "c.bin"):
        (tmp_path / name).write_bytes(bytes(1_000_000))
    names = ("a.xml", "b.onnx", "c.onnx", "d.onnx")
    sizes = [2_000_000, 2_000_000, 1_000_000, None]
    assert [counts.size_bytes(tmp_path / n) for n in names] == sizes


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real ONNX file: convolution, global average, ten logits, free batch."""
    onnx = pytest.importorskip("onnx")
    helper, generator = onnx.helper, np.random.default_rng(0)
    weight = {
        "kernel": generator.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "head": generator.standard_normal((16, 10)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "kernel"], ["map"]),
            helper.make_node("GlobalAveragePool", ["map"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("MatMul", ["flat", "head"], ["logits"]),
        ],
        "net",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 10])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weight.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path_factory.mktemp("net") / "student.onnx"
    onnx.save(model, path)
    return path


def run_python(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


NO_TORCH = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "


def test_the_command_line_measures_a_real_model_without_torch(net: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    code = NO_TORCH + "runpy.run_module('exporters.bench', run_name='__main__')"
    out = tmp_path / "o.json"
    done = run_python(
        "-c", code, "bench", net, "--targets", "ort-fp32", "--seconds", 0.2, "--json", out
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "measured" and row["runtime"].startswith("onnxruntime ")
    assert row["precision_effective"] == "fp32" and 0 < row["wall_ms"]["p50"] < 50
    assert "student.onnx  ort-fp32" in done.stdout and done.stderr == ""


def test_the_command_line_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    done = run_python("-m", "exporters.bench", tmp_path / "gone.onnx")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "gone.onnx: no such file" in done.stderr


@pytest.fixture
def exported(net: Path, tmp_path: Path) -> Path:
    """export/ with reference.npz, build/ with a student that runs and a teacher that was not built."""
    for folder in ("export", "build"):
        (tmp_path / folder).mkdir()
    x = np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "export/reference.npz", x=x)
    (tmp_path / "build/student.onnx").write_bytes(net.read_bytes())
    models = {
        "student": artefacts.built("student.onnx", None),
        "teacher": artefacts.built(None, "too large for this box"),
    }
    head = {"schema": "cakd.build/1", "target": "ort-fp32", **artefacts.head()}
    build = {**head, "models": models}
    (tmp_path / "build/build.json").write_text(json.dumps(build))
    (tmp_path / "params.yaml").write_text(
        "bench:\n  enabled: [ort-fp32]\n  threads: [1]\n  rounds: 3\n  seconds_per_row: 0.1\n"
    )
    return tmp_path


def run_stage(
    folder: Path, target: str = "ort-fp32", real: bool = False
) -> subprocess.CompletedProcess[str]:
    paths = [folder / name for name in ("export", "build", "bench.json")]
    params = folder / "params.yaml"
    run = command_line.process if real else command_line.here
    return run("stages.bench", *paths, "--target", target, "--params", params)


def test_stage_writes_student_and_teacher_the_skipped_one_with_its_reason(exported: Path) -> None:
    pytest.importorskip("onnxruntime")
    done = run_stage(exported, real=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((exported / "bench.json").read_text())
    assert (written["schema"], written["target"]) == ("cakd.bench/2", "ort-fp32")
    assert written["pairs"] == []  # nothing to pair a student with
    student, teacher = written["rows"]
    assert (student["model"], student["status"], student["batch"]) == ("student", "measured", 1)
    assert student["size_mb"] > 0 and student["wall_ms"]["n"] >= 3
    assert (teacher["status"], teacher["reason"]) == ("skipped", "too large for this box")
    assert teacher["precision_requested"] == "fp32" and teacher["wall_ms"]["p50"] is None
    assert set(written["provenance"]["inputs"]) == {"build", "reference"}
    assert written["p50_ms"] == {"student_1t": student["wall_ms"]["p50"]}
    assert "teacher too large for this box" in done.stdout


def test_stage_pairs_student_and_teacher_at_the_fewest_threads_batch_by_batch(
    exported: Path,
) -> None:
    pytest.importorskip("onnxruntime")
    built = json.loads((exported / "build/build.json").read_text())
    built["models"]["teacher"] = built["models"]["student"]
    (exported / "build/build.json").write_text(json.dumps(built))
    with (exported / "params.yaml").open("a") as params:
        params.write("  batches: [1, 4]\n")
    assert run_stage(exported).returncode == 0
    written = json.loads((exported / "bench.json").read_text())
    assert [(p["batch"], p["clock"], p["threads"]) for p in written["pairs"]] == [
        (1, "cpu", 1),
        (4, "cpu", 1),
    ]
    for pair in written["pairs"]:
        assert (pair["candidate"], pair["baseline"]) == ("student", "teacher")
        ratio = pair["ratio"]  # of a network to itself
        assert 0.5 < ratio["ci_low"] <= ratio["median"] <= ratio["ci_high"] < 2
    assert set(written["p50_ms"]) == {"student_1t", "student_1t_b4", "teacher_1t", "teacher_1t_b4"}
    assert {(r["params"], r["macs"]) for r in written["rows"]} == {(592, 388960)}


def test_pairs_of_a_gpu_are_of_the_engines_own_time() -> None:
    def made(model: str, ms: float) -> measure.Measurement:
        blocks = [latency.Block([9.0], [9.0], [ms * drift]) for drift in (1.0, 1.5, 2.0)]
        row = {"model": model, "batch": 1, "threads": 1, "target": "trt-fp16", "status": "measured"}
        return measure.Measurement(
            {**row, "engine_ms": {"p50": ms}}, [blocks], counts.ModelCounts()
        )

    (pair,) = compare.student_over_teacher([made("student", 1.0), made("teacher", 4.0)], 0)
    assert pair["clock"] == "engine" and pair["ratio"]["median"] == 0.25


def test_stage_tells_when_what_was_built_is_gone(exported: Path) -> None:
    pytest.importorskip("onnxruntime")
    (exported / "build/student.onnx").unlink()
    assert run_stage(exported).returncode == 0
    student = json.loads((exported / "bench.json").read_text())["rows"][0]
    assert student["status"] == "skipped" and "student.onnx: no such file" in student["reason"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "build/build.json").unlink(), "build.json: no such file"),
        (lambda p: (p / "export/reference.npz").write_bytes(b""), "reference.npz: not an .npz"),
        (lambda p: (p / "params.yaml").write_text("bench: {enable: []}"), "unknown key 'enable'"),
        (
            lambda p: (p / "params.yaml").write_text("bench: {enabled: [ort]}"),
            "bench.enabled: got 'ort'",
        ),
    ],
)
def test_stage_tells_a_mistake_in_one_line_and_writes_nothing(
    exported: Path, spoil: Any, message: str
) -> None:
    spoil(exported)
    done = run_stage(exported)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (exported / "bench.json").exists()


def test_the_bench_and_its_stage_import_without_torch_or_any_runtime() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'onnx', 'onnxruntime', 'openvino'): sys.modules[name] = None\n"
        "import exporters.bench, exporters.bench.measure, exporters.bench.worker, stages.bench, stages.device"
    )
    assert run_python("-c", code).stderr == ""
