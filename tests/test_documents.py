"""The commands of the README and of docs/ run as they are written, or their reason not to stands here."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from pipeline.core import config
from stages.check import SECTIONS
from tests import containers, tiny
from tests.documents import PAGES, commands
from tests.house import ROOT

# In a finished run, in this order.
RUN = (
    "python -m pipeline.store plan",
    "python -m pipeline.store info",
    "python -m pipeline.store verify -n 512",
    "torchrun --nproc-per-node 4 -m stages.cache data/prepared artifacts/teacher/teacher.safetensors "
    "data/features",
    "python -m exporters.bundle artifacts/export/student.onnx student-edge.tar --calib data/prepared",
    "python -m exporters.bench student.onnx",
    "python -m exporters.bench student.onnx --threads 1,all --batch 1,16",
    "python -m exporters.bench student.onnx --self-test",
    "python -m exporters.bench head/student.onnx head/student-int8.onnx head/student.xml head/student-int8.xml "
    "--against base/ --json verdict.json",
    "python -m stages.report --merge reports/edge.json jetson.json against.json --out both",
    "python -m stages.report --merge reports/edge.json --history past/ --out both",
    "python -m stages.report --from reports/edge.json --as junit --out gates.xml",
    "jq -r '.rows[] | select(.model == \"student\") | [.target, .wall_ms.p50 // .reason] | @tsv' "
    "reports/bench/*.json",
    "jq -r '.models | to_entries[] | [.key, .value.clean.top1, .value.noisy.top1] | @tsv' reports/accuracy.json",
    "python -m pipeline.distill.kernels --tokens 196 --width 64",
    "python -m benchmarks.kernel_floors",
    "dvc repro --allow-missing --dry",
    "python -m stages.cache data/prepared artifacts/teacher/teacher.safetensors data/features",
    "dvc commit -f cache",
)
ELSEWHERE = {  # command -> the test that runs it, or all of it that can run
    "make repro": "test_repro.py",
    "make repro RECIPE=students": "test_recipes.py",
    "make repro DATA=/data/flowers": "test_choosing.py",
    "python -m exporters.candidates --target ort-int8 --budget-ms 5 --image-size 128": "test_candidates.py",
    "python -m exporters.candidates --target ort-int8 --image-size 128 --pack candidates/": "test_candidates.py",
    "python -m bundle.run --bench-all --json > device.json": "test_candidates.py",
    "python -m exporters.candidates --from device.json --budget-ms 5": "test_candidates.py",
    "make repro RECIPE=imagefolder DATA=/data/flowers": "test_recipes.py",
    "python -m benchmarks.gpu --dry": "test_gpu_command.py",
    "python -m benchmarks.kernel_budget": "test_kernels_proof.py",
    "dvc repro": "test_repro.py",
    "dvc push --run-cache": "test_places.py",
    "dvc pull --run-cache --allow-missing && dvc repro --pull": "test_places.py",
    'export CAKD_LAUNCH="torchrun --nproc-per-node 4"': "test_compute.py",
}
NOT_RUN = {  # command -> why not
    "make test": "these tests",
    "make venv LATEST=1": "network",
    "make constraints": "network",
    "pip install -c constraints.txt -e '.[edge]'": "network",
    ". .venv/bin/activate": "makes nothing",
    "hf download uoft-cs/cifar100 --repo-type dataset --local-dir data/downloads/cifar100": "network",
    "mkdir -p data/downloads && curl -L https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz "
    "-o data/downloads/cifar-100-python.tar.gz": "network",
    "python -m pip download --only-binary=:all: --python-version 3.12 --implementation cp --platform "
    "manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl rich ruamel.yaml pydantic": "network",
    "python3 -m pip install --no-index --no-deps --target ~/site .whl/*.whl": "network before it",
    "dvc remote add -d store s3://bucket/cakd": "needs a bucket",
    "make gpu": "needs a GPU",
    "make gpu MINUTES=20 DATA=data/cifar100": "needs a GPU",
    "python -m benchmarks.gpu --parts kernels steps --out results/": "needs a GPU",
    "PYTHONPATH=~/site make gpu": "needs a GPU",
    "python -m pytest -m gpu": "needs a GPU",
    **{
        f"kubectl apply -f docs/launch/kubernetes-{name}.yaml": "needs a cluster; test_launch.py"
        for name in ("volume", "cache", "distill")
    },
    "for i in 1 2 3 4; do sky jobs launch -y -d -n cache-$i --env NFS=nfs.example:/cakd "
    "docs/launch/sky-cache.yaml; done": "needs a cloud; test_launch.py",
    "sky jobs launch -y --env NFS=nfs.example:/cakd docs/launch/sky-distill.yaml": "needs a cloud",
    "python -m venv ~/envs/torchdistill && ~/envs/torchdistill/bin/pip install torchdistill timm": "network",
    'python -m venv ~/envs/lightly && ~/envs/lightly/bin/pip install "lightly-train[timm]"': "network",
    "python -m benchmarks.peers --env torchdistill=~/envs/torchdistill/bin/python "
    "--env lightly-train=~/envs/lightly/bin/python": "takes minutes; test_peers.py runs a small one",
    "python -m benchmarks.kernels": "takes minutes; test_benchmarks.py runs its parts",
}
HERE_DOCUMENT = "python - <<'EOF'\n"


def is_override(command: str) -> bool:
    return command.startswith("dvc exp run -S ")


def test_every_command_of_a_page_is_run_or_has_its_reason_here():
    known = {*RUN, *ELSEWHERE, *NOT_RUN}
    shown = {c for c in commands() if not (is_override(c) or c.startswith(HERE_DOCUMENT))}
    assert shown - known == set() and known - shown == set()
    assert all((ROOT / "tests" / name).is_file() for name in ELSEWHERE.values())
    assert all("```bash" not in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("command", [c for c in commands() if is_override(c)])
def test_a_documented_override_gives_settings_that_are_accepted(command, tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    words = shlex.split(command.removeprefix("dvc exp run "))
    apply_overrides(tmp_path / "params.yaml", words[1::2])
    params = YAML(typ="safe", pure=True).load((tmp_path / "params.yaml").read_bytes())
    for name, kind in SECTIONS.items():
        config.parse(kind, params[name], name)


def test_the_script_that_makes_a_tenth_of_cifar_10_runs(tmp_path):
    (script,) = (c for c in commands() if c.startswith(HERE_DOCUMENT))
    images = {split: containers.pictures(12, seed) for seed, split in enumerate(("train", "test"))}
    downloads = tmp_path / "data" / "downloads"
    downloads.mkdir(parents=True)
    folder = containers.as_cifar10(downloads, images)
    containers.packed(folder).rename(downloads / "cifar-10-python.tar.gz")
    run(script, tmp_path, PYTHONPATH=str(ROOT))
    written = (downloads / "cifar10-mini").rglob("*.png")
    assert {path.relative_to(downloads).parts[1] for path in written} == {"train", "test"}


def run(command: str, folder, **environment: str) -> str:
    """The command in a shell there; its stdout. Fails the test where it fails."""
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env={**tiny.environment(), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def finished(finished_run, tmp_path_factory):
    """A finished tiny run, with the files beside it that the pages suppose."""
    folder = tmp_path_factory.mktemp("documents")
    tiny.copy(folder, "docs", run=finished_run)
    student = "artifacts/students/cakd+logits/student.safetensors"
    calibrated = "--precision fp32,int8 --calib data/prepared"
    run(f"mkdir head && python -m exporters.ort {student} head/student.onnx {calibrated}", folder)
    run(f"python -m exporters.ov head/student.onnx -o head {calibrated}", folder)
    run("cp -r head base && cp head/student.onnx .", folder)
    return folder


@pytest.mark.ci
@pytest.mark.timeout(1800)
def test_the_commands_of_the_pages_run_in_a_finished_run(finished):
    (finished / "past").mkdir()
    for name in ("past/edge.json", "jetson.json"):
        shutil.copy(finished / "reports" / "edge.json", finished / name)
    for command in RUN:
        run(command, finished)
        verdict = finished / "verdict.json"
        if verdict.exists() and not (finished / "against.json").exists():
            shutil.copy(verdict, finished / "against.json")
    assert (finished / "both" / "index.html").is_file() and (finished / "gates.xml").is_file()
