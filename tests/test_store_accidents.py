"""Killed while writing or reading, shared out over ranks, on a full disk: the same bytes, or a clear line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from pipeline.store import verifying
from tests.conftest import ROOT
from tests.killed import command, contents, each, refuse_difference
from tests.test_resume import PARAMS

pytestmark = pytest.mark.ci

# Small batches and shards: many places to be killed at.
CACHE = {"views": 8, "batch": 16, "shard_mb": 1, "dtype": "int8"}
DISTILL = {**PARAMS["distill"], "workers": 1}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def chain(digits, teacher_path, tmp_path):
    """A folder with what the stages need: prepared images, a teacher, params.yaml."""
    shutil.copytree(digits, tmp_path / "prepared")
    shutil.copytree(teacher_path.parent, tmp_path / "teacher")
    (tmp_path / "params.yaml").write_text(json.dumps({"cache": CACHE, "distill": DISTILL}))
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(digits, teacher_path, tmp_path_factory):
    """The same chain, left alone: the folder, and the hash of its store and of its student."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(digits, folder / "prepared")
    shutil.copytree(teacher_path.parent, folder / "teacher")
    (folder / "params.yaml").write_text(json.dumps({"cache": CACHE, "distill": DISTILL}))
    killed(folder, 0, "cache")
    killed(folder, 0, "distill")
    return folder, contents(folder / "features"), contents(folder / "student")


def killed(folder, kills, stage):
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(folder), str(kills), str(kills), stage],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["fell"]) == kills and not found["litter"]
    return set(found["hashes"])


KILLS = [
    3,
    pytest.param(10, marks=pytest.mark.slow),
    pytest.param(30, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)]),
]


@pytest.mark.parametrize("kills", KILLS)
def test_killed_while_writing_the_store_has_the_same_bytes(kills, undisturbed, chain):
    found = killed(chain, kills, "cache")
    refuse_difference("cache", each(undisturbed[0] / "features"), each(chain / "features"))
    assert found == {undisturbed[1]}
    assert len(verifying.check_bytes(chain / "features")["shards"]) > 10


@pytest.mark.parametrize("kills", KILLS)
def test_killed_while_reading_the_student_has_the_same_bytes(kills, undisturbed, chain):
    shutil.copytree(undisturbed[0] / "features", chain / "features")
    assert killed(chain, kills, "distill") == {undisturbed[2]}
    assert contents(chain / "features") == undisturbed[1]


def torchrun(folder):
    """The stage cache on two ranks, in a session of its own, so that all of it can be killed at once."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.Popen(
        [*launcher, "-m", *command("cache", folder)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("kills", [0, pytest.param(6, marks=pytest.mark.slow)])
def test_two_ranks_write_the_bytes_of_one_process(kills, undisturbed, chain):
    draw = random.Random(kills)
    for _ in range(kills):
        running = torchrun(chain)
        notes = chain / "work" / "cache"
        until, wanted = time.monotonic() + 60, draw.randrange(1, 12)
        while len(list(notes.rglob("shard-*.json"))) < wanted and running.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        if (chain / "features").exists():  # the kill came too late: it was done
            assert contents(chain / "features") == undisturbed[1]
            shutil.rmtree(chain / "features")
    running = torchrun(chain)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said[-3000:]
    assert said.count("worst relative error") == 1
    assert contents(chain / "features") == undisturbed[1]
    assert not list((chain / "work" / "cache").glob("*[0-9a-f]"))


JOIN = """
import runpy, sys
from pipeline.training import claims
sys.argv.pop(0)
lease, machine = float(sys.argv.pop(0)), sys.argv.pop(0)
claims.LEASE = lease
if machine != "this":
    claims.this_machine = machine.encode
