"""Odd and hostile ONNX files through every exporter: done, or one line that names the file; nothing left over."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters.artifact import onnx_file
from exporters.artifact.precision import precision_path
from exporters.ort import __main__ as ort_command
from exporters.ort.session import OrtSession
from exporters.ov import __main__ as ov_command
from exporters.ov import convert, session
from exporters.parity import __main__ as parity_command
from exporters.trt import __main__ as trt_command
from pipeline.core import cli
from pipeline.core.errors import UserError
from tests import hostile

Outcome = tuple[int, str, str]
Attempt = Callable[..., Outcome]

TOOLS: dict[str, tuple[Any, Callable[[Path, Path], list[object]]]] = {
    "ort": (ort_command, lambda path, out: [path, out / "made.onnx"]),
    "ort fp16": (ort_command, lambda path, out: [path, out / "made.onnx", "--precision", "fp16"]),
    "ov": (ov_command, lambda path, out: [path, "-o", out]),
    "trt": (trt_command, lambda path, out: [path, "-o", out / "made.plan", "--backend", "rtx"]),
    "parity": (parity_command, lambda path, out: [path, path]),
    "layers": (parity_command, lambda path, out: [path, path, "--layers"]),
}
NEEDS = {"ov": "openvino", "trt": "tensorrt_rtx"}
REFUSED = {  # case -> what every tool says of it
    "fp16 input": "inputs: got image tensor\\(float16\\); expected one float32 image input",
    "free height and width, no size": "axis 2: got a dynamic size .* no image_size in the metadata",
    "free channels": "axis 1: got a dynamic size",
    "two inputs": "inputs: got image tensor\\(float\\), scale tensor\\(float\\); expected one",
    "custom operator": "acme:Frobnicate|1 of its nodes: Frobnicate the_odd_one",
    "custom operator with escapes": "Frob\ufffd\\[31m nicate",
    "external data missing": "not regular file|does not exist",
    "external data above": "points outside|escapes model directory",
    "external data above, missing": "points outside|escapes model directory",
    "external data absolute": "absolute path|Absolute path",
    "external data linked": "symbolic link|escapes model directory",
    "empty file": "not a valid ONNX file|rejects it",
    "text": "not a valid ONNX file|rejects it",
    "json": "not a valid ONNX file|rejects it",
    "zip": "not a valid ONNX file|rejects it",
    "folder": "no such file",
    "binary note": "metadata .*is not UTF-8 text",
    "image_size text": "image_size: got 'abc'; expected 1 to 4096",
    "image_size -1": "image_size: got '-1'",
    "image_size 0": "image_size: got '0'",
    "image_size huge": "image_size: got '1000000000'",
    "image_size endless": "image_size: got '9{40}'",
    "image_size arabic": "image_size: got",
    "image_size other than the input's": "input size: got 8x8 and metadata image_size 16",
    "mean of two": "mean: got '0.5 0.5'; expected 3 finite numbers",
    "mean text": "mean: got 'a b c'",
    "mean nan": "mean: got 'nan 0 0'",
    "std zero": "std: got '0 1 1'; expected 3 finite numbers above 0",
    "std negative": "std: got '1 -1 1'",
    "precision unknown": "precision: got 'fp4096'; did you mean 'fp16'",
    "rank 2": "input shape: got \\[None, 4\\]; expected \\(B, C, H, W\\)",
    "rank unknown": "Field 'shape' of 'type'|input shape: got \\[\\]",
    "channel last": "8 channels; expected 3 \\(RGB\\) or 1 \\(grey\\), in front of height and width",
    "batch zero": "input shape: got \\[0, 3, 8, 8\\]; expected 1 or more on every axis",
    "batch huge": "412,316,860,416 values; expected 134,217,728 at most",
    "side huge": "3,458,764,513,820,540,928 values",
    "integer output": "first output: got tensor\\(int64\\) .*; expected floating-point logits",
    "scalar output": "first output: got tensor\\(float\\) \\[\\]",
    "classes first": "first output: got tensor\\(float\\) \\[5, None\\] for a batch of any size",
    "nothing": "without nodes|rejects it",
    "no opset": "opset_import|rejects it",
    "ir of tomorrow": "ir_version|rejects it",
    "no suffix": "no such file|got suffix ''|expected two .onnx files",
}
UNLIKE = {  # where the tools differ by right: (case, tool) -> what it says, None where it is done
    ("no node", "parity"): "first output: got float32 .*; expected floating-point logits",
    ("no node", "ov"): "without nodes",
    ("no node", "ort"): "without nodes",
    ("no node", "ort fp16"): "without nodes",
    ("no node", "trt"): "without nodes",
    ("no node", "layers"): "without nodes",
    ("opset of tomorrow", "trt"): None,
    **{("opset of tomorrow", t): "rejects it" for t in TOOLS if t != "trt"},
}


@pytest.fixture
def attempt(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """`attempt(tool, path, out)` -> exit code, stdout, stderr: the command line, in this process."""

    def run(tool: str, path: Path, out: Path) -> Outcome:
        if tool in NEEDS and importlib.util.find_spec(NEEDS[tool]) is None:
            pytest.skip(f"{NEEDS[tool]} is not installed")
        module, argv = TOOLS[tool]
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(module.main, module.parser(), [str(word) for word in argv(path, out)])
        told = capfd.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


def places(folder: Path) -> tuple[Path, Path]:
    for name in ("in", "out"):
        (folder / name).mkdir()
    return folder / "in", folder / "out"


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def held_to_the_rule(outcome: Outcome, path: Path, out: Path) -> None:
    """Done in silence, or one line that names the file and leaves nothing; never something unfinished."""
    code, _, err = outcome
    assert code in (0, 2), err
    if code:
        assert err.count("\n") == 1 and path.name in err and err.rstrip("\n").isprintable(), err
        assert everything(out) == []
    else:
        assert err == "" and not [n for n in everything(out) if n.startswith(".")]


def matrix(cases: list[Any]) -> list[Any]:
    """Every case with every tool; in `make test` with one of them, in turn."""
    tools = list(TOOLS)
    return [
        pytest.param(case, tool, marks=() if tools[i % len(tools)] == tool else pytest.mark.ci)
        for i, case in enumerate(cases)
        for tool in tools
    ]


@pytest.mark.parametrize("case", hostile.CASES)
def test_a_file_is_read_or_refused_in_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    path = hostile.CASES[case](tmp_path)
    try:
        OrtSession(path, 1)
    except UserError as error:
        assert case in REFUSED or case in {c for c, _ in UNLIKE}, error
        joined = " ".join(str(error).split())  # as the command line does
        words = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in joined)
        assert path.name in words
        assert re.search(REFUSED.get(case, "rejects it|got a graph without nodes"), words), words
    else:
        assert case not in REFUSED or case == "no suffix"  # a reader takes any name


@pytest.mark.parametrize(("case", "tool"), matrix([c for c in hostile.CASES if c != "nan weights"]))
def test_a_file_is_converted_or_refused_in_one_line_that_names_it(
    case: str, tool: str, attempt: Attempt, tmp_path: Path
) -> None:
    home, out = places(tmp_path)
    path = hostile.CASES[case](home)
    before = everything(home)
    outcome = attempt(tool, path, out)
    held_to_the_rule(outcome, path, out)
    said = UNLIKE.get((case, tool), REFUSED.get(case))
    assert outcome[0] == (0 if said is None else 2), outcome[2]
    assert said is None or re.search(said, outcome[2]), outcome[2]
    assert everything(home) == before


@pytest.mark.parametrize(("part", "tool"), matrix(list(range(1, 16))))
def test_a_truncated_file_is_refused(
    part: int, tool: str, attempt: Attempt, tmp_path: Path
) -> None:
    home, out = places(tmp_path)
    path = hostile.CASES["plain"](home)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * part // 16])
    outcome = attempt(tool, path, out)
    held_to_the_rule(outcome, path, out)
    assert outcome[0] == 2


def ir(folder: Path) -> Path:
    pytest.importorskip("openvino", reason="the openvino extra is not installed")
    convert.write_ir(hostile.CASES["plain"](folder), folder / "net.xml")
    return folder / "net.xml"


IRS: dict[str, tuple[Callable[[str], bytes], str]] = {
    **{
        f"cut at {i}/8": (lambda t, i=i: t[: len(t) * i // 8].encode(), "rejects")
        for i in range(1, 8)
    },
    "empty": (lambda t: b"", "no <net>"),
    "binary": (lambda t: b"\xff\xfe\x00" * 99, "no <net>"),
    "another document": (lambda t: b"<html></html>", "no <net>"),
    "image_size text": (
        lambda t: t.replace('size value="8"', 'size value="x"').encode(),
        "got 'x'",
    ),
}


@pytest.mark.parametrize("case", IRS)
def test_a_damaged_ir_is_refused_in_one_line(case: str, attempt: Attempt, tmp_path: Path) -> None:
    path = ir(tmp_path)
    change, said = IRS[case]
    path.write_bytes(change(path.read_text()))
    code, _, err = attempt("parity", path, tmp_path)
    assert code == 2 and err.count("\n") == 1 and path.name in err and said in err, err


def test_an_ir_whose_weights_are_cut_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    path = ir(tmp_path)
    weights = path.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:100])
    code, _, err = attempt("parity", path, tmp_path)
    assert code == 2 and err.count("\n") == 1 and "Incorrect weights" in err


def test_an_ir_with_a_foreign_note_of_our_name_has_no_notes(tmp_path: Path) -> None:
    path = ir(tmp_path)
    text = re.sub(r"<cakd>.*?</cakd>", '<cakd value="x" />', path.read_text(), flags=re.DOTALL)
    path.write_text(text)
    assert session.OvSession(path, 1, "fp32").metadata == {}


@pytest.mark.parametrize("tool", ["ort", "ov", "trt"])
def test_weights_that_are_not_finite_have_no_int8(
    tool: str, digits: Path, attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, out = places(tmp_path)
    module, argv = TOOLS[tool]
    more = ["--precision", "int8", "--calib", digits]
    monkeypatch.setitem(TOOLS, tool, (module, lambda p, o: [*argv(p, o), *more]))
    path = hostile.CASES["nan weights"](home)
    outcome = attempt(tool, path, out)
    held_to_the_rule(outcome, path, out)
    assert outcome[0] == 2 and "got NaN or infinity for the images of " in outcome[2]
    assert "int8 needs finite outputs" in outcome[2]


@pytest.mark.parametrize("tool", ["ort", "ort fp16", "ov"])
def test_weights_that_are_not_finite_fail_the_gate_and_nothing_is_written(
    tool: str, attempt: Attempt, tmp_path: Path
) -> None:
    home, out = places(tmp_path)
    code, _, err = attempt(tool, hostile.CASES["nan weights"](home), out)
    assert code == 3 and err.count("\n") == 1 and "NaN or infinity; not written" in err
    assert everything(out) == []


def test_weights_that_are_not_finite_agree_with_nothing(attempt: Attempt, tmp_path: Path) -> None:
    home, out = places(tmp_path)
    path = hostile.CASES["nan weights"](home)
    code, _, err = attempt("parity", path, out)
    assert code == 3 and "net.onnx does not compute" in err and err.count("\n") == 1


@pytest.mark.parametrize("tool", ["ort", "ort fp16", "trt"])
def test_a_network_beyond_two_gigabytes_is_refused_and_nothing_is_left(
    tool: str, attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, out = places(tmp_path)
    monkeypatch.setattr(onnx_file, "MAX_PROTO_BYTES", 100)
    code, _, err = attempt(tool, hostile.CASES["plain"](home), out)
    assert code == 2 and "holds 2 GB at most" in err and err.count("\n") == 1
    assert everything(out) == []


@pytest.mark.parametrize("case", ["external data", "external data in a folder"])
def test_external_weights_end_up_inside_what_is_written(
    case: str, attempt: Attempt, tmp_path: Path
) -> None:
    home, out = places(tmp_path)
    path = hostile.CASES[case](home)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    before = OrtSession(path, 1).run(x)
    assert attempt("ort", path, out)[0] == 0
    assert everything(out) == ["made.onnx"]
    np.testing.assert_array_equal(OrtSession(out / "made.onnx", 1).run(x), before)


@pytest.mark.parametrize("case", ["classes hostile", "control characters in a note", "huge note"])
def test_notes_are_carried_as_they_are(case: str, attempt: Attempt, tmp_path: Path) -> None:
    home, out = places(tmp_path)
    path = hostile.CASES[case](home)
    assert attempt("ort fp16", path, out)[0] == 0
    (made,) = out.iterdir()
    kept = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert onnx_file.read_metadata(onnx.load(made)) == {**kept, "precision": "fp16"}


@pytest.mark.parametrize(
    "case",
    [
        *("plain", "fp16 input"),
        *(
            pytest.param(c, marks=pytest.mark.ci)
            for c in ("external data above", "image_size text")
        ),
    ],
)
def test_the_bench_measures_it_or_says_why_not(
    case: str, tmp_path: Path, command: Callable[..., Any]
) -> None:
    path = hostile.CASES[case](tmp_path)
    done = command("exporters.bench", path, "--rounds", "1", "--seconds", "0.02", torch=False)
    if case == "plain":
        assert done.returncode == 0 and done.stderr == "", done.stderr
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert path.name in done.stderr and re.search(REFUSED[case], done.stderr)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_layers_compare_a_network_with_its_copy_of_either_precision(
    precision: str, exported: Path, attempt: Attempt, tmp_path: Path
) -> None:
    source, made = exported / "student.onnx", tmp_path / "made.onnx"
    with pytest.raises(SystemExit) as ended:
        argv = [str(source), str(made), "--precision", precision]
        cli.run(ort_command.main, ort_command.parser(), argv)
    assert not ended.value.code
    with pytest.raises(SystemExit) as ended:
        other = precision_path(made, precision)
        cli.run(parity_command.main, parity_command.parser(), [str(source), str(other), "--layers"])
    assert not ended.value.code


def test_layers_find_the_node_where_an_fp16_copy_went_wrong(
    exported: Path, damaged: Path, attempt: Attempt, tmp_path: Path, capfd: Any
) -> None:
    made = tmp_path / "made.onnx"
    with pytest.raises(SystemExit):
        cli.run(
            ort_command.main, ort_command.parser(), [str(damaged), str(made), "--precision", "fp16"]
        )
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        pair = [str(exported / "student.onnx"), str(precision_path(made, "fp16"))]
        cli.run(parity_command.main, parity_command.parser(), [*pair, "--layers"])
    told = capfd.readouterr().out
    gemm = next(n for n in onnx.load(damaged).graph.node if n.op_type == "Gemm")
    assert not ended.value.code and ", 1 below 35 dB" in told and gemm.output[0] in told
