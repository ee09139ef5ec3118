"""How a run tells how far it is: plain lines in a log, a bar on a terminal, nothing from the other ranks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

from pipeline.core.progress import Progress
from tests.conftest import ROOT


def test_a_log_gets_plain_lines_with_pass_speed_and_losses(capsys):
    with Progress("distill plain", 4, every=0.0, batch=64, epoch=2) as tell:
        for done in range(1, 5):
            tell(done, cross_entropy=1 / done)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert "epoch 1  " in lines[1] and "epoch 2  " in lines[2] and " img/s" in lines[0]
    assert lines[3].endswith("cross_entropy 0.25") and "\x1b" not in "".join(lines)


def test_between_two_lines_time_passes_but_the_last_is_always_told(capsys):
    tell = Progress("teach", 100, every=60.0)
    for done in range(1, 101):
        tell(done)
    assert capsys.readouterr().out.startswith("teach 100/100  ")


def test_a_quiet_rank_says_nothing(capsys):
    with Progress("distill", 2, every=0.0, quiet=True) as tell:
        tell(1)
        tell(2)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_with_the_same_figures():
    script = (
        "from pipeline.core.progress import Progress\n"
        "with Progress('distill cakd', 3, batch=8, epoch=3) as tell:\n"
        "    for i in range(3): tell(i + 1, gram=0.5)\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
    )
    process.wait(60)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "distill cakd" in shown and "3/3" in shown and "gram 0.5" in shown and "img/s" in shown