runpy.run_module("stages.cache", run_name="__main__", alter_sys=True)
"""


def join(folder, rank=None, machine="this", lease=60.0):
    """A process that helps to write the store, on a machine of its own where that has a name."""
    ranks = {} if rank is None else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, str(lease), machine, *command("cache", folder)],
        cwd=ROOT,
        env={**ENVIRONMENT, **ranks},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_shards(folder, count, running):
    until = time.monotonic() + 60
    while len(list((folder / "work" / "cache").rglob("shard-*.json"))) < count:
        assert time.monotonic() < until and running.poll() is None, running.communicate()[0]
        time.sleep(0.01)


def one_is_published(folder, undisturbed, *processes):
    """All of them end well, what is there are the bytes of one process, and nothing is left of the work."""
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]
    refuse_difference("cache", each(undisturbed[0] / "features"), each(folder / "features"))
    assert [path.suffix for path in (folder / "work" / "cache").iterdir()] == [".receipt"]


@pytest.mark.parametrize("restarted", [True, False])
@pytest.mark.parametrize("ranks", [(0, 1), (None, None)], ids=["ranks", "independent"])
def test_one_of_two_processes_is_killed_and_the_store_has_the_same_bytes(
    ranks, restarted, undisturbed, chain
):
    first, second = (join(chain, rank) for rank in ranks)
    wait_for_shards(chain, 3, second)
    time.sleep(random.Random(restarted).uniform(0, 0.3))
    second.kill()
    second.communicate()
    rest = [first, join(chain, ranks[1])] if restarted else [first]
    one_is_published(chain, undisturbed, *rest)


def test_a_machine_that_dies_is_replaced_after_the_lease(undisturbed, chain):
    machines = [join(chain, machine=name, lease=3.0) for name in ("a", "b")]
    wait_for_shards(chain, 3, machines[1])
    machines[1].kill()
    machines[1].communicate()
    late = join(chain, machine="c", lease=3.0)
    one_is_published(chain, undisturbed, machines[0], late)


def test_a_machine_that_only_slept_beyond_its_lease_does_no_harm(undisturbed, chain):
    machines = [join(chain, machine=name, lease=1.0) for name in ("a", "b")]
    wait_for_shards(chain, 3, machines[1])
    machines[1].send_signal(signal.SIGSTOP)
    one_is_published(chain, undisturbed, machines[0])
    machines[1].send_signal(signal.SIGCONT)
    one_is_published(chain, undisturbed, machines[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_leave_releases_its_claim_at_once(number, undisturbed, chain):
    """Also to another machine, which need not wait for the lease."""
    machines = [join(chain, machine=name, lease=600.0) for name in ("a", "b")]
    wait_for_shards(chain, 3, machines[1])
    machines[1].send_signal(number)
    output, _ = machines[1].communicate(timeout=60)
    assert machines[1].returncode == 128 + number and "run again to resume" in output
    one_is_published(chain, undisturbed, machines[0])


def limited(chain, prefix):
    return subprocess.run(
        [*prefix, sys.executable, "-m", *command("cache", chain)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def test_a_disk_that_fills_while_writing_is_one_line_and_the_rest_goes_on_later(
    undisturbed, chain, tmp_path
):
    """A real file system of 30 MB, mounted in a name space of its own, is the work folder."""
    work, kept = chain / "work", tmp_path / "kept"
    work.mkdir()
    mounted = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=30m tmpfs {work}"
    if subprocess.run([*mounted, mount], capture_output=True).returncode:
        pytest.skip("no name space to mount a small file system in")
    # Someone else fills the disk after the third shard. What lies on it is copied out at the end.
    filler = f"until ls {work}/cache/*/notes/*-00002.json; do sleep 0.01; done; dd if=/dev/zero of={work}/filler"
    script = (
        f'{mount} || exit 9; ({filler}) >/dev/null 2>&1 & "$@"; code=$?; '
        f"rm {work}/filler; cp -r {work}/. {kept}; exit $code"
    )
    found = limited(chain, [*mounted, script, "sh"])
    assert found.returncode == 2, found.stderr
    assert found.stderr.count("\n") == 1
    assert "No space left on device" in found.stderr and "free space" in found.stderr
    assert not (chain / "features").exists()
    shutil.copytree(kept, work, dirs_exist_ok=True)
    assert len(list(work.rglob("shard-*.safetensors"))) >= 3 and not list(work.rglob("*.partial"))
    found = limited(chain, [])
    assert found.returncode == 0, found.stderr
    assert contents(chain / "features") == undisturbed[1]
