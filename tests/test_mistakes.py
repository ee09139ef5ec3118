"""Every mistake of a user is one line on stderr, with what, got, allowed and what to do, and exit 2."""

from __future__ import annotations

import os
import runpy
import sys

import pytest
from PIL import Image
from ruamel.yaml import YAML

from pipeline.core import artifacts
from pipeline.core.errors import nearest
from tests.house import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runs in this process


@pytest.fixture
def tell(tmp_path, monkeypatch, capsys):
    """`tell("stages.teach", ...)`: a module of ours as a command line -> its one line on stderr, after exit 2."""

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [module, *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        error = capsys.readouterr().err
        assert left.value.code == 2, error
        assert error.count("\n") == 1 and "Traceback" not in error
        return error

    return run


@pytest.fixture
def params(tmp_path):
    """`params({"teach.lr": "fast"})`: the default params.yaml with these keys set, a file."""

    def write(changes=(), drop=None):
        yaml = YAML()
        found = yaml.load(ROOT / "params.yaml")
        for key, value in dict(changes).items():
            *sections, last = key.split(".")
            place = found
            for section in sections:
                place = place[section]
            place[last] = value
        if drop:
            del found[drop]
        yaml.dump(found, tmp_path / "params.yaml")
        return tmp_path / "params.yaml"

    return write


TYPOS = {
    "a section": (
        "distil",
        {"epochs": 3},
        "unknown section 'distil:'; did you mean 'distill'? allowed: prepare, teach, cache, distill,",
    ),
    "a key": (
        "distill.epoch",
        3,
        "distill: unknown key 'epoch'; did you mean 'epochs'? allowed: methods, student,",
    ),
    "a text for a number": ("distill.lr", "fast", "distill.lr: got 'fast'; expected a number"),
    "a value chosen on val, of a key that has none below it": (
        "distill.tuned",
        {"logits": {"lr.peak": 0.1}},
        "distill.tuned.logits: got key 'lr.peak'; expected one of distill, as logits.weight",
    ),
    "a number for a list": ("distill.methods", 3, "distill.methods: got 3; expected a list"),
    "a method": (
        "distill.methods",
        ["plane"],
        "method: got 'plane'; did you mean 'plain'? allowed: plain, control, logits, dkd",
    ),
    "a teacher": (
        "teach.model",
        "vit_tinny_patch16_224",
        "teach.model: got 'vit_tinny_patch16_224'; expected a model of timm {timm}; nearest: vit_tiny_patch16_224",
    ),
    "the beginning of a teacher's name": (
        "teach.model",
        "vit_tiny",
        "teach.model: got 'vit_tiny'; expected a model of timm {timm}; nearest: vit_tiny_patch16_224",
    ),
    "a student": (
        "distill.student",
        "resnet81",
        "distill.student: got 'resnet81'; expected a model of timm {timm}; nearest: resnet18",
    ),
    "a source": ("prepare.source", "digit", "prepare.source: got 'digit'; did you mean 'digits'?"),
    "what to do with broken pictures": (
        "prepare.on_error",
        "ignore",
        "prepare.on_error: got 'ignore'; allowed: stop, skip",
    ),
    "a target": (
        "bench.enabled",
        ["ort-fp23"],
        "bench.enabled: got 'ort-fp23'; did you mean 'ort-fp32'? allowed: torch-eager",
    ),
    "the method that ships": (
        "export.method",
        "cakd+logit",
        "export.method: got 'cakd+logit', which is not in distill.methods; did you mean "
        "'cakd+logits'?",
    ),
    "the target of a budget": (
        "report.budgets",
        {"ort-fp64.wall_ms_max": 1.0},
        "report.budgets: 'ort-fp64.wall_ms_max' names a target that is not in bench.enabled; did you",
    ),
    "another image size": (
        "prepare.image_size",
        64,
        "teach.model: got vit_tiny_patch16_224 for images of 32x32 px; expected 64x64 px, as prepared; set "
        "teach.kwargs.img_size or prepare.image_size",
    ),
    "a teacher of grey images": (
        "teach.kwargs.in_chans",
        1,
        "teach.model: VisionTransformer does not take an RGB image of 32x32 px (",
    ),
    "a teacher without blocks": (
        "teach.kwargs.depth",
        0,
        "teach.model: VisionTransformer: got 0 blocks; expected 1 or more; correct teach.kwargs (depth)",
    ),
    "a teacher that does not pool": (
        "teach.kwargs.global_pool",
        "",
        "teach.model: VisionTransformer: got logits of shape (1, 65, 10) for one image; expected (1, classes)",
    ),
    "a teacher of oblong images": (
        "teach.kwargs.img_size",
        [32, 48],
        "teach.model: got vit_tiny_patch16_224 for images of 32x48 px; expected 32x32 px, as prepared; set",
    ),
    "a student of one stage": (
        "distill.student_kwargs.channels",
        [8],
        "distill.student: ResNet does not take an RGB image of 32 px ('ResNet' object has no attribute",
    ),
    "a student of grey images": (
        "distill.student_kwargs.in_chans",
        1,
        "distill.student: ResNet does not take an RGB image of 32 px (",
    ),
    "a student of another pooling": (
        "distill.student_kwargs.global_pool",
        "",
        "; correct distill.student_kwargs, or set another prepare.image_size",
    ),
    "a teacher of the hub": (
        "teach.model",
        "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k",
        "use the architecture's name ('vit_tiny_patch16_224'?) with its weights as a .safetensors file",
    ),
    "a student of the hub, in its other spelling": (
        "distill.student",
        "hf_hub:timm/resnet18.a1_in1k",
        "distill.student: got 'hf_hub:timm/resnet18.a1_in1k'; expected a model name of timm",
    ),
    "a student of a folder": (
        "distill.student",
        "local-dir:models/mine",
        "distill.student: got 'local-dir:models/mine'; expected a model name of timm",
    ),
    "a patch that does not divide the image": (
        "teach.kwargs.patch_size",
        5,
        "teach.kwargs.patch_size: got 5, which does not divide 32 px; expected one of 2, 4, 8, 16",
    ),
    "a student whose maps are too coarse for the tokens": (
        "distill.student_kwargs",
        {"channels": [8, 12, 16, 24]},
        "distill.student: got ResNet with feature maps",
    ),
    "a tap": (
        "distill.cakd.tap",
        "layer5",
        "distill.cakd.tap: got 'layer5', which ResNet does not have; did you mean 'layer",
    ),
    "a teacher without global attention": (
        "teach",
        {
            "model": "swin_tiny_patch4_window7_224",
            "kwargs": {"img_size": 32, "window_size": 4, "depths": [1, 1, 1, 1]},
        },
        "method: 'cakd' reads the teacher's queries, keys and values (pca), and this one has none for it: it "
        "has no sequence of blocks over one grid of tokens; choose another teacher, or a sum of plain, control",
    ),
}


@pytest.mark.parametrize("mistake", TYPOS)
def test_a_mistake_in_params_yaml_is_told_before_anything_runs(mistake, params, tell):
    import timm

    key, value, message = TYPOS[mistake]
    said = tell("stages.check", "--params", params({key: value}))
    assert message.format(timm=timm.__version__) in said


def test_a_budget_of_a_gain_needs_plain(params, tell):
    changes = {"report.budgets": {"gain_min": 1.0}, "distill.methods": ["logits"]}
    said = tell("stages.check", "--params", params(changes))
    assert "got gain_min, a gain over plain, with distill.methods logits; expected plain" in said


@pytest.mark.parametrize(
    ("key", "where"),
    [("teach.kwargs", "teach.model"), ("distill.student_kwargs", "distill.student")],
)
def test_an_argument_that_a_model_does_not_take_is_told_with_its_key(key, where, params, tell):
    said = tell("stages.check", "--params", params({f"{key}.img_sise": 32}))
    assert f"{where}: cannot create" in said and "'img_sise'" in said
    assert said.endswith(f"; correct {key}\n")


def test_a_missing_section_and_a_missing_file_are_told(params, tell, tmp_path):
    said = tell("stages.check", "--params", params(drop="cache"))
    assert (
        "no section 'cache:'; it has: prepare, teach, distill" in said and "add the section" in said
    )
    said = tell("stages.check", "--params", tmp_path / "none.yaml")
    assert "none.yaml: no such file; run from the repository's root or pass --params" in said


def test_the_default_parameters_are_correct(params, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stages.check", "--params", str(params())])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("stages.check", run_name="__main__", alter_sys=True)
    assert left.value.code == 0 and "tap layer4 4x4 for 8x8 tokens" in capsys.readouterr().out


def pictures(folder, **classes):
    for name, n in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}.png")
    return folder


FOLDERS = {
    "missing": (
        lambda f: None,
        "no such file or folder; expected the folder that holds train/ or the class folders",
    ),
    "one class": (
        lambda f: pictures(f, cat=3),
        "got 1 class folder (cat); expected 2 or more; add another",
    ),
    "no class": (
        lambda f: pictures(f, **{".hidden": 3}),
        "got no class folders and 0 images; expected 2 class folders or more",
    ),
    "an empty class": (
        lambda f: pictures(f, cat=3, dog=0),
        "dog: got a class folder without images; expected .apng, .avif, .bmp, .dib, .gif, .jfif, .jpe, .jpeg, "
        ".jpg, .pbm, .pgm, .png, .pnm, .ppm, .tif, .tiff, .webp; add images or remove the folder",
    ),
    "too few pictures to cut a test split": (
        lambda f: pictures(f, cat=2, dog=2),
        "prepare.test: got 400 of 4 images; expected a stratified split",
    ),
    "a broken picture": (
        lambda f: (pictures(f, cat=3, dog=3) / "dog" / "1.png").write_bytes(b"no"),
        "images/dog/1.png: not a readable image (no format that is read here; it begins with b'no'); repair "
        "or remove it, or set prepare.on_error: skip",
    ),
}


@pytest.mark.parametrize("mistake", FOLDERS)
def test_a_mistake_in_an_image_folder_is_told_and_nothing_is_written(
    mistake, params, tell, tmp_path
):
    make, message = FOLDERS[mistake]
    make(tmp_path / "images")
    file = params({"prepare.source": "imagefolder", "prepare.path": str(tmp_path / "images")})
    assert message in tell("stages.prepare", tmp_path / "out" / "p", "--params", file)
    assert not (tmp_path / "out" / "p").exists()


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("exporters.ov", "openvino", "openvino"),
        ("exporters.trt", "tensorrt_rtx", "trt-rtx"),
        ("stages.prepare", "pyarrow", "parquet"),
    ],
)
def test_a_missing_package_is_told_with_its_extra(
    module, package, extra, params, tell, light, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    argv = [light, "-o", tmp_path / "out"]
    if module == "stages.prepare":
        (tmp_path / "a.parquet").write_bytes(b"")
        source = {"prepare.source": "parquet", "prepare.path": str(tmp_path / "a.parquet")}
        argv = [tmp_path / "out", "--params", params(source)]
    said = tell(module, *argv)
    assert package in said and f"pip install '.[{extra}]'" in said
    assert not (tmp_path / "out").exists()


def test_no_gpu_is_told_where_one_is_needed(tell, light, tmp_path, monkeypatch):
    from exporters.trt import driver, plan

    monkeypatch.setattr(driver, "device", lambda: None)
    monkeypatch.setattr(plan.importlib, "import_module", lambda _: FullTensorRT)
    said = tell("exporters.trt", light, "-o", tmp_path / "a.plan", "--backend", "tensorrt")
    assert "full TensorRT builds on its GPU: no CUDA device; use --backend rtx" in said


class FullTensorRT:
    """What is asked of the package before a GPU is looked for."""

    __version__ = "10.12.0"


@pytest.mark.parametrize("module", ["stages.prepare", "exporters.ov", "exporters.trt"])
def test_an_output_that_cannot_be_written_is_told(module, params, tell, light, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "below" / "out"
    argv = [out, "--params", params()] if module == "stages.prepare" else [light, "-o", out]
    said = tell(module, *argv)
    assert "cannot create its folder (Not a directory); choose a writable path" in said
    assert str(tmp_path / "file") in said


def test_a_read_only_place_is_told(tell, params, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = tell("stages.prepare", tmp_path / "out", "--params", params())
    assert f"the folder {tmp_path} is not writable; choose a writable path" in said


def test_a_disk_that_fills_up_while_writing_is_told(tell, params, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(artifacts, "write_json", full)
    said = tell("stages.prepare", tmp_path / "out", "--params", params())
    assert f"{tmp_path / 'out'}: No space left on device; free space or choose" in said
    assert [p.name for p in tmp_path.iterdir()] == ["params.yaml"]


def test_a_name_that_begins_like_an_allowed_one_is_near_it():
    assert nearest("fine", ["coarse_label", "fine_label"]).startswith("did you mean 'fine_label'?")
    assert nearest("", ["a"]) == "allowed: a"
