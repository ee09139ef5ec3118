"""The benchmarks run, on small sizes: what they print is asked for by people, not by this test."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import onnx
import pytest

from benchmarks import exporters, latency, methods, runs, store
from exporters.artifact import counts, inputs
from exporters.ort import session
from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.evaluate import accuracy, corruptions


def test_a_cached_step_is_held_against_the_same_step_online(tmp_path, capsys):
    line = f"--folder {tmp_path} --out {tmp_path}/out step --teacher test_vit --student test_resnet"
    sizes = "--size 160 --batch 4 --images 20 --turns 2 --workers 0"
    args = store.parser().parse_args([*line.split(), *sizes.split()])
    store.main(args)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["first_loss_relative_difference"]["tokens"] <= 4 * found["manifest_error"]
    assert set(found["step_ms"]) == {"cached", "online"} and 0 < found["stall_fraction"] < 1
    text = (tmp_path / "out.md").read_text()
    assert "An online step takes" in text and "An online step takes" in capsys.readouterr().out
    assert "python -m benchmarks.store step --teacher test_vit" in text


def test_differences_are_paired_by_seed_and_their_interval_is_students():
    by_method = {
        name: [
            {"clean": c, "noisy": c / 2, "step_ms": ms}
            for c, ms in zip(clean, (9.0, 10.0, 50.0), strict=True)
        ]
        for name, clean in {"plain": (0.5, 0.7, 0.6), "cakd": (0.52, 0.72, 0.65)}.items()
    }
    found = methods.compared(by_method)
    row = found["cakd"]["clean_minus_plain"]
    assert row["mean"] == pytest.approx(3.0)
    # differences 2, 2, 5: deviation sqrt(3), t with 2 degrees of freedom 4.303, root of 3 seeds
    assert row["half_width_95"] == pytest.approx(4.3027, rel=1e-4)
    assert found["cakd"]["step_over_plain"] == 1.0 and "clean_minus_plain" not in found["plain"]
    assert methods.interval([1.0]) == (1.0, None)  # a single run has none
    # a baseline that is one run for two teachers gives one difference a seed
    assert methods.over_teachers([2.0, 4.0, 1.0, 3.0], 2) == [3.0, 2.0]
    taught = {"clean": 0.55, "noisy": 0.4}
    shown = methods.markdown({"teachers": [taught], "methods": found, "seeds": 3})
    assert shown.startswith("**The teacher is not better than the plain student.**")
    assert "| cakd | 63.0 | +3.0 ± 4.3 |" in shown
    alone = methods.compared({name: rows[:1] for name, rows in by_method.items()})
    single = {"teachers": [taught], "methods": alone, "seeds": 1}
    assert "| cakd | 52.0 | +2.0 |" in methods.markdown(single) and json.dumps(
        single, allow_nan=False
    )


def test_a_finished_run_is_read_and_not_repeated(
    prepared, teacher_path, features, tmp_path, monkeypatch
):
    params = {"evaluate": {}, "teach": {"model": "vit_tiny_patch16_224"}}
    bench = runs.Runs(params, tmp_path)
    (tmp_path / "prepared").symlink_to(prepared.folder)
    (tmp_path / "teacher").symlink_to(teacher_path.parent)
    (tmp_path / "features").symlink_to(features)
    bench.make_shared()  # all there: nothing to do
    from tests.test_training import QUICK

    first = bench.run(QUICK, "plain", 3)
    monkeypatch.setattr(runs.distill, "distill", None)
    assert bench.run(QUICK, "plain", 3) == first
    assert 0 < first["clean"] <= 1 and first["step_ms"] > 0
    otherwise = runs.Runs(params | {"evaluate": {"crop_pct": 0.5}}, tmp_path)
    with pytest.raises(TypeError, match="not callable"):  # made again, by the function taken away
        otherwise.run(QUICK, "plain", 3)


def test_a_teacher_made_from_a_file_that_was_replaced_is_refused(teacher_path, tmp_path):
    weights = tmp_path / "weights.safetensors"
    shutil.copy(teacher_path, weights)
    params = {"teach": {"model": "vit_tiny_patch16_224", "weights": str(weights), "epochs": 0}}
    bench = runs.Runs(params, tmp_path)
    bench.teacher.parent.mkdir()
    made = {"provenance": artifacts.provenance(weights=weights)}
    bench.teacher.write_bytes(b"trained")
    bench.teacher.with_suffix(".json").write_text(json.dumps(made))
    bench.make_teacher()  # there, and of these weights
    weights.write_bytes(b"others")
    with pytest.raises(UserError, match=r"teacher.safetensors: got teach.weights or teach.guide"):
        bench.make_teacher()


@pytest.mark.parametrize(
    "change", ["distill.lr.x=1", "distill.lr.x.y=1", "distill.none.x=1", "distill"]
)
def test_a_change_of_a_key_that_is_none_is_refused(change):
    with pytest.raises(UserError, match=f"-S: got '{change}'; expected key=value"):
        runs.override({"distill": {"lr": 0.1}}, [change])


def test_a_value_that_yaml_cannot_read_is_refused():
    with pytest.raises(UserError, match="expected a value in YAML"):
        runs.value("[1,2")


def test_a_student_goes_through_every_exporter_and_a_refusal_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(exporters, "STUDENTS", {"test_resnet": {"output_stride": 8}})
    monkeypatch.setattr(exporters.trt_convert, "build_plan", refuse)
    line = f"--size 32 --search-seconds 0 --out {tmp_path}/out"
    args = exporters.parser().parse_args(line.split())
    args.students = ["test_resnet"]
    exporters.main(args)
    rows = json.loads((tmp_path / "out.json").read_text())["students"]["test_resnet"]
    assert set(rows) == {f"{r} {p}" for r in ("ort", "ov", "rtx") for p in ("fp32", "fp16", "int8")}
    assert rows["ort fp16"]["verdict"] == "PASS" and rows["ov fp32"]["size_mb"] > 0
    assert rows["ort int8"]["verdict"] in ("PASS", "refused")
    assert rows["rtx fp32"] == {"verdict": "unavailable", "reason": "x.plan: no TensorRT"}
    text = (tmp_path / "out.md").read_text()
    assert "| test_resnet | fp16 | PASS" in text and "unavailable: no TensorRT" in text


def refuse(*_, **__):
    raise exporters.Unavailable("x.plan: no TensorRT")


def pooled(path):
    """An ONNX file with a pooling of 8 channels and a convolution behind it."""
    h = onnx.helper
    weights = {
        "a": np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32),
        "b": np.random.default_rng(1).standard_normal((4, 8, 1, 1)).astype(np.float32),
    }
    nodes = [
        h.make_node("Conv", ["image", "a"], ["map"], pads=[1] * 4),
        h.make_node("MaxPool", ["map"], ["less"], kernel_shape=[2, 2], strides=[2, 2]),
        h.make_node("Conv", ["less", "b"], ["maps"]),
        h.make_node("GlobalAveragePool", ["maps"], ["logits"]),
    ]
    shapes = {"image": ["n", 3, 16, 16], "logits": ["n", 4, 1, 1]}
    ends = [h.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v) for k, v in shapes.items()]
    held = [onnx.numpy_helper.from_array(w, name) for name, w in weights.items()]
    made = h.make_graph(nodes, "net", ends[:1], ends[1:], held)
    opsets = [h.make_opsetid("", 18)]
    onnx.save(h.make_model(made, opset_imports=opsets, ir_version=10), path)
    return path


def test_a_slower_network_costs_a_known_layer_more_and_answers_alike(tmp_path):
    source = pooled(tmp_path / "net.onnx")
    more = latency.slower(source, tmp_path / "more.onnx", (2, 3))
    added = 8 * 8 * (8 * 8 * 2 * 3)  # places, then channels in, channels out, kernel
    assert counts.count_model(more).macs == counts.count_model(source).macs + added
    x = inputs.smooth(4, 16, 16)
    a, b = (session.OrtSession(path, 1).run(x) for path in (source, more))
    assert np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_the_verdicts_under_load_are_counted_and_the_medians_of_both_tools_divided():
    run = {"seconds": 20.0, "comparisons": [{"ratio": {"median": 1.15}, "rounds": 8}]}
    row = {"macs_ratio": 1.2, "quiet_ratio": 1.14, "runs": [run, run], "verdicts": {"FAIL": 2}}
    turns = zip(
        latency.TOOLS, ([10.0, 12.0, 11.0], [9.0, 9.0, 9.0], [10.0, 10.0, 11.0]), strict=True
    )
    peers = {"resnet18": latency._peer(dict(turns))}
    shown = latency.table({"gate": {"about 15 % slower": row}, "peers": peers})
    assert "| about 15 % slower | 1.200 | 1.140 | 2 | 2 | 0 | 0 | 1.150 | 20 |" in shown
    assert "| resnet18 | 1.100 (1.000) | 0.900 (0.900) | 3 |" in shown


def test_every_core_is_loaded_for_the_time_of_the_block_and_no_longer():
    with latency.load(True) as burning:
        assert [process.poll() for process in burning] == [None] * (os.cpu_count() or 1)
    assert all(process.poll() is not None for process in burning)
    with latency.load(False) as burning:
        assert burning == []


def test_noise_that_is_kept_is_the_noise_that_is_drawn(prepared, tmp_path):
    settings = accuracy.Evaluate(split="val")
    kept = runs.KeptNoise(tmp_path, prepared, settings)
    rows = accuracy.labelled_rows(prepared, settings)[[3, 1, 7]]
    ids = tuple(prepared.sha256[row] for row in rows)
    images = prepared.images.squares(rows)
    for _ in range(2):
        for kind in ("jpeg", "lines"):
            expected = corruptions.noisy(images, ids, kind, 0)
            assert np.array_equal(kept(images, ids, kind, 0), expected)
    other = runs.KeptNoise(tmp_path, prepared, accuracy.Evaluate(split="val", seed=1))
    assert other.folder != kept.folder
