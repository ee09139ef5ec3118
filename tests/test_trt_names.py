"""Every name of TensorRT that our code uses exists in each version it says it takes: lists from the wheels."""

from __future__ import annotations

import ast
import importlib.util
import json

import pytest

from tests.house import ROOT
from tests.trt_names import FILE

HELD = {  # the names our code gives to TensorRT's objects
    "builder": "Builder",
    "parser": "OnnxParser",
    "e": "ParserError",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "config": "IBuilderConfig",
    "inspector": "EngineInspector",
    "own": "IRuntimeConfig",
}
MODULES = ("trt/plan", "trt/build", "trt/session", "device/builder", "device/engine", "device/trt")
RTX_ONLY = {  # where `per_shape` is and `captured` is not
    "CudaGraphStrategy",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "IRuntimeConfig.cuda_graph_strategy",
}
RECORDED = json.loads(FILE.read_text())


def used() -> set[str]:
    """`Class.name` of every TensorRT name in the exporters that talk to it."""
    found = set()
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / "exporters" / f"{module}.py").read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            words = ast.unparse(node).split(".")
            start = next((i for i, w in enumerate(words) if w in ("trt", "_trt")), None)
            if start is not None and words[start + 1 :]:
                found.add(".".join(words[start + 1 :][:3]))
            elif words[-2] in HELD and module != "trt/plan":
                found.add(f"{HELD[words[-2]]}.{words[-1]}")
    return {name for name in found if "__" not in name}


def missing(names: set[str], classes: dict[str, set[str]]) -> set[str]:
    return {
        name
        for name in names
        if (kind := name.split(".")[0]) not in classes
        or (len(parts := name.split(".")) > 1 and parts[1] not in classes[kind])
    }


def test_the_names_that_are_looked_for_are_the_ones_in_use() -> None:
    names = used()
    assert len(names) > 45
    assert {
        "BuilderFlag.TF32",
        "OnnxParser.num_errors",
        "IBuilderConfig.set_timing_cache",
        "IExecutionContext.execute_async_v3",
        "Runtime.engine_host_code_allowed",
        "ICudaEngine.get_tensor_dtype",
        "EngineInspector.execution_context",
    } <= names


@pytest.mark.parametrize("version", RECORDED)
def test_full_tensorrt_has_every_name(version: str) -> None:
    classes = {kind: set(names.split()) for kind, names in RECORDED[version]["names"].items()}
    assert not missing(used() - RTX_ONLY, classes)


def test_the_lists_can_tell_a_name_that_a_version_dropped() -> None:
    """Of the names TensorRT 11 removed, 10.12 has some and 11 none."""
    removed = {"BuilderFlag.FP16", "OnnxParser.supports_model", "ICudaEngine.device_memory_size"}
    old, new = (
        {kind: set(names.split()) for kind, names in RECORDED[version]["names"].items()}
        for version in ("10.12.0.36", "11.4.0.106")
    )
    assert not missing(removed, old) and missing(removed, new) == removed


def test_the_installed_tensorrt_rtx_has_every_name() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("the trt-rtx extra is not installed")
    import tensorrt_rtx

    classes = {kind: set(dir(getattr(tensorrt_rtx, kind))) for kind in dir(tensorrt_rtx)}
    assert not missing(used(), classes)
