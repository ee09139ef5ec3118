"""Checks of the latency measurements: `python -m benchmarks.latency [peers] [gate] [whole]`. A table and its JSON.

peers: medians of our blocks and of OpenVINO's benchmark_app, taken in turns. gate: verdicts of `exporters.bench
--against` on a network beside itself and beside slower ones, every core loaded by other processes (`--loaded`).
whole: seconds of one command over four targets. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks import record
from benchmarks.exporters import checkpoint
from exporters.artifact import inputs, precision
from exporters.artifact.counts import count_model
from exporters.artifact.session import TARGETS
from exporters.bench import latency
from exporters.bench.conditions import conditions
from exporters.bench.measure import Subject, warmed_runners
from exporters.device import timing
from exporters.device.ov import shared_core
from exporters.ort import export, int8
from exporters.ov import convert
from pipeline.core import artifacts, cli
from pipeline.core.errors import UserError, nearest

SCHEMA = "cakd.benchmark.latency/1"
PEERS = ("mobilenetv3_small_100", "resnet18", "repvgg_a0")
TOOLS = ("ours", "input set before", "benchmark_app")
BENCHMARK_APP = Path(sys.executable).with_name("benchmark_app")
OPTIONS = "-hint none -nstreams 1 -nthreads 1 -api sync -infer_precision f32 -ip f32"
GATE = ("resnet18", 128)  # about 9 ms on one thread: above the 5 ms from which 5 % are tolerated
SLOWER = {  # name -> kernel of a convolution added behind the first pooling, 64 channels
    "itself": None,
    "about 15 % slower": (5, 6),
    "about 3 % slower": (2, 3),
}
BURN = "import numpy as np\nx = np.ones((512, 512))\nwhile True: x @ x"


def network(name: str, size: int, folder: Path) -> Path:
    """Export a network of random weights to ONNX with a dynamic batch."""
    source, out = folder / f"{name}.safetensors", folder / f"{name}.onnx"
    checkpoint(name, {}, size, source)
    export.export(source, out)
    return out


def slower(source: Path, out: Path, kernel: tuple[int, int]) -> Path:
    """Write `source` with one more convolution, close to the identity, behind its first pooling."""
    model = onnx.load(source)
    nodes = model.graph.node
    index = next(i for i, node in enumerate(nodes) if node.op_type == "MaxPool")
    value = nodes[index].output[0]
    reader = next(node for node in nodes if value in node.input and node.op_type == "Conv")
    weights = {w.name: w for w in model.graph.initializer}
    channels = weights[reader.input[1]].dims[1]
    weight = 1e-3 * np.random.default_rng(0).standard_normal((channels, channels, *kernel))
    weight[range(channels), range(channels), (kernel[0] - 1) // 2, (kernel[1] - 1) // 2] += 1
    for node in nodes:
        node.input[:] = [f"{name}.more" if name == value else name for name in node.input]
    pads = [(k - 1) // 2 for k in kernel] + [k // 2 for k in kernel]
    added = helper.make_node("Conv", [value, "more"], [f"{value}.more"], "more", pads=pads)
    nodes.insert(index + 1, added)
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "more"))
    onnx.save(model, out)
    return out


def fixed(source: Path) -> Path:
    """Convert an ONNX file to IR with a batch of 1: with a dynamic batch OpenVINO is up to a fifth slower."""
    model = onnx.load(source)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, source)
    convert.write_ir(source, source.with_suffix(".xml"))
    return source.with_suffix(".xml")


def peers(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median wall ms of every network, in turns: our blocks, ours with a preset input, benchmark_app.

    benchmark_app sets its input once; our call copies an image in and the logits out.
    Raises UserError: benchmark_app is not installed, or fails.
    """
    if not BENCHMARK_APP.is_file():
        raise UserError(f"{BENCHMARK_APP}: no such file; run `pip install openvino`")
    irs = {name: fixed(network(name, 224, folder)) for name in PEERS}
    calls = {name: call_on_a_set_input(ir) for name, ir in irs.items()}
    pictures = timing.cycle_inputs([np.zeros(1, np.float32)] * timing.MIN_INPUTS)
    subjects = [Subject(name, ir, TARGETS["ov-fp32"]) for name, ir in irs.items()]
    turns: dict[str, dict[str, list[float]]] = {n: {tool: [] for tool in TOOLS} for n in PEERS}
    with warmed_runners(subjects, None) as runners:
        for _ in range(args.turns):
            for runner in runners:
                name = runner.subject.model
                ours = runner.ask("block", seconds=args.seconds)
                bare = timing.run_block(calls[name], pictures, args.seconds)
                theirs = benchmark_app(irs[name], args.seconds, folder)
                medians = (statistics.median(ours["wall_ms"]), statistics.median(bare.wall_ms))
                for tool, ms in zip(TOOLS, (*medians, theirs), strict=True):
                    turns[name][tool].append(ms)
    return {name: _peer(times) for name, times in turns.items()}


