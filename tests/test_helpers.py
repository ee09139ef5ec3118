"""What the other tests rest on: folders made once a run, and command lines run in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import command_line
from tests.house import ROOT
from tests.shared import Shared

WAITING = """
import pathlib, sys, time
from tests.house import ROOT
from tests.shared import Shared

def make(folder):
    time.sleep(0.3)
    with pathlib.Path(sys.argv[2]).open("a") as log:
        log.write("made\\n")
    (folder / "file").write_text("whole")

assert (Shared(pathlib.Path(sys.argv[1])).folder("a", make) / "file").read_text() == "whole"
"""
CHANGES = """
import os, random, signal, sys, warnings
import numpy, torch
os.environ["LEFT"] = "behind"
os.chdir("/")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
torch.manual_seed(7), random.seed(7), numpy.random.seed(7), torch.set_num_threads(1)
print("argv", *sys.argv[1:], flush=True)
os.system("echo below Python; echo and its errors >&2")
warnings.warn("a warning")
{end}
"""


def test_processes_that_want_one_folder_make_it_once(tmp_path):
    log, line = tmp_path / "log", [sys.executable, "-c", WAITING]
    asked = [subprocess.Popen([*line, tmp_path / "root", log], cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in asked] == [0, 0, 0]
    assert log.read_text() == "made\n"


def test_a_folder_left_unfinished_is_made_anew_and_a_changed_one_is_told(tmp_path):
    def killed(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    shared = Shared(tmp_path / "root")
    with pytest.raises(KeyboardInterrupt):
        shared.folder("a", killed)
    made = shared.folder("a", lambda folder: (folder / "file").write_text("whole"))
    assert [p.name for p in made.iterdir()] == ["file"]
    shared.refuse_changes()
    (made / "file").write_text("spoilt")
    with pytest.raises(AssertionError, match="a test wrote into a"):
        shared.refuse_changes()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module("sys.exit(3)")`: the name of a module that changes its process and ends so."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(end: str) -> str:
        (tmp_path / "changing.py").write_text(CHANGES.format(end=end))
        return "changing"

    return write


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_command_in_this_process_ends_as_a_process_does_and_leaves_nothing_behind(
    end, code, said, module
):
    torch.manual_seed(3)
    before = (list(sys.argv), Path.cwd(), signal.getsignal(signal.SIGTERM), sys.stdout, sys.stderr)
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    done = command_line.here(module(end), "a", 1)
    assert done.returncode == code and done.stdout == "argv a 1\nbelow Python\n"
    assert done.stderr.startswith("and its errors\n") and "UserWarning: a warning" in done.stderr
    assert done.stderr.endswith(said)
    now = (list(sys.argv), Path.cwd(), signal.getsignal(signal.SIGTERM), sys.stdout, sys.stderr)
    assert now == before and "LEFT" not in os.environ
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), drawn)


def test_a_command_gets_its_folder_and_its_environment_for_its_time(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "looking.py").write_text("import os\nprint(os.getcwd(), os.environ['GIVEN'])\n")
    done = command_line.here("looking", folder=tmp_path, GIVEN="this")
    assert done.stdout == f"{tmp_path} this\n" and "GIVEN" not in os.environ
