"""The architecture holds: who imports whom, the four names, the code behind each stage, what needs torch."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from tests import house
from tests.house import FLOORS, ROOT

STAGES = ("device", "prepare", "teach", "cache", "distill")
STAGES += ("evaluate", "export", "build", "bench", "report")
TORCH_FREE = (
    "pipeline.device",
    "pipeline.latency",
    "pipeline.report",
    "pipeline.data",
    *(f"stages.{s}" for s in ("device", "export", "build", "bench", "report")),
    *(m for m in house.modules() if m.startswith("exporters.")),
)
OWNERS = {  # the dataclass of each section, beside the code it configures
    "prepare": "pipeline.data",
    "teach": "pipeline.teacher",
    "cache": "pipeline.store",
    "distill": "pipeline.training",
    "evaluate": "pipeline.evaluate",
    "export": "exporters.ort",
    "build": "exporters.build",
    "bench": "exporters.bench",
    "report": "pipeline.report",
}
FOREACH = {"distill": "distill.methods", "build": "bench.enabled", "bench": "bench.enabled"}


def yaml(name):
    return YAML(typ="safe", pure=True).load(ROOT / name)


def dvc_stages():
    return {name: stage.get("do", stage) for name, stage in yaml("dvc.yaml")["stages"].items()}


def test_imports_run_downwards_only():
    for name, path in house.modules().items():
        floor = FLOORS.index(name.split(".")[0])
        for imported in house.imports(path):
            assert FLOORS.index(imported.split(".")[0]) <= floor, f"{name} imports {imported}"


def test_no_stage_imports_a_stage():
    for name, path in house.modules().items():
        if name.startswith("stages."):
            assert not {i for i in house.imports(path) if i.startswith("stages.")}, name


def test_modules_import_without_a_cycle():
    """Imports inside functions count too: a circle put off is still a circle."""
    graph = {n: house.imports(p) - {n} for n, p in house.modules().items()}
    for name in graph:  # a package's bare __init__ imports nothing of ours
        graph[name] -= {n for n in graph if house.modules()[n].name == "__init__.py"}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {n for n, needs in graph.items() if n not in done and needs <= done}
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done |= free


def test_stage_file_params_section_and_dataclass_have_one_name():
    assert set(dvc_stages()) == set(STAGES)
    assert {p.stem for p in (ROOT / "stages").glob("*.py")} - {"__init__"} == set(STAGES)
    params = yaml("params.yaml")
    assert set(params) == set(STAGES) - {"device"} == set(OWNERS)
    for section, module in OWNERS.items():
        owner = getattr(importlib.import_module(module), section.capitalize())
        assert set(params[section]) == {f.name for f in dataclasses.fields(owner)}, section
        assert module in house.closure(f"stages.{section}"), section


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_of_a_stage_are_its_import_closure(stage):
    listed = {d for d in dvc_stages()[stage]["deps"] if d.endswith((".py", ".md", ".html"))}
    assert listed == house.code_files(f"stages.{stage}")


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "device"])
def test_every_key_a_stage_reads_is_in_its_params(stage):
    listed = set(dvc_stages()[stage]["params"])
    own = {f"{stage}.{key}" for key in yaml("params.yaml")[stage]}
    foreign = {k for k in listed if not k.startswith((f"{stage}.", stage))}
    if stage not in listed:
        assert own - listed <= {FOREACH.get(stage)}
    assert foreign == foreign_keys(stage)


def foreign_keys(stage: str) -> set[str]:
    """Keys of other sections that the stage's source reads: by dotted name, or a section's attribute."""
    source = (ROOT / "stages" / f"{stage}.py").read_text()
    sections = "|".join(OWNERS)
    keys = set(re.findall(rf'"((?:{sections})\.[a-z_]+)"', source))
    for section in OWNERS:
        if section != stage:
            keys |= {
                f"{section}.{a}"
                for a in re.findall(rf"{section.capitalize()}, args\.params\)\.(\w+)", source)
            }
    params = yaml("params.yaml")
    return {
        k for k in keys if k.split(".")[0] != stage and k.split(".")[1] in params[k.split(".")[0]]
    }


def test_every_module_and_test_has_a_docstring():
    for path in [*house.modules().values(), *(ROOT / "tests").glob("*.py")]:
        if path.read_text():
            assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("package", ["pipeline", "stages", "exporters", "benchmarks"])
def test_our_packages_are_ours(package):
    assert importlib.import_module(package).__file__.startswith(str(ROOT))


def test_no_module_is_named_like_a_package_it_wraps():
    taken = {"onnx", "onnxruntime", "openvino", "tensorrt", "torch", "timm", "dvc"}
    assert not {m.split(".")[-1] for m in house.modules()} & taken


def test_edge_modules_import_with_torch_blocked():
    """One process imports them all: an edge box has numpy and its runtime, nothing more."""
    code = "import sys, importlib\nsys.modules['torch'] = None\n"
    code += "\n".join(f"importlib.import_module({m!r})" for m in TORCH_FREE)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_user_error_names_the_value_it_refuses():
    """Every `raise UserError(...)` and GateFailed interpolates something: the value that was got."""
    mute = []
    for name, path in house.modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            ours = getattr(node.exc.func, "id", "") in ("UserError", "GateFailed")
            if ours and all(isinstance(a, ast.Constant) for a in node.exc.args):
                mute.append(f"{name}:{node.lineno}: {ast.unparse(node.exc)}")
    assert not mute, "\n".join(mute)


def test_no_pickle_is_ever_loaded():
    for path in house.modules().values():
        source = path.read_text()
        assert not re.search(
            r"import pickle|torch\.load\(|allow_pickle=True|import dill|joblib", source
        ), path


def test_the_readmes_tree_is_the_real_tree_and_its_commands_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## The house")[1].split("```")[1]
    shown = {line.split()[0] for line in tree.splitlines() if line.strip()}
    folder = ROOT
    for line in filter(str.strip, tree.splitlines()):
        name = line.split()[0]
        folder = ROOT if not line.startswith(" ") else folder
        assert (folder / name).exists(), line
        folder = ROOT / name if not line.startswith(" ") and name.endswith("/") else folder
    assert {f"{p.name}/" for p in ROOT.iterdir() if (p / "__init__.py").exists()} <= shown
    modules = set(re.findall(r"python -m ([a-z.]+)[ `]", text)) - {"stages."}
    assert modules, "no command shown"
    for module in modules:
        assert module in house.modules(), module
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / link).exists(), link
