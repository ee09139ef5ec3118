"""Report JSON that an editor or a broken copy damaged: drawn, or refused in one line."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.report import adapters, history, machines, page
from tests import compared
from tests.test_report import Run, bench, run, summary  # noqa: F401 - the fixture

BUNDLE = {
    "schema": "cakd.bundle-bench/1",
    "bundle": {"name": "student", "manifest_sha256": "0" * 64},
    "model": "model-int8.onnx",
    "runtime": "onnxruntime 1.23.0",
    "precision": "int8",
    "threads": 1,
    "load_ms": 12.0,
    "build_s": None,
    "computes_in": "int8",
    "batch": 1,
    "first_ms": 3.0,
    "wall_ms": {"p50": 1.5, "p90": 1.9, "p99": None, "min": 1.2, "n": 140},
    "cpu_ms": {"p50": 1.5},
    "cpu_share": 0.99,
    "warm_up": {"seconds": 0.6, "stable": False},
    "flags": ["warm-up not stable"],
    "machine": {
        "board": "Example Board Nano",
        "system": "Linux",
        "arch": "aarch64",
        "cores": 4,
        "load_1m": 0.1,
        "python": "3.11.2",
        "numpy": "2.3.0",
    },
}
GONE = object()
WRONG = [GONE, None, True, -1, 0, 0.5, 3, 1e-320, 1e308, 10**400, float("inf"), float("nan")]
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
WRONG += [
    DEEP,
    "",
    "x",
    "a|b\n<i>",
    "9" * 3000,
    [],
    [1],
    [[]],
    [None] * 3,
    {},
    {"a": 1},
    {"x": {"y": []}},
]


@pytest.fixture
def documents(run: Run) -> dict[str, dict[str, Any]]:  # noqa: F811
    """A file of each kind that `--merge` takes, the summary with all that a page can show."""
    compared.with_pairs(run)
    edge = summary(run, {"top1_min": 0.8, "wall_ms_max": 1.0, "ort-fp32.size_mb_max": 9.0})
    edge["comparisons"] = [compared.comparison()]
    ((_, edge),) = compared.past(edge, 1)
    edge["targets"] = edge["targets"][1:3] + edge["targets"][-1:]
    edge["training"] = {"cakd": edge["training"]["cakd"]}
    against = json.loads(compared.against(run.folder, compared.comparison()).read_text())
    pairs = run.read("bench/ort-fp32.json")
    found = {"edge": edge, "bench": pairs, "skipped": bench("trt-fp16"), "against": against}
    return found | {"bundle": BUNDLE}


def damaged(document: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The document with a value at a random place, near the top as likely as deep inside, gone or another."""
    found = copy.deepcopy(document)
    parent: Any = found
    while True:
        key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        inside = parent[key]
        if not isinstance(inside, dict | list) or not inside or draw.random() < 0.2:
            break
        parent = inside
    wrong = draw.choice([*WRONG, [inside], {"in": inside}, str(inside)])
    if type(inside) in (int, float) and draw.random() < 0.5:
        wrong = type(inside)(inside * 10.0 ** draw.randint(-20, 20))
    if isinstance(inside, list) and draw.random() < 0.5:
        wrong = draw.choice([inside[:1], inside[::-1], inside * 2])
    if wrong is GONE:
        del parent[key]
    else:
        parent[key] = wrong
    return found


def shown(path: Path, earlier: Path) -> bool:
    """Whether a file is drawn in every form, with an earlier run beside it; False: one of them is refused."""
    try:
        read, past = machines.read_machine(path), history.read([earlier])
        page.markdown([read, read], past)
        page.page([read], earlier=past)
        for write in adapters.FORMATS.values():
            write(read)
    except UserError as error:
        assert str(error).startswith((str(path), str(earlier)))
        return False
    return True


@pytest.mark.parametrize(
    "edits",
    [
        2,
        pytest.param(20, marks=pytest.mark.ci),
        pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_any_report_file_is_shown_or_refused(
    edits: int, documents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    ends: Counter[bool] = Counter()
    for name, document in documents.items():
        draw = random.Random(f"{name} {edits}")
        path, whole = tmp_path / f"{name}.json", tmp_path / "earlier.json"
        whole.write_text(json.dumps(documents["edge"]))
        path.write_text(json.dumps(document))
        assert shown(path, whole)
        for _ in range(edits):
            path.write_text(json.dumps(damaged(document, draw)))
            ends[shown(path, whole)] += 1
            if name == "edge":
                shown(whole, path)
    assert min(ends[True], ends[False]) > edits / 4
