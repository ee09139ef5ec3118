"""The architecture holds: who imports whom, the four names, the code behind each stage, what needs torch."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import PurePosixPath

import pytest
from ruamel.yaml import YAML

from pipeline.core import config
from tests import house
from tests.house import FLOORS, ROOT

STAGES = ("device", "check", "prepare", "teach", "cache", "distill")
STAGES += ("students", "evaluate", "select", "quantize", "export", "build", "bench", "report")
WITHOUT_SECTION = {"device", "check", "students", "select"}  # they read no section of their own
TORCH_FREE = (
    "pipeline.core.machine",
    "exporters.bench.latency",
    "pipeline.report.summary",
    "pipeline.data.prepared",
    "pipeline.prepare.prepare",
    *(f"stages.{s}" for s in ("device", "export", "build", "bench", "report")),
    *(m for m in house.modules() if m.startswith("exporters.")),
)
OWNERS = {  # the dataclass of each section, beside the code it configures
    "prepare": "pipeline.prepare.prepare",
    "teach": "pipeline.teach",
    "cache": "pipeline.store.policy",
    "distill": "pipeline.distill.settings",
    "quantize": "pipeline.quantize.settings",
    "evaluate": "pipeline.evaluate.accuracy",
    "export": "exporters.ort.export",
    "build": "exporters.build",
    "bench": "exporters.bench.subjects",
    "report": "pipeline.report.summary",
}
# Each room of pipeline/ may import those on the lines above its own; rooms of one line do not know each other.
STOREYS = (
    ("core",),
    ("data",),
    ("models", "training", "prepare", "report"),
    ("store", "teach.py"),
    ("distill",),
    ("evaluate", "quantize"),
    ("project",),
)
UNFINISHED = {
    "teach": "pipeline.teach",
    "cache": "pipeline.store.writing",
    "distill": "pipeline.distill.distill",
    "quantize": "pipeline.quantize.fine_tune",
}
FOREACH = {
    "distill": {"distill.methods", "distill.students"},
    "build": {"bench.enabled"},
    "bench": {"bench.enabled"},
}


def yaml(name):
    return YAML(typ="safe", pure=True).load(ROOT / name)


def dvc_stages():
    """By the name of the stage's file: `family` is stages.distill for further students."""
    stages = {name: stage.get("do", stage) for name, stage in yaml("dvc.yaml")["stages"].items()}
    assert stages.pop("family")["deps"] == stages["distill"]["deps"]
    return stages


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
    bare = {n for n, p in house.modules().items() if p.name == "__init__.py"}
    for name in graph:  # a package's bare __init__ imports nothing of ours
        graph[name] -= bare
    done: set[str] = set()
    while len(done) < len(graph):
        free = {n for n, needs in graph.items() if n not in done and needs <= done}
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done |= free


def test_stage_file_params_section_and_dataclass_have_one_name():
    assert set(dvc_stages()) == set(STAGES)
    files = {p.stem for p in (ROOT / "stages").glob("*.py")}
    assert files - {"__init__"} == set(STAGES)
    params = yaml("params.yaml")
    assert set(params) == set(STAGES) - WITHOUT_SECTION == set(OWNERS) == set(config.SECTIONS)
    for section, module in OWNERS.items():
        owner = getattr(importlib.import_module(module), section.capitalize())
        assert set(params[section]) == {f.name for f in dataclasses.fields(owner)}, section
        assert module in house.closure(f"stages.{section}"), section


def code_deps(stage):
    """The rooms and files of ours that dvc.yaml lists for a stage; data and artefacts are not code."""
    floors = tuple(f"{floor}/" for floor in FLOORS)
    return {d for d in dvc_stages()[stage].get("deps", []) if d.startswith(floors) or d in FLOORS}


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "check"])
def test_code_dependencies_of_a_stage_are_the_rooms_its_imports_reach(stage):
    assert code_deps(stage) == house.rooms(f"stages.{stage}")


