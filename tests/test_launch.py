"""The files of docs/launch: what Kubernetes and SkyPilot need is there, and every command is one of ours."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess

import jsonschema
import pytest
from ruamel.yaml import YAML
from torch.distributed.run import get_args_parser

from pipeline.core import cli
from pipeline.models.probe import TeacherSpec
from pipeline.store import shards
from tests import tiny
from tests.house import ROOT

LAUNCH = ROOT / "docs" / "launch"
KUBERNETES = sorted(LAUNCH.glob("kubernetes-*.yaml"))
SKY = sorted(LAUNCH.glob("sky-*.yaml"))
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")

NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}


def closed(required, **properties):
    """An object of these keys and no other."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


def many(items):
    return {"type": "array", "minItems": 1, "items": items}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 1}
RULE = closed(
    ["action"],
    action={"enum": ["FailJob", "Ignore", "Count"]},
    onExitCodes=closed(
        ["operator", "values"],
        containerName=NAME,
        operator={"enum": ["In", "NotIn"]},
        values=many(COUNT),
    ),
    onPodConditions=many(closed(["type", "status"], type=TEXT, status={"enum": ["True"]})),
)
CONTAINER = closed(
    ["name", "image", "command"],
    name=NAME,
    image={"type": "string", "pattern": r"^[\w./-]+:[\w.-]+$"},
    workingDir={"type": "string", "pattern": "^/"},
    command=many(TEXT),
    args=many(TEXT),
    env=many(closed(["name", "value"], name=TEXT, value=TEXT)),
    resources=closed(["limits"], limits=closed([], **{"nvidia.com/gpu": COUNT})),
    volumeMounts=many(closed(["name", "mountPath"], name=NAME, mountPath=TEXT)),
)
POD = closed(
    ["containers", "restartPolicy"],
    restartPolicy={"const": "Never"},  # podFailurePolicy takes no other
    terminationGracePeriodSeconds=COUNT,
    containers=many(CONTAINER),
    volumes=many(
        closed(
            ["name"],
            name=NAME,
            persistentVolumeClaim=closed(["claimName"], claimName=NAME),
            emptyDir=closed([], medium={"const": "Memory"}, sizeLimit=TEXT),
        )
    ),
)
METADATA = closed(["name"], name=NAME)
JOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "batch/v1"},
    kind={"const": "Job"},
    metadata=METADATA,
    spec=closed(
        ["template"],
        parallelism=COUNT,
        backoffLimit=COUNT,
        podFailurePolicy=closed(["rules"], rules=many(RULE)),
        template=closed(["spec"], spec=POD),
    ),
)
CLAIM = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "v1"},
    kind={"const": "PersistentVolumeClaim"},
    metadata=METADATA,
    spec=closed(
        ["accessModes", "resources"],
        accessModes={"const": ["ReadWriteMany"]},
        resources=closed(["requests"], requests=closed(["storage"], storage=TEXT)),
    ),
)
TASK = closed(
    ["name", "resources", "run"],
    name=NAME,
    workdir=TEXT,
    num_nodes=COUNT,
    resources=closed(
        ["accelerators"],
        accelerators={"type": "string", "pattern": r"^\w+:\d+$"},
        use_spot={"type": "boolean"},
        job_recovery=closed([], max_restarts_on_errors=COUNT),
    ),
    envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    setup=TEXT,
    run=TEXT,
)
# Set by SkyPilot on every machine of a job.
GIVEN = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "0",
    "SKYPILOT_NUM_GPUS_PER_NODE": "4",
}


def load(path):
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def containers(path):
    return load(path)["spec"]["template"]["spec"]["containers"]


@pytest.mark.parametrize("path", [*KUBERNETES, *SKY], ids=lambda p: p.name)
def test_a_launch_file_has_the_keys_that_its_schema_needs_and_the_page_shows_it(path):
    content = load(path)
    kind = TASK if path in SKY else {"Job": JOB, "PersistentVolumeClaim": CLAIM}[content["kind"]]
    jsonschema.validate(content, kind)
    assert f"(launch/{path.name})" in PAGE and f"docs/launch/{path.name}" in PAGE


@pytest.mark.parametrize("path", [p for p in KUBERNETES if load(p)["kind"] == "Job"], ids=str)
def test_what_a_job_refers_to_is_there(path):
    spec = load(path)["spec"]
    pod = spec["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    claims = {load(p)["metadata"]["name"] for p in KUBERNETES if load(p)["kind"] != "Job"}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    used = {
        v["persistentVolumeClaim"]["claimName"]
        for v in pod["volumes"]
        if len(v) == 2 and "emptyDir" not in v
    }
    assert used <= claims
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get(
            "onExitCodes", {"containerName": pod["containers"][0]["name"], "values": []}
        )
        assert codes["containerName"] in {c["name"] for c in pod["containers"]}
        assert set(codes["values"]) <= {cli.USER_MISTAKE, cli.GATE}


def kubernetes_commands():
    jobs = [p for p in KUBERNETES if load(p)["kind"] == "Job"]
    return [[*c["command"], *c["args"]] for path in jobs for c in containers(path)]


