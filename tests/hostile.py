"""Odd and hostile ONNX files, each made small and from nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPE = ["batch", 3, 8, 8]
NOTES = {"image_size": "8", "mean": "0.5 0.5 0.5", "std": "0.2 0.2 0.2"}


def weights(seed: int = 0) -> list[onnx.TensorProto]:
    """A 3x3 convolution to 4 channels and a classifier of 5 classes, unit scale."""
    draw = np.random.default_rng(seed).standard_normal
    return [
        numpy_helper.from_array(draw((4, 3, 3, 3)).astype(np.float32), "conv.w"),
        numpy_helper.from_array(draw((4, 5)).astype(np.float32), "fc.w"),
    ]


def nodes() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Conv", ["image", "conv.w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "fc.w"], ["logits"], "fc"),
    ]


def value(name: str, shape: Sequence[Any], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    body: Sequence[onnx.NodeProto] | None = None,
    *,
    taken: Sequence[onnx.ValueInfoProto] | None = None,
    made: Sequence[onnx.ValueInfoProto] | None = None,
    held: Sequence[onnx.TensorProto] | None = None,
    opset: int = 18,
    ir: int = 10,
    notes: dict[str, str] | None = None,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """The small classifier (B, 3, 8, 8) -> (B, 5) with whatever is to be odd about it."""
    graph = helper.make_graph(
        nodes() if body is None else body,
        "net",
        [value("image", SHAPE)] if taken is None else taken,
        [value("logits", ["batch", 5])] if made is None else made,
        weights() if held is None else held,
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    built = helper.make_model(graph, opset_imports=opsets, ir_version=ir)
    helper.set_model_props(built, NOTES if notes is None else notes)
    return built


def save(built: onnx.ModelProto, folder: Path, name: str = "net.onnx") -> Path:
    path = folder / name
    path.write_bytes(built.SerializeToString())
    return path


def with_notes(**notes: str) -> Callable[[Path], Path]:
    return lambda folder: save(model(notes={**NOTES, **notes}), folder)


def of(**odd: Any) -> Callable[[Path], Path]:
    return lambda folder: save(model(**odd), folder)


def external(location: str, present: bool = True) -> Callable[[Path], Path]:
    """conv.w lies in another file, `location` from the model's folder; that file is there and right."""

    def make(folder: Path) -> Path:
        home = folder / "model"
        home.mkdir()
        built = model()
        tensor = built.graph.initializer[0]
        target = home / location
        if present:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location
        return save(built, home)

    return make


def linked(folder: Path) -> Path:
    """Weights that are a symbolic link to a file outside the model's folder."""
    path = external("w.bin")(folder)
    outside = folder / "outside.bin"
    (path.parent / "w.bin").rename(outside)
    (path.parent / "w.bin").symlink_to(outside)
    return path


def absolute(folder: Path) -> Path:
    return external(str(folder / "elsewhere.bin"))(folder)


def written(data: bytes, name: str = "net.onnx") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def folder_as_file(folder: Path) -> Path:
    (folder / "net.onnx").mkdir()
    return folder / "net.onnx"


def binary_note(folder: Path) -> Path:
    """A note whose bytes are no UTF-8, as only another tool can write it."""
    data = model(notes={**NOTES, "blob": "@@@@"}).SerializeToString()
    (folder / "net.onnx").write_bytes(data.replace(b"@@@@", b"\xff\xfe\x00\x80"))
    return folder / "net.onnx"


def twelve_outputs() -> onnx.ModelProto:
    body = nodes() + [
        helper.make_node("Identity", ["logits"], [f"o{i}"], f"i{i}") for i in range(11)
    ]
    made = [value("logits", ["batch", 5]), *(value(f"o{i}", ["batch", 5]) for i in range(11))]
    return model(body, made=made)


def two_inputs() -> onnx.ModelProto:
    body = [*nodes()[:-1], helper.make_node("Mul", ["f", "scale"], ["g"], "mul")]
    body += [helper.make_node("MatMul", ["g", "fc.w"], ["logits"], "fc")]
    return model(body, taken=[value("image", SHAPE), value("scale", [1])])


def half_input() -> onnx.ModelProto:
    body = nodes()
    body[0].input[0] = "wide"
    cast = helper.make_node("Cast", ["image"], ["wide"], "cast", to=TensorProto.FLOAT)
    return model([cast, *body], taken=[value("image", SHAPE, TensorProto.FLOAT16)])


def renamed(image: str, node: str) -> onnx.ModelProto:
    body = nodes()
    body[0].input[0] = image
    for i, one in enumerate(body):
        one.name = f"{node}{i}"
    return model(body, taken=[value(image, SHAPE)])


def custom(operator: str, name: str) -> onnx.ModelProto:
    body = nodes()
    body[1] = helper.make_node(operator, ["c"], ["r"], name, domain="acme")
    return model(body, domains=["acme"])


def indices() -> onnx.ModelProto:
    body = nodes()
    body[-1].output[0] = "l"
    body += [helper.make_node("ArgMax", ["l"], ["logits"], "top", axis=1)]
    return model(body, made=[value("logits", ["batch", 1], TensorProto.INT64)])


def scalar() -> onnx.ModelProto:
    body = nodes()
    body[-1].output[0] = "l"
    body += [helper.make_node("ReduceMean", ["l"], ["logits"], "mean", keepdims=0)]
    return model(body, made=[value("logits", [])])


def transposed() -> onnx.ModelProto:
    """Its rows are the classes: (5, B)."""
    body = nodes()
    body[-1].output[0] = "l"
    body += [helper.make_node("Transpose", ["l"], ["logits"], "t", perm=[1, 0])]
    return model(body, made=[value("logits", [5, "batch"])])


