"""`python -m pipeline.store plan | verify | info`: tables for people, JSON for machines, one line a mistake."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pipeline.store import overconfidence


@pytest.fixture
def store(command, features, digits, teacher_path, tmp_path):
    """`store("info", ...)`: the command on a copy of the features, with the chain's other paths given."""
    folder = shutil.copytree(features, tmp_path / "features")
    (tmp_path / "params.yaml").write_text("cache:\n  dtype: int8\n  views: 2\n")
    paths = ["--prepared", digits, "--teacher", teacher_path]

    def run(name, *more, at=folder, real=False):
        given = {
            "info": [],
            "verify": paths,
            "plan": [*paths, "--params", tmp_path / "params.yaml"],
        }
        return command("pipeline.store", name, at, *given[name], *more, real=real)

    run.folder = folder
    return run


def test_info_says_what_is_in_a_store(store):
    found = json.loads(store("info", "--json").stdout)
    assert found["records"] == 2594 and found["layout"] == "block_input" and found["shards"] == 3
    assert {"mode", "dtype", "views", "images", "bytes_per_view", "error", "fingerprint"} <= set(
        found
    )
    logits = np.concatenate(
        [load_file(p)["logits"] for p in sorted(store.folder.glob("*.safetensors"))]
    ).astype(float)
    first, second = np.sort(logits, axis=1)[:, :-3:-1].T
    assert found["r12"]["views"] == (second > 0).sum()
    ratio = (first / second)[second > 0].mean()
    assert found["r12"]["mean"] == pytest.approx(ratio) and found["r12"]["mean"] > 1
    shown = store("info").stdout
    assert "R12 of the teacher" in shown
    assert "bytes per view" in shown and "geometry.crop" in shown and "version of torch" in shown


def test_r12_is_the_mean_ratio_of_the_two_largest_logits_where_the_second_is_above_0():
    shards = [
        overconfidence.ratios(torch.tensor([[1.0, 4.0, 2.0], [9.0, 3.0, -5.0]])),
        overconfidence.ratios(torch.tensor([[5.0, -1.0, -2.0], [6.0, 6.0, 0.0], [5.0, 0.0, 0.0]])),
    ]
    found = overconfidence.r12({"ratios": shard} for shard in shards)
    assert found == {"mean": pytest.approx((2 + 3 + 1) / 3), "views": 3}
    assert overconfidence.r12([]) is None


def test_verify_tells_the_largest_and_the_mean_error_of_every_tensor(store):
    done = store("verify", "-n", "100", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["relative_error"]
    assert set(found) == {"q", "k", "v", "h", "logits"}
    assert all(0 <= e["mean"] <= e["max"] <= 1e-6 for e in found.values())
    assert "relative error" in store("verify").stdout
    refused = store("verify", "-n", "0")
    assert refused.returncode == 2 and "-n: got 0; expected 1 record or more" in refused.stderr


def test_verify_and_info_name_the_shard_with_a_flipped_bit(store):
    shard = store.folder / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 128
    shard.write_bytes(bytes(content))
    for name in ("info", "verify"):
        done = store(name)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"{shard}: damaged: SHA-256: got" in done.stderr


def test_verify_leaves_with_3_where_the_store_is_not_the_teachers(store):
    """Whole and sealed, but of other numbers."""
    import torch
    from safetensors.torch import load_file, save_file

    from pipeline.core import artifacts
    from pipeline.store import reading, shards

    path = store.folder / "manifest.json"
    manifest, first = json.loads(path.read_text()), 0
    for entry in manifest["shards"]:
        shard = store.folder / entry["file"]
        tensors = load_file(shard)
        del tensors["checksum"], tensors["features_checksum"]
        tensors["x"] += 0.01 * torch.randn_like(tensors["x"])
        save_file(tensors | shards.checksums(tensors, first), shard)
        entry["sha256"] = artifacts.sha256(shard)
        first += entry["records"]
    path.write_text(json.dumps(reading.seal(manifest)))
    done = store("verify")
    assert (
        done.returncode == 3
        and "in float32: got" in done.stderr
        and "expected at most 1.0e-06" in done.stderr
    )


def test_plan_measures_the_disk_and_the_teacher_and_says_when_it_pays(store, tmp_path):
    done = store("plan", "--seconds", "0.1", "--json", at=tmp_path / "new" / "features")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes_per_view"] == 65 * 32 + 4 * 32 + 40 + 24
    assert found["total_gb"] == pytest.approx(2594 * found["bytes_per_view"] / 1e9)
    rate = found["bytes_per_view"] * found["teacher_img_per_s"] / 1e9
    assert found["needed_gb_per_s"] == pytest.approx(rate)
    assert found["disk_read_mb_per_s"] > 0 and found["disk_write_mb_per_s"] > 0
    assert found["pays_after_epochs"] is None or found["pays_after_epochs"] > 2
    shown = store("plan", "--seconds", "0.1").stdout
    assert "disk speed below which the teacher is faster (GB/s)" in shown


def test_a_store_that_is_not_there_is_one_line(store):
    done = store("info", at="nowhere", real=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "nowhere/manifest.json: no such file" in done.stderr
