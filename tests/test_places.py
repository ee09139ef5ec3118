"""Words and places as people have them: home folders, quotes, terminals of any encoding, a pull."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.prepare.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.prepare.sources.sample import existing
from tests import layouts
from tests.conftest import ROOT


def test_a_path_below_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    layouts.build(tmp_path / "flowers", {"a": 10, "b": 10})
    prepared = prepare(Prepare("imagefolder", "~/flowers", image_size=32), tmp_path / "out")
    assert prepared["classes"] == ["a", "b"]
    broken = tmp_path / "flowers" / "b" / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=f"{broken}: "):
        prepare(Prepare("imagefolder", "~/flowers", image_size=32), tmp_path / "out")


def test_the_home_folder_of_nobody_is_one_line(tmp_path):
    with pytest.raises(
        UserError, match="got ~nobody_here/x; expected a user of this machine .*write"
    ):
        prepare(Prepare("parquet", "~nobody_here/x", image_size=32), tmp_path / "out")


def test_a_relative_path_that_is_not_there_is_shown_with_the_folder_it_counts_from(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"no such .* in {tmp_path}; .*or give the absolute path"):
        existing("imagefolder", "data/downloads/flowers", "a folder")
    with pytest.raises(
        UserError, match="/none/there: no such file or folder; expected a folder; corr"
    ):
        existing("imagefolder", "/none/there", "a folder")


@pytest.mark.parametrize(
    "path", ["Anna's flowers", "My Pictures (2024)", 'say "cheese"', "a; b", "a#b", "[x]", "büro"]
)
def test_make_hands_a_path_of_any_characters_to_the_shell(path, tmp_path):
    """The line that make would run, run with `python -m stages.check` replaced by an echo of its arguments."""
    (tmp_path / ".git").mkdir()
    line = subprocess.run(
        ["make", "-n", "repro", "RECIPE=imagefolder", f"DATA=/data/{path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (check,) = (row for row in line.splitlines() if "stages.check" in row)
    echo = check[check.index(" -m ") :].replace("-m stages.check", "")
    script = f'printf "%s\\n" {echo}'
    environment = {**os.environ, "RECIPE": "imagefolder", "DATA": f"/data/{path}"}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["--recipe", "imagefolder", "--data", f"/data/{path}"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_is_printed_in_a_terminal_of_any_encoding(encoding, tmp_path):
    script = tmp_path / "bücher.py"
    script.write_text(
        "import argparse\n"
        "from pipeline.core import cli\n"
        "from pipeline.core.errors import UserError\n"
        "def main(args):\n"
        "    print('b\\u00fccher \\u2014 \\u65e5\\u672c')\n"
        "    raise UserError('b\\u00fccher \\u65e5: got 1; expected 2')\n"
        "cli.run(main, argparse.ArgumentParser(prog='p'))\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stdout.decode(encoding).startswith("b") and done.stderr.startswith(b"p: error: b")
    if encoding == "ascii":
        assert rb"b\xfccher" in done.stdout and rb"\u65e5" in done.stdout


def documented(word: str) -> list[str]:
    """Commands of the pages that hold this word, without their comments."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [row for page in pages for row in page.read_text(encoding="utf-8").splitlines()]
    return [row.split("  #")[0].strip() for row in lines if row.startswith(word)]


def test_the_documented_pull_goes_on_without_what_was_not_pushed(tmp_path):
    """A stage whose output is `push: false`: the pull that docs/scaling.md shows exits 0 and brings the rest."""
    (pull,) = (row for row in documented("dvc pull"))
    pull = pull.split("&&")[0].strip()
    git = {"GIT_AUTHOR_NAME": "n", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "n"}
    environment = {**os.environ, **git, "GIT_COMMITTER_EMAIL": "a@b", "DVC_NO_ANALYTICS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(command: str, folder: Path) -> None:
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "dvc.yaml").write_text(
        "stages:\n  a:\n    cmd: echo 1 > kept && echo 2 > large\n    outs:\n"
        "      - kept\n      - large:\n          push: false\n"
    )
    remote = f"dvc remote add -f -d store {tmp_path / 'remote'}"
    for command in (
        *("git init -q", "dvc init -q", "dvc repro -q", remote),
        *("git add -A", "git commit -qm run", "dvc push --run-cache"),
    ):
        run(command, first)
    run(f"git clone -q {first} {second}", tmp_path)
    shutil.rmtree(second / ".dvc" / "cache", ignore_errors=True)
    run(remote, second)
    run(pull, second)
    assert (second / "kept").read_text() == "1\n" and not (second / "large").exists()


def test_the_documents_say_how_a_value_of_hydra_is_quoted():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [part.split("'")[1] for part in text.split("`") if part.startswith("-S '")]
    assert len(quoted) >= 2 and "mismatched input" in text
    for assignment in quoted:
        value = OverridesParser.create().parse_override(assignment).value()
        assert value == assignment.partition("=")[2].strip('"')
