"""The report: what it reads, what it judges, what it shows. Every figure below is made up for these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MACHINE = {
    "cpu": "Example CPU 7",
    "isa": ["avx2", "avx512_vnni"],
    "cores": {"logical": 4, "usable": 2},
    "memory_gb": 8.2,
    "os": "Linux",
    "arch": "x86_64",
    "board": None,
    "gpu": None,
    "versions": {"python": "3.11.2", "onnxruntime": "1.32.0", "openvino": "2026.4.1"},
}
HEAD = {"machine": MACHINE, "provenance": {"params": None, "inputs": {}, "versions": {}}}
TARGETS = {  # name -> (precision asked for, precision effective, student ms, teacher ms)
    "torch-eager": ("fp32", "fp32", 3.1, 9.8),
    "ort-fp32": ("fp32", "fp32", 0.62, 4.1),
    "ort-int8": ("int8", "int8", 0.31, 2.6),
    "ov-fp32": ("fp32", "fp32", 0.58, 3.9),
    "ov-default": ("default", "bf16", 0.41, 2.2),
    "ov-int8": ("int8", "fp32", 0.59, 3.8),
}
ENABLED = [*TARGETS, "trt-fp16"]
TOP1 = {"teacher": 0.9725, "plain": 0.81, "logits": 0.8625, "cakd": 0.885, "cakd+logits": 0.9025}


def score(top1: float) -> dict[str, float]:
    return {"top1": top1, "top5": 0.99, "nll": 1.4 * (1 - top1) + 0.1, "ece": 0.04, "n": 400}


def accuracy() -> dict[str, Any]:
    models: dict[str, Any] = {}
    for seed, (name, top1) in enumerate(TOP1.items()):
        student = name != "teacher"
        models[name] = {
            "clean": score(top1),
            "noisy": score(top1 - 0.12),
            "params": 1_520_906 if student else 5_526_346,
            "macs": 56_500_000 if student else 1_080_000_000,
            "seed": seed,
            "labels_seen": 50 if student else 1297,
            "labels_total": 1297,
        }
    return {"schema": "cakd.accuracy/1", "shipped": "cakd", "classes": 10, "models": models, **HEAD}


def train_perf() -> dict[str, Any]:
    terms = {
        "plain": ["cross_entropy"],
        "logits": ["cross_entropy", "kl"],
        "cakd": ["cross_entropy", "attention", "tokens", "adversarial"],
        "cakd+logits": ["cross_entropy", "kl", "attention", "tokens", "adversarial"],
    }
    generator = np.random.default_rng(0)
    methods = {}
    for i, (m, names) in enumerate(terms.items()):
        steps = np.arange(0, 600, 6)
        curves = {
            t: [
                [int(s), float((0.2 + len(t) * 0.2 * np.exp(-s / (110 + 50 * i))) * (1 + 0.04 * e))]
                for s, e in zip(steps, generator.standard_normal(len(steps)))
            ]
            for t in names
        }
        methods[m] = {
            "img_per_s": {"median": 410.0, "iqr": 12.0},
            "stage_ms": {"read": 0.4, "view": 1.2, "student": 40.0, "optimizer": 3.0},
            "stall_fraction": 0.02,
            "peak_mb": 812.0,
            "steps": 600,
            "batch": 64,
            "curves": curves,
        }
    return {"schema": "cakd.train_perf/1", "methods": methods, **HEAD}


def bench_row(model: str, threads: int, asked: str, got: str, ms: float) -> dict[str, Any]:
    samples = ms * (1 + 0.05 * np.random.default_rng(int(ms * 1000)).exponential(size=400))
    quantiles = dict(zip(("p50", "p90"), np.quantile(samples, (0.5, 0.9)).tolist()))
    return {
        "model": model,
        "threads": threads,
        "batch": 1,
        "status": "measured",
        "reason": None,
        "precision_requested": asked,
        "precision_effective": got,
        "wall_ms": {**quantiles, "p99": None, "min": float(samples.min()), "n": 400},
        "cpu_ms": {"p50": ms},
        "load_ms": 12.0,
        "first_ms": 3.0,
        "size_mb": 1.6 if got == "int8" else 6.1,
        "rss_mb": 120.0,
        "flags": [],
        "samples_ms": samples.tolist(),
    }


def skipped_row(model: str, reason: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("wall_ms", "cpu_ms", "size_mb", "precision_effective"))
    row = {"model": model, "threads": 1, "batch": 1, "status": "skipped", "reason": reason}
    return {**row, "precision_requested": "fp16", **nothing, "flags": []}


def bench(target: str) -> dict[str, Any]:
    if target == "trt-fp16":
        rows = [skipped_row(m, "no module named tensorrt") for m in ("student", "teacher")]
    else:
        asked, got, student, teacher = TARGETS[target]
        rows = [
            bench_row(m, threads, asked, got, ms / threads**0.5)
            for threads in (1, 2)
            for m, ms in (("student", student), ("teacher", teacher))
        ]
    return {"schema": "cakd.bench/1", "target": target, "rows": rows, **HEAD}


def build(target: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if target == "trt-fp16":
        skipped = {"status": "skipped", "reason": "no module named tensorrt"}
        models: dict[str, Any] = dict.fromkeys(("student", "teacher"), skipped)
        rows: list[Any] = []
    else:
        asked, got, *_ = TARGETS[target]
        reason = None if asked in (got, "default") else "int8 lost 2.1 points, allowed 1.0"
        built = {"status": "built", "reason": reason, "precision_requested": asked}
        models = {m: {**built, "precision_effective": got} for m in ("student", "teacher")}
        rows = [
            {
                "artifact": f"{m}.onnx",
                "runtime": "onnxruntime 1.32.0",
                "precision_effective": got,
                "max_abs": 1e-7,
                "rel_between_std": 2e-8,
                "sqnr_centered_db": 120.0 if got == "fp32" else 31.0,
                "top1_agreement": 1.0,
                "verdict": "PASS",
            }
            for m in models
        ]
    head = {"target": target, **HEAD}
    return (
        {"schema": "cakd.build/1", "models": models, **head},
        {"schema": "cakd.parity/1", "rows": rows, **head},
    )


class Run:
    """The files of one made-up run in a folder, to be changed and reported on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("accuracy.json", accuracy())
        self.write("train_perf.json", train_perf())
        self.write("device.json", {"schema": "cakd.device/1", **HEAD})
        for target in ENABLED:
            self.write(f"bench/{target}.json", bench(target))
            for name, value in zip(("build", "parity"), build(target)):
                self.write(f"build/{target}/{name}.json", value)
        self.params({})

    def write(self, name: str, value: dict[str, Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    def read(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.folder / name).read_text())
        return value

    def params(self, budgets: dict[str, float]) -> None:
        self.write("params.yaml", {"report": {"title": "Digits at the edge", "budgets": budgets}})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)