@pytest.mark.parametrize("stage", UNFINISHED)
def test_unfinished_work_is_marked_by_the_code_of_its_stage_and_no_other(stage):
    listed = {d.removeprefix("pipeline/") for d in code_deps(stage) if d.startswith("pipeline/")}
    assert set(importlib.import_module(UNFINISHED[stage]).ROOMS) == listed


def test_rooms_import_downwards_only():
    storey = {room: i for i, line in enumerate(STOREYS) for room in line}
    for name, path in house.modules().items():
        if not name.startswith("pipeline."):
            continue
        own = house.room(name).removeprefix("pipeline/")
        for imported in house.imports(path):
            other = house.room(imported).removeprefix("pipeline/")
            if imported.startswith("pipeline.") and other != own:
                assert storey[other] < storey[own], f"{name} imports {imported}"


def test_a_room_holds_nothing_that_a_run_rewrites():
    """Only sources and templates: a file that a command writes there would make its stages run again."""
    tracked = subprocess.run(
        ["git", "ls-files", "pipeline", "exporters", "stages"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    kinds = {PurePosixPath(line).suffix for line in tracked.stdout.splitlines()}
    assert kinds <= {".py", ".md", ".html"}, kinds


def test_the_house_keeps_its_size():
    """At most 13 entries a floor, 400 lines a file, 80 lines a function."""
    for floor in ("pipeline", "exporters"):
        entries = {p.name for p in (ROOT / floor).iterdir()} - {"__pycache__"}
        assert len(entries) <= 13, (floor, sorted(entries))
    for name, path in house.modules().items():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{name}.{node.name}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_path_on_a_stages_command_line_is_something_dvc_watches(stage):
    block = dvc_stages()[stage]
    named = [
        *block.get("deps", []),
        *block.get("outs", []),
        *block.get("metrics", []),
        *block.get("plots", []),
    ]
    watched = {next(iter(n)) if isinstance(n, dict) else n for n in named}
    words = re.sub(r"\$\{[a-z.]+\}", "*", block["cmd"]).split()
    watched = {re.sub(r"\$\{[a-z.]+\}", "*", w) for w in watched}
    for path in (w for w in words if "/" in w):
        assert watched & {path, *(str(p) for p in PurePosixPath(path).parents)}, path


def test_every_section_is_checked_before_a_run():
    """By stage check, which watches every section, and which all that costs time waits for."""
    check = dvc_stages()["check"]
    assert set(check["params"]) == set(OWNERS)
    assert set(check["outs"][0]) <= set(dvc_stages()["prepare"]["deps"])
    source = (ROOT / "stages" / "check.py").read_text()
    for section in OWNERS:
        assert re.search(rf"\b{section.capitalize()}\b", source), section


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in ("device", "check")])
def test_every_key_a_stage_reads_is_in_its_params(stage):
    listed = set(dvc_stages()[stage]["params"])
    own = {f"{stage}.{key}" for key in yaml("params.yaml").get(stage, {})}
    foreign = {k for k in listed if not k.startswith((f"{stage}.", stage))}
    if stage not in {*listed, *WITHOUT_SECTION}:
        assert own - listed <= FOREACH.get(stage, set())
    assert foreign == foreign_keys(stage)


