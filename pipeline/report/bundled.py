"""`python -m bundle.run --bench --json` on a device -> a bench file like ours, for reports of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def bench(report: Mapping[str, Any]) -> dict[str, Any]:
    """The one row a bundle measured, its machine and provenance, with the keys of `exporters.bench --json`.

    What the runner on the device does not look at (size, memory) is None; single calls are not there.
    """
    runtime = report["runtime"].split()[0]
    short = {"onnxruntime": "ort", "openvino": "ov", "tensorrt": "trt"}[runtime]
    device = report["machine"]
    row = {
        "model": report["bundle"]["name"],
        "artefact": report["model"],
        "target": f"{short}-{report['precision']}",
        **{key: report[key] for key in ("runtime", "batch", "wall_ms", "cpu_ms")},
        **{key: report[key] for key in ("load_ms", "first_ms")},
        "threads": report["threads"] or 1,
        "status": "measured",
        "reason": None,
        "precision_requested": report["precision"],
        "precision_effective": report["computes_in"],
        "img_per_s": 1e3 * report["batch"] / report["wall_ms"]["p50"],
        **dict.fromkeys(("size_mb", "rss_mb", "params", "macs", "engine_ms")),
        "warm_up_seconds": report["warm_up"]["seconds"],
        "flags": ["NOISY", *report["flags"]] if report["flags"] else [],
    }
    return {
        "rows": [row],
        "machine": {
            "cpu": device["arch"],
            "board": device["board"],
            "cores": {"logical": device["cores"], "usable": device["cores"]},
            "os": device["system"],
            "arch": device["arch"],
            "gpu": None,
            "versions": {
                runtime: report["runtime"].split()[-1],
                **{key: device[key] for key in ("python", "numpy")},
            },
        },
        "provenance": {"bundle": report["bundle"]},
    }
