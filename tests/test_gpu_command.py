"""benchmarks.gpu: its dry run, how parts end, what they leave, and what the kernel and step benchmarks gained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from benchmarks import gpu, kernels, training
from benchmarks.gpu_parts import cifar, kernel_tests, part, processes
from pipeline.core.errors import GateFailed, UserError
from pipeline.data import views
from pipeline.distill import batches, feed, settings
from tests.conftest import ROOT

BARE = ("dvc", "openvino", "nncf", "hypothesis", "psutil", "xdist", "pytest_timeout", "matplotlib")


def run(*argv, **environment):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_device_it_says_so_and_exits_2(tmp_path):
    done = run("--out", tmp_path / "out")
    assert done.returncode == 2 and "CUDA: got no device" in done.stderr and "--dry" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.ci
def test_a_dry_run_goes_through_every_part_without_what_a_bare_machine_lacks(tmp_path):
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in BARE)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocked}\n")
    out = tmp_path / "out"
    done = run("--dry", "--out", out, "--work", tmp_path / "work", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == gpu.SCHEMA and {"machine", "provenance"} <= set(summary)
    ended = {name: found["status"] for name, found in summary["parts"].items()}
    engine = ended.pop("engine")
    assert set(ended.values()) == {"done"} and engine in ("done", "skipped"), done.stdout
    for name in ended:
        for result in gpu.PARTS[name].results:
            path = out / f"{result}.json"
            if result != "steps-224px":
                assert {"schema", "machine", "provenance"} <= set(json.loads(path.read_text()))
    tests = json.loads((out / "tests.json").read_text())
    assert tests["counts"]["passed"] == tests["counts"]["failed"] == 0 < tests["counts"]["skipped"]
    steps = json.loads((out / "steps-32px.json").read_text())
    assert (
        set(steps["methods"])
        == set(steps["resident"])
        == {*("plain", "logits", "cakd", "cakd+logits")}
    )
    models = json.loads((out / "cifar.json").read_text())["models"]
    assert set(models) == {"teacher", *steps["methods"]}
    shown = done.stdout[done.stdout.index("Dry run") :]
    assert "the figures mean nothing" in shown and "| tests | all | 0 passed" in shown
    assert "\n\n" + shown.split("\n\n", 1)[1].rstrip() in (out / "summary.md").read_text()


STUBS = {
    "good": "(out / 'good.json').write_text(json.dumps({'rows': [['speed', '3 | 4 img/s']]}))",
    "bad": "print('first line'); sys.exit('ValueError: what went wrong')",
    "slow": "(out / 'slow.json').write_text(json.dumps({'rows': [['half', 'done']]}))\n"
    "child = subprocess.Popen(['sleep', '100'])\n"
    "(out / 'child').write_text(str(child.pid))\ntime.sleep(100)",
}


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Parts that succeed, fail and take too long; and the arguments of a run of them."""
    for name, body in STUBS.items():
        head = "import json, subprocess, sys, time\nfrom pathlib import Path\nout = Path(sys.argv[1])\n"
        (tmp_path / f"stub_{name}.py").write_text(f"{head}{body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    weights = {"slow": 2, "bad": 10, "good": 10}

    def rows(result):
        return [tuple(row) for row in result["rows"]]

    parts = {
        name: part.Part(f"stub_{name}", weight, [name], rows) for name, weight in weights.items()
    }
    parts["absent"] = part.Part("stub_absent", 5, [], rows, lambda _: "not installed: that")
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(processes, "GRACE", 0.5)
    line = f"--dry --minutes 0.75 --out {tmp_path}/out --work {tmp_path}/work"
    args = gpu.parser().parse_args(line.split())
    args.parts = list(parts)
    return args


def test_a_part_that_fails_or_overruns_is_recorded_and_the_next_one_runs(stubs, capsys):
    start = time.monotonic()
    with pytest.raises(GateFailed, match="failed: bad"):
        gpu.main(stubs)
    assert time.monotonic() - start < 30
    summary = json.loads((stubs.out / "summary.json").read_text())["parts"]
    ended = {name: found["status"] for name, found in summary.items()}
    assert ended == {"slow": "killed", "bad": "failed", "good": "done", "absent": "skipped"}
    assert summary["slow"]["rows"] == [["half", "done"]] and "limit" in summary["slow"]["reason"]
    assert summary["bad"]["reason"] == "exit 1: ValueError: what went wrong"
    shown = capsys.readouterr().out
    assert "| good | speed | 3 / 4 img/s |" in shown and "not installed: that" in shown
    child = int((stubs.out / "child").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until whoever adopted it has reaped it
            os.kill(child, 0)
            time.sleep(0.1)


def test_results_of_an_earlier_run_are_not_taken_for_this_ones(stubs):
    stubs.parts = ["bad"]
    stubs.out.mkdir()
    (stubs.out / "bad.json").write_text('{"rows": [["old", "figure"]]}')
    with pytest.raises(GateFailed):
        gpu.main(stubs)
    assert json.loads((stubs.out / "summary.json").read_text())["parts"]["bad"]["rows"] == []


def test_data_that_is_not_there_stops_the_run_before_it_begins(stubs):
    stubs.data = "/no/such/cifar100"
    with pytest.raises(UserError, match="--data: /no/such/cifar100: no such folder"):
        gpu.main(stubs)


def test_time_is_shared_by_weight_among_the_parts_still_to_come():
    left = ["tests", "kernels"]
    assert gpu.limit_of("tests", left, 70) == pytest.approx(40)
    assert gpu.limit_of("kernels", ["kernels"], 30) == 30
    assert gpu.limit_of("kernels", ["kernels"], -3) == 0


TESTS = """
import pytest
pytestmark = getattr(pytest.mark, "gpu")
@pytest.mark.parametrize("n", [1, 2])
def test_good(n): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_left_out(): pytest.skip("too large")
"""


def test_the_gpu_tests_are_counted_by_function_and_a_failure_fails_the_part(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(f"# {kernel_tests.MARK}\n{TESTS}")
    (folder / "test_other.py").write_text(f"import no_such_package  # {kernel_tests.MARK}\n")
    (folder / "test_cpu.py").write_text("raise RuntimeError('not a test for a GPU')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    module = gpu.PARTS["tests"].module
    line = [sys.executable, "-m", module, "out", "--work", "work", "--seconds", "50", "--dry"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (
        done.returncode == 3 and "1 of 4 failed; first tests/test_some.py::test_bad" in done.stderr
    )
    result = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert result["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert result["by_test"]["test_good"]["passed"] == 2 and result["skips"] == {"too large": 1}
    assert "no_such_package" in result["not_collected"]["tests/test_other.py"]


def test_a_call_slower_than_the_time_it_was_given_is_timed_again_with_more():
    asked = []

    def bench(_, warmup=25, rep=100, return_mode=""):
        asked.append(rep)
        return [300.0] * max(1, int(rep / 300))  # as triton.testing.do_bench

    values = kernels.timed(lambda: None, bench)
    assert len(values) >= kernels.MIN_CALLS and asked == [100, 3000]
    assert kernels.spread([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert kernels.spread(values)["median"] == 300


def test_whatever_a_provider_raises_is_a_row_with_its_reason():
    class OutOfResources(Exception):  # as Triton's, which is no RuntimeError
        pass

    def fail():
        raise OutOfResources("out of resource: shared memory\nreduce the block size")

    work = kernels.Work("work")
    work.add("small", fail)
    assert work.refused == {"small": "out of resource: shared memory"}


@pytest.mark.parametrize(
    ("ms", "graph", "gigabytes", "teraflops", "bound", "shares"),
    [
        (1.5, 0.2, 0.3, 0.05, "host", (20 / 3, 50)),
        (0.22, 0.2, 0.3, 0.05, "bytes", (100 / 2.2, 50)),
        (0.55, 0.5, 0.3, 0.2, "products", (400 / 11, 40)),
        (0.45, None, 0.3, 0.2, "products", (400 / 9, 50)),
    ],
)
def test_a_row_says_whether_host_bytes_or_products_bound_it(
    ms, graph, gigabytes, teraflops, bound, shares
):
    row = {"ms": {"median": ms}, "device_ms": 0.4, **({"graph_ms": graph} if graph else {})}
    if bound == "bytes":
        row["device_ms"] = 0.1  # with the cache warm: not what the graph took
    work = kernels.Work("work", flops=teraflops * 1e12, bytes=gigabytes * 1e9)
    found = kernels.bounds(row, work, {"copy_gb_per_s": 3000, "tflop_per_s": 1000})
    assert found["bound"] == bound
    assert (found["bytes_ms"], found["products_ms"]) == pytest.approx((0.1, teraflops))
    assert (found["roofline_percent"], found["device_roofline_percent"]) == pytest.approx(shares)


class Device:
    """torch.cuda as far as a captured call needs it, without a device; `graph` fails where asked."""

    def __init__(self, fails=False):
        self.fails, self.replays = fails, 0
        self.CUDAGraph = self.Stream = self.current_stream = lambda: self
        self.stream = lambda _: nullcontext()

    def graph(self, _):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return nullcontext()

    def replay(self):
        self.replays += 1

    def wait_stream(self, _):
        pass

    def synchronize(self):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_gpu_a_call_is_also_replayed_as_a_graph_or_the_row_says_why_not(fails, monkeypatch):
    pytest.importorskip("triton")
    device, calls = Device(fails), []

    def bench(call, **_):
        call()
        return [0.3] * kernels.MIN_CALLS

    monkeypatch.setattr(kernels.torch, "cuda", device)
    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr(kernels, "_peak_mb", lambda _: 5.0)
    monkeypatch.setattr(kernels, "profiled", lambda _: {"launches": 2, "device_ms": 0.2})
    work = kernels.Work("work", flops=1e9, bytes=1e8)
    work.add("ours", lambda: calls.append("ours"))
    work.add("compiled", lambda: calls.append("compiled"), captured=False)
    ceilings = {"copy_gb_per_s": 3000.0, "tflop_per_s": 1000.0}
    rows = kernels.measure(work, torch.device("cuda"), ceilings)
    assert "graph_ms" not in rows["compiled"] and rows["compiled"]["bound"] == "host"
    assert calls.count("ours") == (3 if fails else 4) and device.replays == (not fails)
    if fails:
        assert rows["ours"]["graph_reason"] == "operation not permitted when stream is capturing"
    else:
        assert rows["ours"]["graph_ms"] == 0.3 and rows["ours"]["bound"] == "bytes"
    result = {"ceilings": ceilings, "work": {"work": rows}}
    (line,) = (one for one in kernels.table(result).splitlines() if "| ours |" in one)
    assert line.count("|") == kernels.table(result).splitlines()[0].count("|")


def test_the_shapes_can_be_cut_to_some_numbers_of_tokens():
    assert {shape.n for shape in kernels.selected_shapes(True, [64, 196], None)} == {64, 196}
    assert len(kernels.selected_shapes(False, [], 2)) == 2
    with pytest.raises(UserError, match="--tokens: got 65; allowed: 49, 64, 144, 196, 256, 576"):
        kernels.selected_shapes(True, [65], None)


def test_resident_batches_repeat_and_are_what_the_feed_says_it_has_chosen(prepared):
    config = settings.Distill(methods=("plain",), student="test_resnet", steps=4, batch=8)
    made = feed.Views(batches.Batches(config, prepared, False, 1, views.Geometry(), 3))
    resident = training.ResidentViews(made, torch.device("cpu"))
    for step in (0, 5, 2 * training.RESIDENT):
        (batch,), (chosen,) = resident[step], resident.indices(step)
        (expected,) = made[step % training.RESIDENT]
        assert torch.equal(batch.views, expected.views)
        assert (batch.indices.rows == chosen.rows).all()
        assert (chosen.view_numbers == expected.indices.view_numbers).all()


def test_epochs_are_what_fits_and_one_at_least():
    assert cifar.fitting(100, 7, 200) == 14
    assert cifar.fitting(3, 7, 200) == 1 and cifar.fitting(1e6, 7, 200) == 200


def test_the_source_of_the_images_is_told_by_what_lies_there(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train-00000-of-00001.parquet").touch()
    (tmp_path / "folders" / "train").mkdir(parents=True)
    assert cifar.source_of(str(tmp_path / "hub")) == "parquet"
    assert cifar.source_of(str(tmp_path / "hub" / "train-*.parquet")) == "parquet"
    assert cifar.source_of(str(tmp_path / "folders")) == "imagefolder"
    assert cifar.source_of(str(tmp_path / "cifar-100-python.tar.gz")) == "cifar"


def test_a_subset_leaves_the_other_splits_as_they_are(prepared):
    few = cifar.subset(prepared, 30)
    assert list(few.rows("train")) == list(prepared.rows("train")[:30])
    assert list(few.rows("test")) == list(prepared.rows("test"))
