"""Half-written files of a killed DVC are moved aside, whole ones stay; with a real DVC in test_repro."""

from __future__ import annotations

import fcntl

import pytest

from pipeline.project import dvc_locks

LOCK = "schema: '2.0'\nstages:\n  teach:\n    cmd: python -m stages.teach\n"


@pytest.fixture
def repository(tmp_path):
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dvc.lock", ""),
        ("dvc.lock", LOCK.rpartition(":")[0]),
        (".dvc/tmp/rwlock", ""),
        (".dvc/tmp/rwlock", '{"read": {"a'),
    ],
)
def test_a_torn_file_is_set_aside(name, text, repository, capsys, monkeypatch):
    path = repository / name
    path.write_text(text)
    monkeypatch.chdir(repository)
    dvc_locks.main(None)
    aside = f".dvc/tmp/{path.name}.torn"
    told = f"{path.name}: half-written by a killed dvc; moved to {aside}\n"
    assert capsys.readouterr().out == told
    assert not path.exists() and (repository / aside).read_text() == text


def test_whole_files_and_one_in_conflict_stay(repository):
    (repository / ".dvc" / "tmp" / "rwlock").write_text('{"read": {}, "write": {}}')
    for text in (LOCK, f"<<<<<<< HEAD\n{LOCK}"):
        (repository / "dvc.lock").write_text(text)
        assert dvc_locks.set_aside(repository) == []
        assert (repository / "dvc.lock").read_text() == text


def test_nothing_is_touched_while_a_dvc_writes_or_where_none_ever_ran(repository):
    (repository / "dvc.lock").write_text("")
    with (repository / ".dvc" / "tmp" / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert dvc_locks.set_aside(repository) == []
    assert dvc_locks.set_aside(repository) == ["dvc.lock"]
    (repository / ".dvc").rename(repository / "elsewhere")
    (repository / "dvc.lock").write_text("")
    assert dvc_locks.set_aside(repository) == []
