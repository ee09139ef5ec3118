"""Claims divide work between processes: one owner each, taken over from the dead, released by who leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.core.errors import UserError
from pipeline.training import claims
from pipeline.training.claims import Claims, FolderGoneError, Watch, dissolve, shared_folder
from tests.house import ROOT

HOLD = """
import sys, time
from pathlib import Path
from pipeline.training import claims
if sys.argv[2] != "here":
    claims.this_machine = sys.argv[2].encode
with claims.Claims(Path(sys.argv[1])) as own:
    assert own.take("a")
    print("taken", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    """A lease of half a second."""
    monkeypatch.setattr(claims, "LEASE", 0.5)


def holder(folder, machine="here"):
    """A process of its own that holds the claim "a"."""
    started = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), machine],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout.readline() == "taken\n"
    return started


def test_of_many_claims_at_once_one_is_given(tmp_path):
    owners = [Claims(tmp_path).__enter__() for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for name in ("a", "b"):
            taken = list(pool.map(lambda own, name=name: own.take(name), owners))
            assert sum(taken) == 1
            assert owners[taken.index(True)].take(name)  # its own
    for own in owners:
        own.__exit__()


def test_who_leaves_releases_its_claims_by_an_error_too(tmp_path):
    with Claims(tmp_path) as other:
        with pytest.raises(KeyboardInterrupt), Claims(tmp_path) as own:
            assert own.take("a") and not other.take("a") and other.in_company()
            raise KeyboardInterrupt
        assert other.take("a") and not other.in_company()


def test_a_killed_owner_of_this_machine_is_noticed_at_once(tmp_path):
    killed = holder(tmp_path)
    with Claims(tmp_path) as own:
        assert not own.take("a")
        killed.kill()
        killed.wait()
        assert own.take("a")


def test_a_killed_owner_of_another_machine_is_dead_after_the_lease(tmp_path, quick):
    killed = holder(tmp_path, "another")
    killed.kill()
    killed.wait()
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        begun = time.monotonic()
        while not (taken := first.take("a")) and time.monotonic() < begun + 5:
            time.sleep(0.05)
        assert taken and time.monotonic() - begun >= 0.5
        assert not second.take("a")


def test_a_living_owner_of_another_machine_keeps_its_claim(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(claims, "this_machine", lambda: b"another")
    with Claims(tmp_path) as far:
        assert far.take("a")
        monkeypatch.setattr(claims, "this_machine", lambda: b"here")
        with Claims(tmp_path) as own:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                assert not own.take("a")
                time.sleep(0.05)
            assert own.watch.state(far.name) == "alive"


def test_a_suspended_owner_loses_its_claim_and_notices(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(claims, "this_machine", lambda: b"")  # a machine that cannot tell its name
    with Claims(tmp_path) as suspended:
        assert suspended.take("a") and suspended.holds("a")
        suspended._stop.set()
        with Claims(tmp_path) as own:
            own.take("a")
            time.sleep(0.6)
            assert own.take("a")
            assert own.holds("a") and not suspended.holds("a")
            assert not suspended.take("a")


def test_a_claim_without_an_owner_is_dead_after_the_lease(tmp_path, quick):
    """Its owner was killed between creating and writing it."""
    (tmp_path / "a.0").touch()
    with Claims(tmp_path) as own:
        assert not own.take("a")
        time.sleep(0.6)
        assert own.take("a")


def test_one_of_many_takes_over(tmp_path, quick):
    (tmp_path / "a.0").touch()
    owners = [Claims(tmp_path).__enter__() for _ in range(8)]
    for own in owners:
        assert not own.take("a")
    time.sleep(0.6)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda own: own.take("a"), owners)) == 1
    for own in owners:
        own.__exit__()


def test_a_suspended_process_of_this_machine_keeps_its_claims(tmp_path, quick):
    stopped = holder(tmp_path)
    stopped.send_signal(signal.SIGSTOP)
    with Claims(tmp_path) as own:
        own.take("a")
        time.sleep(0.6)
        assert not own.take("a")
    stopped.kill()
    stopped.wait()


def test_work_that_is_done_is_gone_for_all_at_once(tmp_path):
    with shared_folder(tmp_path, {"a": 1}) as (folder, own):
        assert own.take("b")
        with shared_folder(tmp_path, {"a": 1}) as (same, _):
            assert same == folder
            dissolve(same)
        assert not folder.exists() and not own.holds("b")
        with pytest.raises(FolderGoneError):
            own.take("c")
    assert not list(tmp_path.iterdir())


def test_other_settings_wait_for_a_process_that_leaves_and_are_refused_beside_one_that_stays(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(claims, "PATIENCE", 0.3)
    with shared_folder(tmp_path, {"a": 1}) as (_, own):
        with (
            pytest.raises(
                UserError, match=r"in use by .* with other settings \(a: 1 there, 2 here\)"
            ),
            shared_folder(tmp_path, {"a": 2}),
        ):
            pass
        assert own.take("b")
    with shared_folder(tmp_path, {"a": 2}):
        pass


def test_other_settings_of_a_machine_that_died_are_waited_for_a_lease(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(claims, "PATIENCE", 0.0)
    folder = tmp_path / "0123" / "claims"
    folder.mkdir(parents=True)
    (folder / "owner-x").write_bytes(b"another 0000000000000001\n")
    begun = time.monotonic()
    with shared_folder(tmp_path, {"a": 2}):
        assert time.monotonic() - begun >= 0.5


def test_files_of_no_owner_are_judged_without_an_error(tmp_path):
    watch = Watch(tmp_path)
    (tmp_path / "owner-x").write_bytes(os.urandom(64))
    assert watch.state("owner-x") in ("unknown", "alive") and watch.owners() == ["owner-x"]
    assert watch.state("owner-missing") == "unknown"