def call_on_a_set_input(ir: Path) -> Callable[[Any], object]:
    """One inference of the same compiled network without a copy in or out."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = shared_core(openvino).compile_model(ir, "CPU", options).create_infer_request()
    return lambda _: request.infer(share_outputs=True)


def _peer(turns: dict[str, list[float]]) -> dict[str, Any]:
    medians = {tool: statistics.median(ms) for tool, ms in turns.items()}
    theirs = medians["benchmark_app"]
    ratios = {tool: medians[tool] / theirs for tool in TOOLS[:2]}
    paired = {tool: _median_ratio(turns[tool], turns["benchmark_app"]) for tool in TOOLS[:2]}
    return {"ms": medians, "over_benchmark_app": ratios, "paired": paired, "turns_ms": turns}


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def benchmark_app(ir: Path, seconds: float, folder: Path) -> float:
    """Median latency in ms that benchmark_app reports. Raises UserError: it fails."""
    command = [str(BENCHMARK_APP), "-m", str(ir), *OPTIONS.split(), "-t", str(round(seconds))]
    command += ["-shape", "[1,3,224,224]", "-report_type", "no_counters", "-json_stats"]
    command += ["-report_folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{command[0]}: got exit code {done.returncode}: {done.stdout[-200:]}")
    report = json.loads((folder / "benchmark_report.json").read_text(encoding="utf-8"))
    return float(report["execution_results"]["latency (ms)"])


@contextmanager
def load(busy: bool) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run one busy process for each core where `busy`, else none."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    count = os.cpu_count() or 1 if busy else 0
    burning = [
        subprocess.Popen([sys.executable, "-c", BURN], env=environment) for _ in range(count)
    ]
    try:
        yield burning
    finally:
        for process in burning:
            process.kill()
            process.wait()


def gate(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Verdicts on CPU time by name of the candidate; each is one command, in turns, its seed the run's number."""
    source = network(*GATE, folder)
    candidates = {
        name: slower(source, folder / f"{kernel[0]}x{kernel[1]}.onnx", kernel) if kernel else source
        for name, kernel in SLOWER.items()
    }
    rows: dict[str, Any] = {
        name: {"macs_ratio": _macs(path) / _macs(source), "runs": []}
        for name, path in candidates.items()
    }
    with load(args.loaded):
        for run in range(args.runs):
            for name, path in candidates.items():
                if name == "itself" or run < args.runs // 2:
                    rows[name]["runs"].append(against([path], source, run, folder))
    for name, path in candidates.items():
        rows[name]["quiet_ratio"] = quiet_ratio(path, source, args.seconds)
        rows[name]["verdicts"] = dict(Counter(r["on_time"] for r in rows[name]["runs"]))
    return rows


def _macs(path: Path) -> int:
    macs = count_model(path).macs
    assert macs is not None
    return macs


def quiet_ratio(candidate: Path, baseline: Path, seconds: float) -> float:
    """Ratio of the fastest calls by CPU time, of a long run in turns: without the load of other processes."""
    target = TARGETS["ort-fp32"]
    with warmed_runners(
        [Subject("", path, target) for path in (candidate, baseline)] * 3, None
    ) as runners:
        for order in timing.schedule(len(runners), 10):
            for i in order:
                runners[i].block(seconds / 10)
    lowest = [np.percentile(latency.Block.join(r.blocks).cpu_ms, 5) for r in runners]
    return float(np.median(lowest[0::2]) / np.median(lowest[1::2]))


def against(models: Sequence[Path], baseline: Path, seed: int, folder: Path) -> dict[str, Any]:
    """Run `exporters.bench --against` once: exit code, seconds, ratios and the verdict on time.

    The gates that one more layer breaks are allowed. Raises UserError: it wrote no file.
    """
    out = folder / "against.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "exporters.bench", *map(str, models), "--seed", str(seed)]
    command += ["--against", str(baseline), "--json", str(out)]
    command += ["--allow", "nodes", "params", "macs", "bytes", "parity"]
    before, began = conditions()["load_1m"], time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if not out.is_file():
        raise UserError(f"{command[2]}: got exit code {done.returncode}: {done.stderr[-300:]}")
    report = json.loads(out.read_text(encoding="utf-8"))
    return {
        "exit": done.returncode,
        "on_time": report["verdict"],
        "seconds": round(seconds, 1),
        "load_1m": before,
        "comparisons": [
            {k: c[k] for k in ("target", "verdict", "ratio", "rounds", "process_spread")}
            for c in report["comparisons"]
        ],
    }