def foreign_keys(stage: str) -> set[str]:
    """What the stage's source reads of other sections: keys by dotted name or attribute, or a section whole."""
    source = (ROOT / "stages" / f"{stage}.py").read_text()
    sections = "|".join(OWNERS)
    keys = set(re.findall(rf'"((?:{sections})\.[a-z_]+)"', source))
    whole = {s for s in OWNERS if re.search(rf"{s.capitalize()}, args\.params\)(?!\.)", source)}
    for section in OWNERS:
        if section != stage:
            keys |= {
                f"{section}.{a}"
                for a in re.findall(rf"{section.capitalize()}, args\.params\)\.(\w+)", source)
            }
    params = yaml("params.yaml")
    return whole - {stage} | {
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
    """Every `raise` of ours interpolates something, and so does every check of a parameter: the value got."""
    mute = []
    for name, path in house.modules().items():
        tree = ast.parse(path.read_text())
        checks = [n for n in ast.walk(tree) if "validator(" in decorators(n)]
        of_checks = [r for check in checks for r in raised(check, "ValueError")]
        for call in [*raised(tree, *OURS), *of_checks]:
            if all(isinstance(a, ast.Constant) for a in call.args):
                mute.append(f"{name}:{call.lineno}: {ast.unparse(call)}")
    assert not mute, "\n".join(mute)


def test_a_public_function_that_refuses_something_says_what_in_its_docstring():
    silent = []
    for name, path in house.modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_" and node.name != "main":
                told = re.search("[Rr]aise", ast.get_docstring(node) or "")
                if raised(node, *OURS) and not told:
                    silent.append(f"{name}.{node.name}")
    assert not silent, silent


def decorators(node: ast.AST) -> str:
    """The source of a function's decorators."""
    return " ".join(map(ast.unparse, getattr(node, "decorator_list", ())))


OURS = ("UserError", "GateFailed", "BrokenImage")


def raised(tree: ast.AST, *names: str) -> list[ast.Call]:
    """The calls behind `raise X(...)` of these exceptions."""
    calls = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise)]
    return [c for c in calls if isinstance(c, ast.Call) and getattr(c.func, "id", "") in names]


def test_no_pickle_is_ever_loaded():
    """But for the archives of CIFAR, by a reader that can build nothing; its tests are in test_sources."""
    loads = (
        r"import pickle|torch\.load\((?!.*weights_only=True)|allow_pickle=True|import dill|joblib"
    )
    found = {n for n, path in house.modules().items() if re.search(loads, path.read_text())}
    assert found == {"pipeline.prepare.sources.unpickle"}
    source = house.modules()["pipeline.prepare.sources.unpickle"].read_text()
    assert re.findall(r"pickle\.(\w+)", source) == ["Unpickler"]


def test_the_documented_tree_is_the_real_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.split("## Where things are")[1].split("```")[1]
    shown = {line.split()[0] for line in tree.splitlines() if line.strip()}
    folder = ROOT
    for line in filter(str.strip, tree.splitlines()):
        names = re.split(r"  +", line.strip())[0].split()
        folder = ROOT if not line.startswith(" ") else folder
        for name in names:
            assert (folder / name).exists(), line
        folder = ROOT / names[0] if not line.startswith(" ") and names[0].endswith("/") else folder
    assert {f"{p.name}/" for p in ROOT.iterdir() if (p / "__init__.py").exists()} <= shown


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_a_page_of_the_documentation_has_at_most_150_lines():
    lines = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in PAGES}
    long = {name for name, count in lines.items() if count > 150}
    assert long <= {"troubleshooting.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_and_option_that_a_page_shows_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    ours = rf"python3? -m ((?:{'|'.join(FLOORS)})\.[a-z0-9_.]*[a-z0-9_]\b(?!\.?<))([^`\n#]*)"
    for module, line in re.findall(ours, text):
        assert module in house.modules(), module
        command = f"{module}.__main__" if f"{module}.__main__" in house.modules() else module
        near = {command, *house.imports(house.modules()[command])} & set(house.modules())
        source = "".join(house.modules()[name].read_text() for name in near)
        for option in re.findall(r"--[a-z-]+", line):
            assert f'"{option}"' in source, f"{module} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_points_at_is_there(page):
    """Links, headings behind a #, files and `file.py:name` in backticks."""
    text = page.read_text(encoding="utf-8")
    for link, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" in link:
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if heading:
            assert heading in headings(target), f"{link}#{heading}"
    for path, name in re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", text):
        places = (ROOT / path, ROOT / "pipeline" / path, ROOT / "tests" / path)
        file = next((f for f in places if f.exists()), None)
        assert file, path
        for part in filter(None, name.split(".")):
            assert re.search(rf"\b{part}\b", file.read_text()), f"{path}:{name}"


def headings(page):
    """The anchors that a Markdown page's headings get."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}