def not_finite() -> onnx.ModelProto:
    held = weights()
    held[0].CopyFrom(numpy_helper.from_array(np.full((4, 3, 3, 3), np.nan, np.float32), "conv.w"))
    return model(held=held)


def flat_input() -> onnx.ModelProto:
    body = [helper.make_node("MatMul", ["image", "fc.w"], ["logits"], "fc")]
    return model(body, taken=[value("image", ["batch", 4])])


def channel_last() -> onnx.ModelProto:
    body = nodes()
    body[0].input[0] = "first"
    turn = helper.make_node("Transpose", ["image"], ["first"], "turn", perm=[0, 3, 1, 2])
    return model([turn, *body], taken=[value("image", ["batch", 8, 8, 3])])


def weights_as_inputs() -> onnx.ModelProto:
    """IR 3, as old exporters wrote it: every weight is an input too, and the image comes last."""
    listed = [value(w.name, w.dims) for w in weights()]
    return model(taken=[*listed, value("image", SHAPE)], ir=3, opset=9)


def empty() -> onnx.ModelProto:
    return model([], held=[], made=[value("image", SHAPE)])


def nothing() -> onnx.ModelProto:
    return model([], held=[], made=[], taken=[])


def of_opset(version: int) -> onnx.ModelProto:
    """Opset 7 to 12 hold no ReduceMean with axes as an input; the body is valid in each."""
    return model(opset=version, ir=4 if version < 13 else 10)


FREE = ["n", 3, "h", "w"]
CASES: dict[str, Callable[[Path], Path]] = {
    "plain": of(),
    "fp16 input": lambda f: save(half_input(), f),
    "weights as inputs": lambda f: save(weights_as_inputs(), f),
    "free height and width, size noted": of(taken=[value("image", FREE)]),
    "free height and width, no size": of(taken=[value("image", FREE)], notes={}),
    "free channels": of(taken=[value("image", ["n", "c", 8, 8])]),
    "twelve outputs": lambda f: save(twelve_outputs(), f),
    "two inputs": lambda f: save(two_inputs(), f),
    "custom operator": lambda f: save(custom("Frobnicate", "the_odd_one"), f),
    "custom operator with escapes": lambda f: save(custom("Frob\x1b[31m\nnicate", "\x07odd"), f),
    "external data": external("w.bin"),
    "external data in a folder": external("below/w.bin"),
    "external data missing": external("w.bin", present=False),
    "external data above": external("../../etc/x"),
    "external data above, missing": external("../../etc/x", present=False),
    "external data absolute": absolute,
    "external data linked": linked,
    "dotted names": lambda f: save(renamed("a.b/c:0", "x.y/"), f),
    "unicode names": lambda f: save(renamed("画像\U0001f600", "nœud-é"), f),
    "names with escapes": lambda f: save(renamed("a\x1b[31m\nb", "\t\x07"), f),
    "unicode file name": lambda f: save(model(), f, "mod\u00e8le \u753b.onnx"),
    "empty file": written(b""),
    "text": written(b"this is no network\n" * 50),
    "json": written(b'{"graph": []}'),
    "zip": written(b"PK\x03\x04" + bytes(64)),
    "folder": folder_as_file,
    "huge note": with_notes(extra="x" * (8 << 20)),
    "binary note": binary_note,
    "control characters in a note": with_notes(extra="\x00\x1b[2J\n\r"),
    "image_size text": with_notes(image_size="abc"),
    "image_size -1": with_notes(image_size="-1"),
    "image_size 0": with_notes(image_size="0"),
    "image_size huge": with_notes(image_size=str(10**9)),
    "image_size endless": with_notes(image_size="9" * 6000),
    "image_size arabic": with_notes(image_size="\u0668"),
    "image_size other than the input's": with_notes(image_size="16"),
    "mean of two": with_notes(mean="0.5 0.5"),
    "mean text": with_notes(mean="a b c"),
    "mean nan": with_notes(mean="nan 0 0"),
    "std zero": with_notes(std="0 1 1"),
    "std negative": with_notes(std="1 -1 1"),
    "classes hostile": with_notes(classes="<script>alert(1)</script>\n\n&\u2028\n"),
    "precision unknown": with_notes(precision="fp4096"),
    "rank 2": lambda f: save(flat_input(), f),
    "rank unknown": of(taken=[helper.make_tensor_value_info("image", TensorProto.FLOAT, None)]),
    "channel last": lambda f: save(channel_last(), f),
    "fixed batch": of(taken=[value("image", [2, 3, 8, 8])], made=[value("logits", [2, 5])]),
    "batch zero": of(taken=[value("image", [0, 3, 8, 8])], made=[value("logits", [0, 5])]),
    "batch huge": of(taken=[value("image", [2**31, 3, 8, 8])], made=[value("logits", [2**31, 5])]),
    "side huge": of(taken=[value("image", ["n", 3, 2**30, 2**30])]),
    "integer output": lambda f: save(indices(), f),
    "scalar output": lambda f: save(scalar(), f),
    "classes first": lambda f: save(transposed(), f),
    "no node": lambda f: save(empty(), f),
    "nothing": lambda f: save(nothing(), f),
    "no opset": lambda f: save(_without_opset(), f),
    "nan weights": lambda f: save(not_finite(), f),
    **{f"opset {n}": lambda f, n=n: save(of_opset(n), f) for n in range(7, 22)},
    "opset of tomorrow": of(opset=999),
    "ir of tomorrow": of(ir=9999),
    "no suffix": lambda f: save(model(), f, "net"),
}


def _without_opset() -> onnx.ModelProto:
    built = model()
    del built.opset_import[:]
    return built
