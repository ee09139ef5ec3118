"""Writes tests/trt_names.json: the public names of TensorRT's Python bindings, read from their wheels.

`pip download --no-deps tensorrt-cu12-bindings==11.4.0.106`, then `python -m tests.trt_names *.whl`.
The bindings link against libnvinfer, which the wheels do not hold: a library of the few functions they name, all
empty, lets them be imported and their classes listed. Needs gcc and nm, and the Python version of the wheels.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
CLASSES = (
    *("Builder", "BuilderFlag", "DataType", "EngineInspector", "HardwareCompatibilityLevel"),
    *("IBuilderConfig", "LayerInformationFormat", "ProfilingVerbosity"),
    *("ICudaEngine", "IExecutionContext", "ILogger", "INetworkDefinition", "IOptimizationProfile"),
    *("IRuntimeConfig", "ITimingCache", "MemoryPoolType", "NetworkDefinitionCreationFlag"),
    *("OnnxParser", "ParserError", "Runtime", "TensorIOMode"),
)
LIST = """
import json, sys, tensorrt_bindings as trt
names = lambda kind: [n for n in dir(kind) if n[0] != "_"]
print(json.dumps({c: names(getattr(trt, c)) for c in sys.argv[1:] if hasattr(trt, c)}))
"""


def listed(wheel: Path) -> dict[str, list[str]]:
    """Class -> its public names, from a wheel of bindings."""
    major = wheel.name.split("-")[1].split(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        zipfile.ZipFile(wheel).extractall(root)
        command = ["nm", "-D", "--undefined-only", root / "tensorrt_bindings" / "tensorrt.so"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = [line.split()[-1] for line in told.splitlines() if line.endswith("_INTERNAL")]
        names += ["getPluginRegistry", "getBuilderPluginRegistry", "getNvOnnxParserVersion"]
        names += ["initLibNvInferPlugins"]
        (root / "stub.c").write_text("".join(f"void* {n}(void) {{ return 0; }}\n" for n in names))
        (root / "empty.c").write_text("")
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            source = root / ("stub.c" if library == "nvinfer" else "empty.c")
            out = root / f"lib{library}.so.{major}"
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", out, source], check=True)
        where = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
        command = [sys.executable, "-c", LIST, *CLASSES]
        done = subprocess.run(command, env=where, capture_output=True, text=True, check=True)
        found: dict[str, list[str]] = json.loads(done.stdout)
        return found


def main() -> None:
    """Write the lists of all wheels named on the command line, with their SHA-256."""
    recorded = {
        path.name.split("-")[1]: {
            "wheel": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "names": {kind: " ".join(names) for kind, names in listed(path).items()},
        }
        for path in map(Path, sys.argv[1:])
    }
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
