"""`python -m bundle.run --bench --json` on a device -> a bench file like ours, for reports of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def bench(found: Mapping[str, Any]) -> dict[str, Any]:
    """The one row a bundle measured, its machine and provenance, with the keys of `exporters.bench --json`.

    What the runner on the device does not look at (size, memory) is None; single calls are not there.
    """
    runtime = found["runtime"].split()[0]
    short = {"onnxruntime": "ort", "openvino": "ov", "tensorrt": "trt"}[runtime]
    device = found["machine"]
    row = {
        "model": found["bundle"]["name"],
        "artefact": found["model"],
        "target": f"{short}-{found['precision']}",
        **{key: found[key] for key in ("runtime", "batch", "wall_ms", "cpu_ms")},
        **{key: found[key] for key in ("load_ms", "first_ms")},
        "threads": found["threads"] or 1,
        "status": "measured",
        "reason": None,
        "precision_requested": found["precision"],
        "precision_effective": found["computes_in"],
        "img_per_s": 1e3 * found["batch"] / found["wall_ms"]["p50"],
        **dict.fromkeys(("size_mb", "rss_mb", "params", "macs", "engine_ms")),
        "warm_up_seconds": found["warm_up"]["seconds"],
        "flags": ["NOISY", *found["flags"]] if found["flags"] else [],
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
                runtime: found["runtime"].split()[-1],
                **{key: device[key] for key in ("python", "numpy")},
            },
        },
        "provenance": {"bundle": found["bundle"]},
    }