def whole(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the gate of a CI job: one command, four targets, every file against its own baseline."""
    del args
    name, size = GATE
    source = network(name, size, folder)
    x = inputs.smooth(64, size, size, seed=9)
    pictures = int8.CalibrationImages(x[::2], x[1::2], np.full(32, -1))
    how = int8.Settings(search_s=0.0)
    export.convert_onnx(source, precision.precision_path(source, "int8"), "int8", pictures, how)
    ir = source.with_suffix(".xml")
    convert.convert_to_ir(source, ir, "fp32", None, how)
    convert.convert_to_ir(source, precision.precision_path(ir, "int8"), "int8", pictures, how)
    models = [
        path for made in (source, ir) for path in (made, precision.precision_path(made, "int8"))
    ]
    baseline = folder / "baseline"
    baseline.mkdir()
    for path in (*models, *(m.with_suffix(".bin") for m in models if m.suffix == ".xml")):
        (baseline / path.name).write_bytes(path.read_bytes())
    return against(models, baseline, 0, folder)


PARTS = {"peers": peers, "gate": gate, "whole": whole}


def table(result: dict[str, Any]) -> str:
    """The measured parts as Markdown."""
    writers = {"peers": _peers_table, "gate": _gate_table, "whole": _whole_lines}
    return "\n\n".join(writers[part](result[part]) for part in writers if part in result)


def _peers_table(rows: dict[str, Any]) -> str:
    lines = [
        "OpenVINO f32, 224 px, a fixed batch of 1, 1 thread, wall time, median of the turns' medians over that of",
        f"`benchmark_app {OPTIONS}`, which sets its input once.",
        "In brackets the median of the turns' own ratios.",
        "",
        "| network | our row: a picture copied in, logits out | the same blocks on an input set before | turns |",
        "|---|--:|--:|--:|",
    ]
    for name, row in rows.items():
        ours, bare = (
            f"{row['over_benchmark_app'][tool]:.3f} ({row['paired'][tool]:.3f})"
            for tool in TOOLS[:2]
        )
        lines.append(f"| {name} | {ours} | {bare} | {len(row['turns_ms'][TOOLS[0]])} |")
    return "\n".join(lines)


def _gate_table(rows: dict[str, Any]) -> str:
    lines = [
        f"{GATE[0]}, {GATE[1]} px, ort-fp32, against itself without the added layer. Verdicts on CPU time.",
        "",
        "| candidate | MACs | quiet time | runs | FAIL | PASS | INCONCLUSIVE | median ratio | seconds a run |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        runs, verdicts = row["runs"], row["verdicts"]
        counts = " | ".join(str(verdicts.get(v, 0)) for v in ("FAIL", "PASS", "INCONCLUSIVE"))
        ratio = statistics.median(r["comparisons"][0]["ratio"]["median"] for r in runs)
        seconds = statistics.median(r["seconds"] for r in runs)
        lines.append(
            f"| {name} | {row['macs_ratio']:.3f} | {row['quiet_ratio']:.3f} | {len(runs)} | {counts} "
            f"| {ratio:.3f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def _whole_lines(row: dict[str, Any]) -> str:
    verdicts = [
        f"{c['target']} {c['verdict']} after {c['rounds']} rounds" for c in row["comparisons"]
    ]
    return f"Four targets in one command: {row['seconds']:.0f} s ({', '.join(verdicts)})."


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`; parts of an earlier run stay in them."""
    for part in args.parts:
        if part not in PARTS:
            raise UserError(f"parts: got {part!r}; {nearest(part, PARTS)}")
    result: dict[str, Any] = {}
    if args.out and args.out.with_suffix(".json").is_file():
        earlier = artifacts.read_json(args.out.with_suffix(".json"), SCHEMA)
        result = {part: earlier[part] for part in PARTS if part in earlier}
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            result[part] = PARTS[part](args, Path(folder))
    text = table(result)
    print(text)
    if args.out is None:
        return
    params = {k: v for k, v in vars(args).items() if k not in ("out", "parts")}
    options = f"--runs {args.runs} --turns {args.turns} --seconds {args.seconds:g}"
    command = f"python -m benchmarks.latency {options}{' --loaded' if args.loaded else ''}"
    record.write(args.out, SCHEMA, result, artifacts.provenance(params), command, text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmarks.latency", description=__doc__)
    made.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    made.add_argument("--loaded", action="store_true", help="gate: keep every core busy")
    made.add_argument("--runs", type=int, default=20, help="of the network beside itself")
    made.add_argument("--turns", type=int, default=9, help="of ours and theirs")
    made.add_argument("--seconds", type=float, default=2.0, help="a turn")
    made.add_argument("--out", type=Path, help="where to write, without suffix")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
