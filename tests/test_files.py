"""Files are whole or absent, and a command line tells a mistake in one line."""

from __future__ import annotations

import argparse
import errno
import json
import os
import stat
import subprocess
import sys

import pytest

from pipeline.core import artifacts, cli
from pipeline.core.atomic import PARTIAL, atomic, atomic_dir, publish
from pipeline.core.errors import GateFailed, UserError
from tests.house import ROOT


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"schema": "x", "value": 1})
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError):
        artifacts.write_json(path, {"value": float("nan")})
    assert artifacts.read_json(path, "x")["value"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_written_json_fills_its_lines_and_keeps_every_value():
    value = {
        "schema": "x",
        "small": {"p50": 0.1, "ci": [0.09, 1e-07]},
        "rows": [{"n": i, "name": "ä" * 12, "flags": [], "none": None} for i in range(3)],
        "long": list(range(200)),
        "deep": {"text": "t" * 200, 7: {"empty": {}}},
        "last": True,
    }
    text = artifacts.json_text(value)
    value["deep"] = {"text": "t" * 200, "7": {"empty": {}}}
    assert json.loads(text) == value and list(json.loads(text)) == list(value)
    lines = text.splitlines()
    assert (
        lines[0] == "{"
        and lines[1] == ' "schema": "x", "small": {"p50": 0.1, "ci": [0.09, 1e-07]},'
    )
    assert [len(line) for line in lines if len(line) > artifacts.WIDTH] == [213]
    at = lines.index(' "long": [')
    numbers = lines[at + 1 : lines.index(" ],", at)]
    assert all(len(line) > artifacts.WIDTH - 6 for line in numbers[:-1])
    assert artifacts.json_text({}) == "{}" and artifacts.json_text([]) == "[]"


def test_figures_are_rounded_and_counts_are_not():
    value = {"a": [0.123456789, 1234567], "b": {"c": True, "d": None, "e": "0.123456789"}}
    assert artifacts.rounded(value) == {"a": [0.123457, 1234567], "b": value["b"]}
    assert artifacts.rounded(0.00123456, 4) == 0.001235


def test_a_folder_replaces_the_old_one_only_when_finished(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        with atomic_dir(out) as folder:
            (folder / "f").write_text(text)
    with pytest.raises(RuntimeError), atomic_dir(out) as folder:
        (folder / "f").write_text("half")
        raise RuntimeError
    assert (out / "f").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def python(code, folder):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


KILLED_BETWEEN = """
import os, pathlib, signal
from pipeline.core import atomic
rename = pathlib.Path.replace
def then_killed(self, target):
    rename(self, target)
    if target.name == "was":
        os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.replace = then_killed
atomic.publish(pathlib.Path("second"), pathlib.Path("out"))
"""


def test_killed_between_the_two_renames_of_a_folder_the_next_one_clears_up(tmp_path):
    for name in ("out", "second", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    python(KILLED_BETWEEN, tmp_path).wait()
    left = sorted(p.name for p in tmp_path.iterdir())
    assert "out" not in left and left[0].endswith(PARTIAL)
    publish(tmp_path / "third", tmp_path / "out")
    assert (tmp_path / "out" / "f").read_text() == "third"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "second"]


OFTEN = """
from pipeline.core import artifacts, atomic
for i in range(300):
    with atomic.atomic_dir("out") as folder:
        (folder / "f").write_text(str(i))
    artifacts.write_json("a.json", {"i": i})
"""


def test_writers_of_one_path_at_once_do_not_disturb_each_other(tmp_path):
    writers = [python(OFTEN, tmp_path) for _ in range(3)]
    assert [w.communicate()[1] for w in writers] == [""] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["f"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not readable as JSON"),
        ("[1]", "got a JSON list"),
        ('{"schema": "b"}', "schema: got 'b'; expected"),
    ],
)
def test_unreadable_json_is_named(content, message, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        artifacts.read_json(path, "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="not writable"):
        artifacts.write_json(tmp_path / "a.json", {})


def test_a_file_where_a_folder_must_be_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="cannot create its folder"):
        artifacts.write_json(tmp_path / "a" / "b.json", {})


def test_a_digest_does_not_depend_on_key_order():
    assert (
        artifacts.digest({"a": 1, "b": [2]})
        == artifacts.digest({"b": [2], "a": 1})
        != artifacts.digest({"a": 1})
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x: got 1\nallowed 2"), 2),
        (GateFailed("over"), 3),
        (None, 0),
        (KeyboardInterrupt(), 130),
        (OSError(errno.EFBIG, "File too large"), 2),
    ],
)
def test_exit_codes_and_one_line_on_stderr(error, code, capsys):
    def main(_: argparse.Namespace) -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as left:
        cli.run(main, argparse.ArgumentParser(prog="tool"), [])
    assert left.value.code == code
    assert capsys.readouterr().err.count("\n") == (code != 0)


def test_a_bug_keeps_its_traceback():
    def main(_: argparse.Namespace) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main, argparse.ArgumentParser(), [])


@pytest.mark.parametrize(
    ("name", "covered"),
    [
        ("teach.py", True),
        ("training/__init__.py", True),
        ("core/errors.py", True),
        ("distill/kernels/pca.py", True),
        ("report/page.py", False),
    ],
)
def test_the_code_digest_covers_every_source_of_its_rooms_and_no_other(name, covered, monkeypatch):
    rooms = ("core", "distill", "teach.py", "training")
    before, exact = artifacts.code(rooms), artifacts.sha256
    monkeypatch.setattr(
        artifacts,
        "sha256",
        lambda path: "edited" if str(path).endswith(f"pipeline/{name}") else exact(path),
    )
    assert (artifacts.code(rooms) != before) == covered
