"""The feature store: the same numbers as the live teacher, or a refusal that names what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import data, files, store, teacher, views
from pipeline.errors import GateFailed, UserError
from tests.conftest import ROOT


def write(prepared, teacher_path, folder, **kwargs):
    cache = store.Cache(**{"views": 2, "shard_mb": 9, **kwargs})
    live = teacher.load(teacher_path)
    return store.write(cache, prepared, live, folder / "store", folder / "work", lambda _: None)


@pytest.fixture
def broken(features, tmp_path):
    return shutil.copytree(features, tmp_path / "store")


def test_a_float32_record_replays_to_the_live_teachers_tokens(features, prepared, teacher_path):
    opened = store.Store(features, prepared, teacher_path)
    rows = prepared.rows("train")[[0, 5, 1296, 640]]
    ks = np.array([1, 0, 1, 1])
    x, logits, hashes = opened.read(opened.records(rows, ks))
    batch = views.view_batch(prepared.images, opened.geometry, opened.seed, rows, ks)
    views.check_hashes(batch, hashes, rows)
    errors = store.relative_errors(
        teacher.load_tail(teacher_path)(x), teacher.load(teacher_path)(batch)
    )
    assert max(errors.values()) <= 1e-6
    torch.testing.assert_close(
        logits, teacher.load(teacher_path)(batch).logits, rtol=1e-5, atol=1e-5
    )


def test_records_of_one_write_batch_are_bit_identical_to_the_live_teacher(
    features, prepared, teacher_path
):
    opened, live = store.Store(features, prepared, teacher_path), teacher.load(teacher_path)
    records = np.arange(64)
    rows, ks = prepared.rows("train")[records // 2], records % 2
    batch = views.view_batch(prepared.images, opened.geometry, opened.seed, rows, ks)
    assert torch.equal(opened.read(records)[0], live.block_input(batch))


def test_a_half_precision_store_states_an_error_below_its_gate(prepared, teacher_path, tmp_path):
    manifest = write(prepared, teacher_path, tmp_path, dtype="float16")
    assert set(manifest["error"]) == {"q", "k", "v", "h", "logits"}
    assert 0 < max(manifest["error"].values()) <= 5e-4
    assert manifest["bytes_per_view"] < 65 * 32 * 2 + 200
    found = store.verify(tmp_path / "store", prepared, teacher_path, 32)
    assert max(found.values()) <= 5e-4


def test_an_error_over_the_gate_is_not_published(prepared, teacher_path, tmp_path, monkeypatch):
    monkeypatch.setitem(store.ERROR_GATE, "float16", 1e-9)
    with pytest.raises(GateFailed, match="float16 changes .* its gate is 1e-09"):
        write(prepared, teacher_path, tmp_path, dtype="float16")
    assert not (tmp_path / "store").exists()


def test_mode_off_writes_the_policy_and_no_record(prepared, teacher_path, tmp_path):
    manifest = write(prepared, teacher_path, tmp_path, mode="off")
    assert manifest["records"] == 0 and manifest["shards"] == []
    assert not store.Store(tmp_path / "store", prepared, teacher_path).cached


def test_a_killed_write_goes_on_and_gives_the_same_bytes(
    features, prepared, teacher_path, tmp_path
):
    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done > 1300:
            raise Killed

    cache = store.Cache(dtype="float32", views=2, shard_mb=9)
    live = teacher.load(teacher_path)
    out, work = tmp_path / "store", tmp_path / "work"
    with pytest.raises(Killed):
        store.write(cache, prepared, live, out, work, kill)
    assert not out.exists()
    kept = {p.name: p.stat().st_mtime_ns for p in work.rglob("*.safetensors")}
    assert kept
    store.write(cache, prepared, live, out, work, lambda _: None)
    for path in features.iterdir():
        assert files.sha256(path) == files.sha256(out / path.name)
    assert {n: (out / n).stat().st_mtime_ns for n in kept} == kept


def test_a_second_writer_of_the_same_store_is_refused(
    prepared, teacher_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(store.runtime, "PATIENCE", 0.0)

    def intrude(_: int) -> None:
        with pytest.raises(UserError, match="another process is writing it"):
            write(prepared, teacher_path, tmp_path)
        raise KeyboardInterrupt

    live = teacher.load(teacher_path)
    with pytest.raises(KeyboardInterrupt):
        cache = store.Cache(views=2, shard_mb=9)
        store.write(cache, prepared, live, tmp_path / "store", tmp_path / "work", intrude)


def test_a_flipped_bit_is_named_and_refused(broken, prepared, teacher_path):
    shard = broken / "shard-00001.safetensors"
    data_ = bytearray(shard.read_bytes())
    data_[5000] ^= 1
    shard.write_bytes(bytes(data_))
    with pytest.raises(UserError, match="shard-00001.safetensors: damaged"):
        store.Store(broken, prepared, teacher_path)


def test_a_truncated_and_a_missing_shard_are_named_and_refused(broken, prepared, teacher_path):
    shard = broken / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="shard-00000.safetensors: damaged"):
        store.Store(broken, prepared, teacher_path)
    shard.unlink()
    with pytest.raises(UserError, match="shard-00000.safetensors: this shard .* is missing"):
        store.Store(broken, prepared, teacher_path)


def test_a_store_of_another_split_is_refused(features, prepared, teacher_path):
    splits = prepared.splits.copy()
    splits[prepared.rows("test")[0]] = "train"
    with pytest.raises(UserError, match="stale feature store: order was"):
        store.Store(features, replace(prepared, splits=splits), teacher_path)


def test_shards_of_another_size_are_not_gone_on_with(features, prepared, teacher_path, tmp_path):
    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done > 1300:
            raise Killed

    live = teacher.load(teacher_path)
    args = (prepared, live, tmp_path / "store", tmp_path / "work")
    with pytest.raises(Killed):
        store.write(store.Cache(dtype="float32", views=2, shard_mb=9), *args, kill)
    manifest = store.write(
        store.Cache(dtype="float32", views=2, shard_mb=20), *args, lambda _: None
    )
    assert manifest["records"] == 2594
    assert max(store.verify(tmp_path / "store", prepared, teacher_path, 64).values()) <= 1e-6


def test_a_full_disk_is_one_line_and_publishes_nothing(
    prepared, teacher_path, tmp_path, monkeypatch
):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(UserError, match="No space left on device.*free space"):
        write(prepared, teacher_path, tmp_path)
    assert not (tmp_path / "store").exists()


def test_the_statistics_of_h_are_taken_over_all_classes(prepared, teacher_path, monkeypatch):
    seen: list[int] = []
    exact = views.view_batch

    def spy(images, geometry, seed, rows, ks):
        seen.extend(rows)
        return exact(images, geometry, seed, rows, ks)

    order = np.argsort(prepared.labels, kind="stable")  # as an image folder's index is
    by_class = replace(
        prepared,
        images=np.asarray(prepared.images)[order],
        labels=prepared.labels[order],
        splits=prepared.splits[order],
    )
    monkeypatch.setattr(store.views, "view_batch", spy)
    live = teacher.load(teacher_path)
    store._statistics(store.Cache(), by_class, live, by_class.rows("train"))
    assert len(seen) == 512 and set(by_class.labels[seen]) == set(range(10))


@pytest.mark.parametrize(
    "line", ["teacher", "images", "order", "view_backend", "layout", "torch", "timm"]
)
def test_a_stale_store_is_refused_with_the_line_that_differs(line, broken, prepared, teacher_path):
    path = broken / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"][line] = "something else"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"stale feature store: {line} was something else, is "):
        store.Store(broken, prepared, teacher_path)


def test_other_images_make_the_store_stale(features, prepared, teacher_path):
    with pytest.raises(UserError, match="stale feature store: images was"):
        store.Store(features, replace(prepared, images_sha256="0" * 64), teacher_path)


def test_float16_overflow_and_broken_features_are_refused():
    with pytest.raises(UserError, match=r"a feature is 7e\+04, float16 ends at 65504"):
        store._stored(torch.tensor([7e4]), "float16")
    with pytest.raises(UserError, match="features hold nan"):
        store._stored(torch.tensor([float("nan")]), "float32")


def test_plan_refuses_a_disk_that_is_short(prepared, teacher_path, tmp_path, monkeypatch):
    live = teacher.load(teacher_path)
    found = store.plan(store.Cache(views=3), prepared, live, tmp_path / "store")
    assert found["bytes_per_view"] == 65 * 32 * 2 + 48 and found["images"] == 1297
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"needs 0.0 GB, 0.0 GB are free; lower cache.views"):
        store.plan(store.Cache(views=3), prepared, live, tmp_path / "store")


def test_info_and_verify_on_the_command_line(features, digits, teacher_path):
    base = [sys.executable, "-m", "pipeline.store"]
    done = subprocess.run(
        [*base, "info", str(features), "--json"], capture_output=True, text=True, cwd=ROOT
    )
    found = json.loads(done.stdout)
    assert {"bytes_per_view", "views", "records", "dtype", "layout", "fingerprint", "error"} <= set(
        found
    )
    assert found["records"] == 2594 and found["layout"] == "block_input"
    args = ["verify", str(features), "--prepared", str(digits), "--teacher", str(teacher_path)]
    done = subprocess.run([*base, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "relative_error" in done.stdout
    done = subprocess.run([*base, "info", "nowhere"], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "nowhere/manifest.json" in done.stderr
    )


def test_a_missing_index_is_one_line(tmp_path):
    with pytest.raises(UserError, match="index.json: no such file"):
        data.Prepared.open(tmp_path)