def sky_commands():
    """The command lines of ours in each `run`, as a shell with the variables of the job hands them over."""
    commands = []
    for path in SKY:
        task = load(path)
        lines = task["run"].replace("\\\n", " ").splitlines()
        ours = [line for line in lines if re.match(r"FIRST=|\.venv/", line.strip())]
        script = "\n".join(
            re.sub(r"^(\.venv/\S+)", r'printf "%s\\n" \1', line.strip()) for line in ours
        )
        given = {name: value or "nfs:/cakd" for name, value in task.get("envs", {}).items()}
        done = subprocess.run(
            ["bash", "-euc", script],
            env={"PATH": "/usr/bin:/bin", **GIVEN, **given},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr  # -u: no variable is undefined
        commands.append(done.stdout.splitlines())
    return commands


@pytest.mark.parametrize("command", [*kubernetes_commands(), *sky_commands()], ids=" ".join)
def test_every_command_of_a_launch_file_is_one_that_the_project_takes(command, monkeypatch):
    program, words = command[0], command[1:]
    if program == ".venv/bin/torchrun":
        launch = get_args_parser().parse_args(words)
        assert launch.module
        module, words = launch.training_script, launch.training_script_args
    else:
        assert program == ".venv/bin/python" and words[0] == "-m"
        module, words = words[1], words[2:]
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    parsers = []
    monkeypatch.setattr(cli, "run", lambda main, parser, **_: parsers.append(parser))
    runpy.run_module(module, run_name="__main__")
    parsers[0].parse_args(words)
    paths = [w.removeprefix("/shared/") for w in words if "/" in w and ".work" not in w]
    stage = load(ROOT / "dvc.yaml")["stages"][module.removeprefix("stages.")]
    known = stage.get("do", stage)["cmd"].replace("${item}", "cakd+logits").split()
    assert paths and set(paths) <= set(known)


@pytest.mark.parametrize("path", SKY, ids=lambda p: p.name)
def test_every_variable_of_a_task_is_set_and_who_launches_it_gives_those_without_a_value(path):
    task = load(path)
    envs = task.get("envs", {})
    used = set(re.findall(r"\$\{?(\w+)", task["run"] + task["setup"]))
    own = set(re.findall(r"^\s*(?:export )?(\w+)=", task["run"], re.M))
    assert used <= {*envs, *GIVEN, *own}
    launched = [
        line for line in PAGE.splitlines() if f"docs/launch/{path.name}" in line and "sky " in line
    ]
    assert launched
    for name, value in envs.items():
        assert value is not None or all(f"--env {name}=" in line for line in launched)


@pytest.mark.ci
def test_the_features_go_to_a_remote_of_their_own_where_dvc_yaml_says_so(tmp_path):
    """What docs/scaling.md shows for a store that is kept."""
    assert "remote: features" in PAGE
    (tmp_path / "features").mkdir()
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  cache:\n    cmd: echo 1 > kept && echo 2 > large\n    outs:\n"
        "      - kept\n      - large:\n          remote: features\n"
    )
    (tmp_path / "remote").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for line in (
        "init -q",
        f"remote add -d store {tmp_path / 'remote'}",
        f"remote add features {tmp_path / 'features'}",
        "repro -q",
        "push -q",
    ):
        done = tiny.dvc(tmp_path, *shlex.split(line))
        assert done.returncode == 0, done.stderr
    assert [
        len([p for p in (tmp_path / n).rglob("*") if p.is_file()]) for n in ("remote", "features")
    ] == [1, 1]


def rows(title):
    """The rows of the table of docs/scaling.md whose first row begins so: their cells, numbers as numbers."""
    table = PAGE[PAGE.index(f"| {title}") :].split("\n\n")[0]
    for line in table.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if re.fullmatch(r"[\d.,]+", cells[0]):
            yield name, [float(cell.replace(",", "")) for cell in cells]


def test_the_disk_and_the_hours_of_full_size_are_the_arithmetic_of_what_was_measured():
    images = (1_281_167, 10_000_000)
    spec = TeacherSpec(1, (14, 14), 12, 768, {}, None)
    stored = {}
    for name, (layout, dtype) in {
        "`block_input`, float16, one view": ("block_input", "float16"),
        "`block_input`, int8, one view": ("block_input", "int8"),
        "`qkvh`, float16, one view": ("qkvh", "float16"),
        "`logits`, one view": ("logits", "float32"),
    }.items():
        stored[name] = shards.record_bytes(shards.layout_fields(layout, dtype, spec, 1000))
    result = dict(rows("prepared images, as arrays"))
    packed = next(name for name in result if name.startswith("prepared images, packed JPEGs"))
    stored[packed] = 35_800  # docs/images.md, of benchmarks/results/cpu-2core-images.json
    assert set(result) == {"prepared images, as arrays", *stored}
    for name, (size, *disk) in result.items():
        assert size == stored.get(name, 224 * 224 * 3), name
        assert disk == [round(size * n / 1e9) for n in images], name
    results = ROOT / "benchmarks" / "results"
    cpu = json.loads((results / "cpu-2core-store-step-logits.json").read_text())
    gpu = json.loads((results / "h100-training-224px.json").read_text())["methods"]
    rates = [
        16e3 / cpu["stage_ms"]["online"]["replay"],
        64e3 / (gpu["logits"]["stage_ms"]["replay"] * 17.6 / 1.5),
        *(gpu[method]["img_per_s"] for method in ("plain", "logits", "cakd+logits")),
    ]
    shown = list(rows("teacher, 2 cores"))
    for (name, (rate, *hours)), exact in zip(shown, rates, strict=True):
        assert rate == pytest.approx(exact, rel=1e-3), name
        assert hours == [round(n / exact / 3600, 2) for n in images], name
