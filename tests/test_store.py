"""The feature store: the same numbers as the live teacher, or a refusal that names what is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.core import artifacts
from pipeline.core.atomic import publish
from pipeline.core.errors import GateFailed, UserError
from pipeline.data import views
from pipeline.data.pixels import Squares
from pipeline.data.prepared import Prepared
from pipeline.data.resident import resident
from pipeline.models import checkpoint, probe, teacher
from pipeline.store import dividing, encoding, planning, policy, reading, shards, verifying, writing
from pipeline.store.policy import Cache
from pipeline.store.reading import Store
from pipeline.training import claims, stopwatch
from tests.test_teacher import SMALL, saved


def write(prepared, teacher_path, folder, progress=lambda _: None, **kwargs):
    cache = Cache(**{"views": 2, "shard_mb": 9, **kwargs})
    live = teacher.load(teacher_path)
    return writing.write(cache, prepared, live, folder / "store", folder / "work", progress)


@pytest.fixture
def broken(features, tmp_path):
    return shutil.copytree(features, tmp_path / "store")


def views_of(prepared, opened, records):
    rows, ks = prepared.rows("train")[records // 2], records % 2
    return views.view_batch(prepared.images, opened.geometry, opened.seed, rows, ks, rows), rows, ks


def test_a_float32_record_replays_to_the_live_teachers_tokens(features, prepared, teacher_path):
    opened = Store(features, prepared, teacher_path)
    batch, rows, ks = views_of(prepared, opened, np.array([1, 10, 2593, 1280]))
    found = opened.read(opened.records(rows, ks))
    views.check_hashes(batch, found.view_hash, rows)
    live = teacher.load(teacher_path)(batch)
    errors = encoding.relative_errors(found.tokens(teacher.load_tail(teacher_path)), live)
    assert max(errors.values()) <= 1e-6


def test_records_of_one_write_batch_are_the_live_teachers_bits(features, prepared, teacher_path):
    opened, live = Store(features, prepared, teacher_path), teacher.load(teacher_path)
    batch, *_ = views_of(prepared, opened, np.arange(64))
    x, tokens = live.look(batch)
    found = opened.read(np.arange(64))
    assert torch.equal(found.features["x"], x)
    replayed = found.tokens(teacher.load_tail(teacher_path))
    for part in ("qkv", "h", "logits"):
        assert torch.equal(getattr(replayed, part), getattr(tokens, part)), part


@pytest.mark.parametrize(
    ("dtype", "gate", "bytes_of_x"),
    [
        ("float16", 5e-4, 65 * 32 * 2),
        ("bfloat16", 4e-3, 65 * 32 * 2),
        ("int8", 1.5e-2, 65 * 32 + 128),
    ],
)
def test_a_coarser_store_states_an_error_below_its_gate(
    dtype, gate, bytes_of_x, prepared, teacher_path, tmp_path
):
    manifest = write(prepared, teacher_path, tmp_path, dtype=dtype)
    assert set(manifest["error"]) == {"q", "k", "v", "h", "logits"}
    assert 0 < max(manifest["error"].values()) <= gate
    header = 700 * len(manifest["shards"]) / manifest["records"]
    assert bytes_of_x + 64 <= manifest["bytes_per_view"] <= bytes_of_x + 64 + header
    found = verifying.verify(tmp_path / "store", prepared, teacher_path, 200)
    assert all(0 < f["mean"] <= f["max"] <= gate for n, f in found.items() if n != "logits")


def test_the_qkvh_layout_needs_no_block_and_holds_what_the_teacher_showed(
    prepared, teacher_path, tmp_path
):
    manifest = write(prepared, teacher_path, tmp_path, layout="qkvh", dtype="float32")
    assert max(manifest["error"].values()) == 0
    opened, live = Store(tmp_path / "store", prepared, teacher_path), teacher.load(teacher_path)
    batch, *_ = views_of(prepared, opened, np.arange(64))
    tokens, exact = opened.read(np.arange(64)).tokens(None), live(batch)
    for part in ("qkv", "h", "logits"):
        assert torch.equal(getattr(tokens, part), getattr(exact, part)), part


def test_a_teacher_that_cannot_be_replayed_is_refused_block_input_and_served_by_qkvh(
    prepared, tmp_path
):
    path = tmp_path / "teacher.safetensors"
    saved(path, "vit_small_patch16_rope_mixed_224", SMALL)
    with pytest.raises(
        UserError, match="got block_input for a teacher that cannot be replayed .* set it to qkvh"
    ):
        write(prepared, path, tmp_path)
    for dtype in ("float16", "int8"):
        folder = tmp_path / dtype
        write(prepared, path, folder, layout="qkvh", dtype=dtype, views=1)
        found = verifying.verify(folder / "store", prepared, path, 64)
        assert max(f["max"] for f in found.values()) <= encoding.ERROR_GATE[dtype]


@pytest.mark.parametrize(
    ("dtype", "layout", "most"),
    [
        ("float16", "block_input", 310_000),
        ("int8", "block_input", 160_000),
        ("float16", "logits", 4_016),
    ],
)
def test_a_view_of_vit_base_takes_no_more_than_promised(dtype, layout, most):
    """197 tokens of 768 and the logits of ImageNet."""
    found = probe.TeacherSpec(1, (14, 14), 12, 768, {}, None)
    assert shards.record_bytes(shards.layout_fields(layout, dtype, found, 1000)) <= most


def test_int8_holds_channels_of_very_different_size():
    torch.manual_seed(0)
    x = torch.randn(8, 50, 32) * torch.logspace(-6, 3, 32)
    stored, scale = encoding.encode(x, "int8")
    assert stored.dtype == torch.int8 and scale.shape == (8, 32)
    back = encoding.decode(stored, scale)
    per_channel = (back - x).norm(dim=(0, 1)) / x.norm(dim=(0, 1))
    assert per_channel.max() < 0.008
    assert ((back - x).abs() <= scale[:, None] * 0.5001).all()
    zeros = torch.zeros(2, 3, 4)
    assert torch.equal(encoding.decode(*encoding.encode(zeros, "int8")), zeros)


def test_decoded_features_are_memory_of_their_own():
    for dtype in encoding.DTYPES:
        stored, scale = encoding.encode(torch.ones(2, 3, 4), dtype)
        decoded = encoding.decode(stored, scale)
        stored.zero_()
        assert torch.allclose(decoded, torch.ones(2, 3, 4))


def test_float16_overflow_and_broken_features_are_refused():
    with pytest.raises(
        UserError, match=r"got float16 for a feature of 7e\+04; expected at most 65504"
    ):
        encoding.encode(torch.tensor([[[7e4]]]), "float16")
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"got {value} in the teacher's features"):
            encoding.encode(torch.tensor([[[value]]]), "float32")


def test_an_error_over_the_gate_stops_at_the_first_batch_and_publishes_nothing(
    prepared, teacher_path, tmp_path, monkeypatch
):
    monkeypatch.setitem(encoding.ERROR_GATE, "int8", 1e-9)
    done = []
    with pytest.raises(
        GateFailed, match="in int8: got .*; expected at most 1.0e-09; set cache.dtype: float16"
    ):
        write(prepared, teacher_path, tmp_path, dtype="int8", progress=done.append)
    assert not (tmp_path / "store").exists() and not done


def test_mode_off_writes_the_policy_and_no_record(prepared, teacher_path, tmp_path):
    manifest = write(prepared, teacher_path, tmp_path, mode="off")
    assert manifest["records"] == 0 and manifest["shards"] == []
    assert not Store(tmp_path / "store", prepared, teacher_path).cached
    with pytest.raises(UserError, match="mode off, which has no records"):
        verifying.verify(tmp_path / "store", prepared, teacher_path, 1)


def test_a_batch_read_ahead_is_the_batch_read_now(features, prepared, teacher_path):
    ahead, now = (Store(features, prepared, teacher_path) for _ in range(2))
    draw = np.random.default_rng(0)
    for size in (64, 64, 7, 100):
        records = draw.choice(2594, size, replace=False)
        ahead.prefetch(records)
        first, second = ahead.read(records), now.read(records)
        assert torch.equal(first.features["x"], second.features["x"])
        assert torch.equal(first.logits, second.logits)
        assert (first.view_hash == second.view_hash).all()
    wanted, other = np.arange(5), np.arange(50, 55)
    kept = now.read(other)
    ahead.prefetch(wanted)
    assert torch.equal(ahead.read(other).features["x"], kept.features["x"])
    now.read(wanted)
    assert torch.equal(kept.features["x"], ahead.read(other).features["x"])  # not the buffer itself


def test_a_writing_stopped_anywhere_goes_on_to_the_same_bytes(
    features, prepared, teacher_path, tmp_path
):
    class Stopped(Exception):
        pass

    for stop in (100, 1300, 2300):

        def leave(done: int, stop=stop) -> None:
            if done > stop:
                raise Stopped

        with pytest.raises(Stopped):
            write(prepared, teacher_path, tmp_path, leave, dtype="float32", shard_mb=9)
        assert not (tmp_path / "store").exists()
    begun = []
    write(prepared, teacher_path, tmp_path, begun.append, dtype="float32", shard_mb=9)
    assert begun[0] > 1000, "the shards of the stopped runs were made again"
    names = {p.name for p in features.iterdir()}
    assert {p.name for p in (tmp_path / "store").iterdir()} == names
    for name in names:
        assert (tmp_path / "store" / name).read_bytes() == (features / name).read_bytes(), name


def test_shards_of_another_size_are_not_gone_on_with(features, prepared, teacher_path, tmp_path):
    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done > 1300:
            raise Killed

    with pytest.raises(Killed):
        write(prepared, teacher_path, tmp_path, kill, dtype="float32")
    manifest = write(prepared, teacher_path, tmp_path, dtype="float32", shard_mb=20)
    assert manifest["records"] == 2594
    found = verifying.verify(tmp_path / "store", prepared, teacher_path, 64)
    assert max(f["max"] for f in found.values()) <= 1e-6


def test_a_writer_of_another_store_in_the_same_work_folder_is_refused(
    prepared, teacher_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(claims, "PATIENCE", 0.0)

    def intrude(_: int) -> None:
        with pytest.raises(UserError, match=r"in use by .* \(batch: 64 there, 32 here\)"):
            write(prepared, teacher_path, tmp_path, batch=32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(prepared, teacher_path, tmp_path, intrude)
    write(prepared, teacher_path, tmp_path, batch=32)  # the first one has left


def test_a_process_that_comes_when_all_is_published_writes_nothing(
    prepared, teacher_path, tmp_path
):
    write(prepared, teacher_path, tmp_path)
    again = []
    manifest = write(prepared, teacher_path, tmp_path, again.append)
    assert not again and manifest["records"] == 2594
    shard = tmp_path / "store" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    write(prepared, teacher_path, tmp_path, again.append)
    assert again and verifying.check_bytes(tmp_path / "store")


def test_killed_between_publishing_and_tidying_up_nothing_is_written_again(
    prepared, teacher_path, tmp_path, monkeypatch
):
    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(dividing.Writer, "_finish", kill)
        with pytest.raises(Killed):
            write(prepared, teacher_path, tmp_path)
    published = (tmp_path / "store" / "manifest.json").read_bytes()
    again = []
    write(prepared, teacher_path, tmp_path, again.append)
    assert not again and (tmp_path / "store" / "manifest.json").read_bytes() == published
    assert [path.suffix for path in (tmp_path / "work").iterdir()] == [".receipt"]


@pytest.mark.parametrize("tidied", [True, False])
def test_who_slept_while_another_published_does_not_publish_again(
    tidied, prepared, teacher_path, tmp_path, monkeypatch
):
    """The successor is at work while this process believes to hold the claim to publish."""
    exact = writing.Task.manifest

    def slow(task, folder):
        manifest = exact(task, folder)
        artifacts.write_json(folder / "store" / "manifest.json", manifest)
        publish(folder / "store", tmp_path / "store")
        receipt = folder.with_suffix(".receipt")
        artifacts.write_json(receipt, {"manifest": manifest["sha256"]})
        if tidied:
            claims.dissolve(folder)
        return manifest

    monkeypatch.setattr(writing.Task, "manifest", slow)
    manifest = write(prepared, teacher_path, tmp_path)
    assert verifying.check_bytes(tmp_path / "store") == manifest
    assert len(manifest["shards"]) == 2 and len(list((tmp_path / "store").iterdir())) == 3
    assert len(list((tmp_path / "work").iterdir())) == (1 if tidied else 2)


def test_a_work_folder_that_somebody_removes_is_one_line(
    prepared, teacher_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(claims, "LEASE", 1.0)

    def remove(done: int) -> None:
        if done > 1000:
            shutil.rmtree(tmp_path / "work", ignore_errors=True)

    with pytest.raises(UserError, match="removed while this process wrote into it"):
        write(prepared, teacher_path, tmp_path, remove)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("damage", ["flipped bit", "missing"])
def test_a_shard_of_the_work_folder_that_is_not_whole_is_written_again(
    damage, features, prepared, teacher_path, tmp_path
):
    def leave(done: int) -> None:
        if done > 2300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(prepared, teacher_path, tmp_path, leave, dtype="float32", shard_mb=9)
    shard = next((tmp_path / "work").rglob("shard-00000.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.unlink() if damage == "missing" else shard.write_bytes(data)
    write(prepared, teacher_path, tmp_path, dtype="float32", shard_mb=9)
    for path in features.iterdir():
        assert (tmp_path / "store" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_statistics_of_h_are_taken_over_all_classes(prepared, teacher_path, monkeypatch):
    seen: list[int] = []
    exact = views.view_batch

    def spy(images, geometry, seed, rows, *more):
        seen.extend(rows)
        return exact(images, geometry, seed, rows, *more)

    order = np.argsort(prepared.labels, kind="stable")  # as an image folder's index is
    by_class = replace(
        prepared,
        images=Squares(prepared.images.squares(order)),
        labels=prepared.labels[order],
        splits=prepared.splits[order],
    )
    monkeypatch.setattr(writing.views, "view_batch", spy)
    writing._statistics(
        writing.Task(Cache(), by_class, teacher.load(teacher_path), torch.device("cpu"))
    )
    assert len(seen) == writing.STATISTICS and set(by_class.labels[seen]) == set(range(10))


ASKED = Cache(dtype="float32", views=2, shard_mb=9)


@pytest.mark.parametrize(
    ("line", "now"),
    [
        ("geometry.crop", {"geometry": views.Geometry(crop=(0.5, 1.0))}),
        ("geometry.flip", {"geometry": views.Geometry(flip=False)}),
        ("views", {"views": 3}),
        ("seed", {"seed": 1}),
        ("dtype", {"dtype": "int8"}),
        ("layout", {"layout": "qkvh"}),
    ],
)
def test_another_policy_is_refused_with_its_one_line(line, now, features, prepared, teacher_path):
    Store(features, prepared, teacher_path, ASKED)
    asked = replace(ASKED, **now)
    with pytest.raises(
        UserError, match=f"stale feature cache: {line}: got .*; expected .*; run cache again"
    ):
        Store(features, prepared, teacher_path, asked)


def test_another_backend_or_package_version_is_refused_with_its_one_line(
    features, prepared, teacher_path, monkeypatch
):
    exact = artifacts.versions
    for package in ("torch", "timm"):
        monkeypatch.setattr(artifacts, "versions", lambda p=package: exact() | {p: "0.1"})
        with pytest.raises(
            UserError, match=f"stale .*: version of {package}: got .*; expected 0.1"
        ):
            Store(features, prepared, teacher_path, ASKED)
    monkeypatch.setattr(artifacts, "versions", exact)
    monkeypatch.setattr(views, "BACKEND", "pil-bicubic/1")
    with pytest.raises(UserError, match="view_backend: got torch-grid.*; expected pil-bicubic/1"):
        Store(features, prepared, teacher_path, ASKED)


def test_other_data_is_refused_with_its_one_line(features, prepared, teacher_path):
    with pytest.raises(UserError, match="stale feature cache: images: got"):
        Store(features, replace(prepared, images_sha256="0" * 64), teacher_path)
    splits = prepared.splits.copy()
    splits[prepared.rows("test")[0]] = "train"
    with pytest.raises(UserError, match="stale feature cache: order: got"):
        Store(features, replace(prepared, splits=splits), teacher_path)


def test_one_changed_weight_of_the_teacher_or_its_normalisation_is_refused(
    features, prepared, teacher_path, tmp_path
):
    vit, description = checkpoint.load(teacher_path)
    path = tmp_path / "teacher.safetensors"
    description["preprocess"]["mean"][0] += 0.01
    checkpoint.save(path, vit, description)
    with pytest.raises(UserError, match="stale feature cache: teacher_model: got"):
        Store(features, prepared, path)
    description["preprocess"]["mean"][0] -= 0.01
    vit.head.bias.data[3] += 1e-4
    checkpoint.save(path, vit, description)
    with pytest.raises(UserError, match="stale feature cache: teacher: got"):
        Store(features, prepared, path)


def test_a_manifest_that_someone_edited_is_refused(broken, prepared, teacher_path):
    path = broken / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["h_mean"][0] += 1e-6
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json: damaged: sha256: got"):
        Store(broken, prepared, teacher_path)


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(bytes(content))


def read_all(folder, prepared, teacher_path):
    opened = Store(folder, prepared, teacher_path)
    for start in range(0, 2594, 64):
        opened.read(np.arange(start, min(start + 64, 2594)))


def test_any_flipped_bit_is_named_by_verify_and_refused_by_reading(
    features, broken, prepared, teacher_path
):
    name = "shard-00001.safetensors"
    size, draw = (broken / name).stat().st_size, np.random.default_rng(0)
    spots = [0, 9, 200, *draw.integers(600, size, 8), size - 1]  # header length, header, fields
    for at in map(int, spots):
        flip(broken / name, at, int(draw.integers(8)))
        with pytest.raises(UserError, match=f"{name}: damaged"):
            verifying.check_bytes(broken)
        with pytest.raises(UserError, match=f"{name}: damaged"):
            read_all(broken, prepared, teacher_path)
        shutil.copyfile(features / name, broken / name)
    read_all(broken, prepared, teacher_path)


def test_logits_are_read_and_checked_without_the_features(
    features, broken, prepared, teacher_path, monkeypatch
):
    numbers = np.arange(600, 664)
    whole = Store(features, prepared, teacher_path)
    answers = Store(features, prepared, teacher_path, features=False)
    assert whole.replayed and not answers.replayed
    read, exact = set(), shards.Shard.read

    def spy(shard, name, *args):
        read.add(name)
        exact(shard, name, *args)

    monkeypatch.setattr(shards.Shard, "read", spy)
    outputs = answers.read(numbers).tokens(None)
    assert read == {"logits", "view_hash", "checksum"} and outputs.h is None
    assert torch.equal(outputs.logits, whole.read(numbers).logits)
    monkeypatch.undo()
    records = whole.manifest["shards"][0]["records"]
    with safe_open(broken / "shard-00000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"x", *read, "features_checksum"}
    tensors = load_file(broken / "shard-00000.safetensors")
    for name in ("x", "logits"):
        tensor = tensors[name].clone()
        tensor[records - 1].view(-1)[0] += 1
        save_file(tensors | {name: tensor}, broken / "shard-00000.safetensors")
        for features_too in (True, False):
            opened = Store(broken, prepared, teacher_path, features=features_too)
            if name == "x" and not features_too:
                opened.read(np.arange(records))
                continue
            label = "features_checksum" if name == "x" else "checksum"
            with pytest.raises(UserError, match=f"record {records - 1}: {label}: got"):
                opened.read(np.arange(records))


def test_a_store_of_logits_alone_gives_the_same_student_and_refuses_other_methods(
    prepared, teacher_path, tmp_path
):
    from pipeline.distill.trainer import build, train_step
    from tests.test_training import QUICK

    weights = []
    for layout in ("block_input", "logits"):
        write(prepared, teacher_path, tmp_path / layout, layout=layout, views=1, dtype="float32")
        store = tmp_path / layout / "store"
        trainer = build(QUICK, "logits", prepared, teacher_path, store)
        for step in range(3):
            train_step(trainer, step, stopwatch.Stopwatch())
        weights.append(torch.cat([p.detach().flatten() for p in trainer.student.parameters()]))
    assert torch.equal(*weights)
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["bytes_per_view"] < 100 and set(manifest["error"]) == {"logits"}
    errors = verifying.verify(store, prepared, teacher_path, 64)
    assert set(errors) == {"logits"}
    with pytest.raises(
        UserError, match="'gl', which reads the teacher's tokens, with cache.layout log"
    ):
        build(QUICK, "gl", prepared, teacher_path, store)


def test_a_manifest_of_features_without_their_checksum_is_refused(broken, prepared, teacher_path):
    path = broken / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["fields"]["features_checksum"]
    path.write_text(json.dumps(reading.seal(manifest)))
    with pytest.raises(UserError, match="expected x, features_checksum too; run cache again"):
        Store(broken, prepared, teacher_path)


def test_two_shards_in_each_others_place_are_refused(broken, prepared, teacher_path):
    first, second = (broken / f"shard-0000{n}.safetensors" for n in (0, 1))
    other = first.read_bytes()
    shutil.copyfile(second, first)
    second.write_bytes(other)
    with pytest.raises(
        UserError, match="shard-00000.safetensors: damaged: record 0: checksum: got"
    ):
        read_all(broken, prepared, teacher_path)


def test_a_truncated_or_missing_shard_is_named_and_refused(broken, prepared, teacher_path):
    shard = broken / "shard-00000.safetensors"
    opened = Store(broken, prepared, teacher_path)
    shard.write_bytes(shard.read_bytes()[:-9000])  # while it is being read
    with pytest.raises(UserError, match=r"shard-00000.safetensors: damaged: record \d+: got"):
        for start in range(0, 1024, 64):
            opened.read(np.arange(start, start + 64))
    with pytest.raises(UserError, match="shard-00000.safetensors: damaged: got"):
        Store(broken, prepared, teacher_path)
    shard.unlink()
    with pytest.raises(UserError, match="shard-00000.safetensors: no such file; expected a shard"):
        Store(broken, prepared, teacher_path)


def test_plan_refuses_a_disk_that_is_short(prepared, teacher_path, tmp_path, monkeypatch):
    live = teacher.load(teacher_path)
    args = (Cache(views=3), prepared, live, tmp_path / "store", 0.05)
    found = planning.plan(*args)
    assert found["bytes_per_view"] == 65 * 32 * 2 + 40 + 24 and found["images"] == 1297
    for name in ("disk_write_mb_per_s", "disk_read_mb_per_s", "teacher_img_per_s"):
        assert found[name] > 0, name
    assert found["replay_img_per_s"] > found["teacher_img_per_s"]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    for refused in (lambda: planning.plan(*args), lambda: write(prepared, teacher_path, tmp_path)):
        with pytest.raises(
            UserError, match=r"got 0 MB; expected \d+ MB .*; free space, lower cache.views"
        ):
            refused()


def test_pay_back_is_the_arithmetic_of_the_docs():
    fast = planning.pay_back(4, 1000, 300_000, 1e6, 1e6, teacher_rate=100, replay_rate=1000)
    assert fast["pays_after_epochs"] == pytest.approx(4 * 0.01 / 0.009)
    assert fast["hours_to_write"] == pytest.approx(40 / 3600)
    slow = planning.pay_back(
        1, 1000, 300_000, write=6, read=1e6, teacher_rate=100, replay_rate=1000
    )
    assert slow["pays_after_epochs"] == pytest.approx(0.05 / 0.009)
    loses = planning.pay_back(
        1, 1000, 300_000, write=1e6, read=20, teacher_rate=100, replay_rate=1000
    )
    assert loses["pays_after_epochs"] is None


def test_layouts_and_fingerprint_speak_of_every_key_of_the_policy(prepared, teacher_path):
    marks = policy.fingerprint(Cache(), prepared, checkpoint.describe(teacher_path))
    named = {line.split(".")[0] for line in marks}
    assert {"views", "seed", "layout", "dtype", "geometry"} <= named
    assert reading.seal({"a": 1}) == reading.seal(reading.seal({"a": 1}))


def test_a_missing_index_is_one_line(tmp_path):
    with pytest.raises(UserError, match="index.json: no such file"):
        Prepared.open(tmp_path)


def test_an_error_that_is_no_number_is_over_every_gate():
    errors = {"q": 1e-5, "k": 1e-5, "v": 1e-5, "h": 1e-5, "logits": float("nan")}
    with pytest.raises(GateFailed, match="logits in float16: got nan"):
        encoding.check_gate(errors, "float16", "here", "run cache again")


def test_logits_that_are_no_numbers_stop_the_writing(prepared, teacher_path, tmp_path):
    vit, description = checkpoint.load(teacher_path)
    vit.head.bias.data[2] = float("nan")
    path = tmp_path / "teacher.safetensors"
    checkpoint.save(path, vit, description)
    with pytest.raises((UserError, GateFailed), match="nan"):
        write(prepared, path, tmp_path)
    assert not (tmp_path / "store").exists()


def test_a_teacher_of_other_classes_or_another_size_is_refused(
    features, prepared, teacher_path, tmp_path
):
    turned = replace(prepared, classes=prepared.classes[::-1])
    larger = replace(prepared, image_size=64)
    for use in (
        lambda p: Store(features, p, teacher_path),
        lambda p: write(p, teacher_path, tmp_path),
    ):
        with pytest.raises(UserError, match="classes"):
            use(turned)
        with pytest.raises(UserError, match="image size: got 64 px; expected the teacher's 32 px"):
            use(larger)


def test_what_nobody_took_of_a_damaged_read_is_never_handed_out(broken, prepared, teacher_path):
    opened = Store(broken, prepared, teacher_path)
    flip(broken / "shard-00000.safetensors", 5000)
    with pytest.raises(UserError, match="damaged"):
        read_all(broken, prepared, teacher_path)
    bad = np.arange(1024)  # the whole of the shard
    opened.prefetch(bad)
    opened.read(np.arange(1100, 1164))  # drops it, and its error
    with pytest.raises(UserError, match="damaged"):
        opened.read(bad)


def test_more_shards_than_open_files_are_made_room_for_or_refused(monkeypatch):
    asked = []
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(reading.resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(reading.resource, "setrlimit", lambda _, pair: asked.append(pair))
    reading._allow_files(100)
    assert not asked
    reading._allow_files(1540)
    assert asked == [(2 * 1540 + reading.OTHER_FILES, 4096)]
    with pytest.raises(
        UserError, match="limit of 4096; expected .* for 6100 shards; raise cache.shard_mb"
    ):
        reading._allow_files(6100)


def test_every_step_takes_what_the_step_before_it_began_to_read(features, prepared, teacher_path):
    from pipeline.distill.trainer import build, train_step
    from tests.test_training import QUICK

    trainer = build(QUICK, "logits", prepared, teacher_path, features)
    reader, begun = trainer.feed.features.store._reader, []
    exact = reader.begin
    reader.begin = lambda records: (begun.append(records), exact(records))
    for step in range(5):
        train_step(trainer, step, stopwatch.Stopwatch())
    assert len(begun) == 6  # the first batch, and one ahead of each of five steps: never one twice


class Copied:
    """torch.cuda.Event, as far as the reader asks it."""

    waited = 0

    def record(self, stream):
        assert stream == "stream"

    def synchronize(self):
        type(self).waited += 1


def test_the_readers_threads_wait_for_a_copy_before_they_write_again(
    prepared, teacher_path, features, monkeypatch
):
    """The copy to a device is started without a wait, out of the buffers that the next records are read into."""
    monkeypatch.setattr(torch.cuda, "Event", Copied)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "stream")
    store, device = Store(features, prepared, teacher_path), torch.device("meta")
    records = store.records(prepared.rows("train")[:6], [0] * 6)
    read = store.read(records, device)
    assert read.logits.device == device and all(t.device == device for t in read.features.values())
    assert np.array_equal(read.view_hash, store.read(records).view_hash)
    assert Copied.waited == reading.THREADS  # by both threads of the second reading


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_records_read_on_a_gpu_are_those_of_the_cpu(prepared, teacher_path, features):
    store, device = Store(features, prepared, teacher_path), torch.device("cuda")
    rows = prepared.rows("train")
    batches = [store.records(rows[at : at + 64], [0] * 64) for at in range(0, 640, 64)]
    on_gpu = []
    for records, coming in zip(batches, [*batches[1:], batches[0]], strict=True):
        on_gpu.append(store.read(records, device))
        store.prefetch(coming)  # while the copy may still run
    for records, read in zip(batches, on_gpu, strict=True):
        expected = store.read(records)
        assert torch.equal(read.logits.cpu(), expected.logits)
        for name, tensor in expected.features.items():
            assert torch.equal(read.features[name].cpu(), tensor)


def test_a_store_of_views_from_a_gpu_is_read_with_images_that_lie_there(
    prepared, teacher_path, tmp_path, monkeypatch
):
    """Resident images, here on the CPU: views of other images are refused by the line that names them."""
    cache = Cache(dtype="float32", views=1, shard_mb=9)
    images = prepared.rows("train")[:8]
    live = teacher.load(teacher_path)
    here = torch.device("cpu")
    monkeypatch.setattr(writing, "resident_where_it_fits", lambda p, _: resident(p, here))
    writing.write(cache, prepared, live, tmp_path / "s", tmp_path / "w", lambda _: None)
    with pytest.raises(UserError, match="view_backend: got .* on cpu; expected torch-grid-sample"):
        Store(tmp_path / "s", prepared, teacher_path)
    assert (
        reading.as_written(tmp_path / "s", prepared, here) is prepared
    )  # a CPU renders as it does
    store = Store(tmp_path / "s", resident(prepared, here), teacher_path)
    batch = views.view_batch(prepared.images, store.geometry, store.seed, images, [0] * 8, images)
    read = store.read(store.records(images, [0] * 8))
    views.check_hashes(batch, read.view_hash, images)


@pytest.mark.ci
def test_a_training_on_resident_images_needs_no_workers_and_gives_the_same_student(
    prepared, teacher_path, tmp_path, monkeypatch
):
    from pipeline.distill import trainer
    from tests.test_training import QUICK, run

    cache, here, students = Cache(dtype="float32", views=2), torch.device("cpu"), []
    live = teacher.load(teacher_path)
    for name, prepare in (("there", lambda p, *_: resident(p, here)), ("here", lambda p, *_: p)):
        folder = tmp_path / name
        monkeypatch.setattr(writing, "resident_where_it_fits", prepare)
        monkeypatch.setattr(trainer, "as_written", lambda _, p, device, f=prepare: f(p))
        writing.write(cache, prepared, live, folder / "s", folder / "w", lambda _: None)
        config = replace(QUICK, workers=2 if name == "there" else 0)
        run(config, "cakd+logits", prepared, teacher_path, folder / "s", folder)
        students.append(load_file(folder / "cakd+logits" / "student.safetensors"))
    assert all(torch.equal(students[0][k], students[1][k]) for k in students[1])
