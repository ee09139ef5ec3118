"""Any input is done or refused in one line with exit code 2, and never leaves a half-written output.

Each test takes a few inputs in `make test`, more in `make test-ci` and hundreds in `make test-all`; how many ran,
and how they ended, is printed: `pytest -rP -m slow tests/test_fuzz.py`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from pipeline.core import artifacts
from pipeline.data.images import SUFFIXES
from pipeline.data.prepared import Prepared
from pipeline.models import checkpoint, teacher
from pipeline.prepare.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.store import policy, reading, writing
from tests import containers, fuzz, hostile
from tests.accidents import UNCOUNTED
from tests.house import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")


def sizes(few, full):
    """A third of the few in `make test`, the few in `make test-ci`, all in `make test-all`."""
    return pytest.mark.parametrize(
        "examples",
        [
            max(4, few // 3),
            pytest.param(few, marks=pytest.mark.ci),
            pytest.param(full, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        ],
    )


def tell(what: str, ends: Counter) -> None:
    """Print how many inputs ran."""
    print(f"{what}: {ends.total()} inputs, {ends[0]} done, {ends[2]} refused")


def noise(n, side=8, seed=0):
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(n)]


def class_folders(root, counts):
    for name, n in counts.items():
        (root / name).mkdir(parents=True)
        for i, picture in enumerate(noise(n, seed=len(name) + n)):
            picture.save(root / name / f"{i}.png")
    return root


VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything the commands read, of 24 pictures of 8 px: images, prepared, teacher, store."""
    root = tmp_path_factory.mktemp("world")
    class_folders(root / "images", {"cat": 12, "dog": 12})
    config = Prepare("imagefolder", str(root / "images"), image_size=8, val=4, test=4)
    prepare(config, root / "prepared")
    torch.manual_seed(0)
    vit = checkpoint.create("vit_tiny_patch16_224", VIT, 2)
    description = {
        "model": "vit_tiny_patch16_224",
        "kwargs": VIT,
        "num_classes": 2,
        "classes": ["cat", "dog"],
        "preprocess": checkpoint.preprocessing(vit, 8),
        "role": "teacher",
    }
    checkpoint.save(root / "teacher.safetensors", vit, description)
    writing.write(
        policy.Cache(dtype="float32", views=2, batch=8, shard_mb=1),
        Prepared.open(root / "prepared"),
        teacher.load(root / "teacher.safetensors"),
        root / "store",
        root / "work",
        lambda _: None,
    )
    return root


BASE = {
    "prepare": {"source": "digits", "image_size": 32},
    "teach": {"model": "test_vit", "kwargs": {"img_size": 32, "patch_size": 4}},
    "cache": {"views": 2, "geometry": {"crop": [0.7, 1.2]}},
    "distill": {
        "methods": ["plain", "cakd"],
        "student": "test_resnet",
        "student_kwargs": {"channels": [8, 12, 16, 24], "output_stride": 8},
        "cakd": {"tap": "auto", "trans": {"noise": 0.1}},
        "terms": {"crd": {"width": 128}},
        "compute": {"device": "auto"},
    },
    "evaluate": {"split": "test"},
    "export": {"method": "cakd"},
    "build": {"trt_shapes": [1, 1, 8]},
    "bench": {"enabled": ["ort-fp32"], "threads": [1]},
    "report": {"title": "A", "budgets": {"size_mb_max": 1.0}},
}
SMALL = [
    "0",
    "1",
    "2",
    "0.5",
    "1e-3",
    "auto",
    "null",
    "true",
    "[]",
    "{}",
    "all",
    "'on'",
    "[1, 1, 1]",
]
TRICKS = [
    *("&a [*a]", "&a {x: *a}", "*nowhere", "{<<: 3}", "{<<: *nowhere}", "{<<: [1, 2]}"),
    *(
        "2001-13-45",
        "2001-01-01",
        "2001-01-01T99:99:99",
        "12:30:45",
        "0o17",
        "0o9",
        "0x1F",
        "1_000",
    ),
    *(".inf", "-.inf", ".nan", "1e999", "9" * 5000, "-" + "9" * 400, "0b2", "~", "''", "!!null x"),
    *(
        "!!int x",
        "!!float x",
        "!!bool maybe",
        "!!timestamp x",
        "!!binary 'no base 64'",
        "!!set {a}",
    ),
    *(
        "!!omap [a: 1]",
        "!!python/object:os.system x",
        "!!python/name:os.system",
        "!mine x",
        "!!map x",
    ),
    *(
        "{? [a] : b}",
        "{1: 2}",
        "{~: 1}",
        "{true: 1}",
        "{2001-01-01: 1}",
        "{a: 1, a: 2}",
        "[" * 3000,
    ),
    *(
        '"\\ud800"',
        '"\\x00"',
        '"\\e[31m"',
        "'a\n  b'",
        "|\n  x",
        "@",
        "`",
        "%",
        "- - -",
        ": :",
        "{",
        "]",
    ),
    *(
        "x" * 100_000,
        "[" + "1," * 100_000 + "1]",
        "yes",
        "on",
        "null",
        "!!str 3",
        "!!seq {}",
        "é",
        "\u2028",
    ),
]
FILES = [
    *(
        b"",
        b"\n",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xff\xfe\x00",
        b"\x00",
        b"- 1",
        b"3",
        b"---\na: 1\n---\nb: 2",
    ),
    *(
        b"%YAML 9.9\n---\na: 1",
        b"%YAML 1.1\n---\na: on",
        b"%TAG ! tag:x,2000:\n---\n!x y",
        b"\xe9: 1",
        b"\t",
        b"a:\tb",
    ),
    *(
        b"prepare: &a {x: *a}",
        b"? [a]\n: b",
        b"1: 2",
        b"? ? ?",
        b"a" * 10**6,
        b"[" * 10**5,
    ),
    *(
        b"prepare: *a",
        b"...",
        b"---",
        b"# nothing",
        b"\xf0\x9f\x98\x80: 1",
        b"prepare:\n- source: digits",
    ),
]
PLACES = [
    (section, key, *inner)
    for section, keys in BASE.items()
    for key, value in keys.items()
    for inner in [(), *([(k,) for k in value] if isinstance(value, dict) else [])]
]
KEYS = {  # defaults of the dataclasses that BASE does not set
    "prepare": ("path", "label_column", "student_labels", "val", "test", "on_error", "seed"),
    "teach": (
        "weights",
        "epochs",
        "batch",
        "lr",
        "weight_decay",
        "label_smoothing",
        "geometry",
        "seed",
    ),
    "cache": ("mode", "layout", "dtype", "batch", "shard_mb", "seed", "device"),
    "distill": ("steps", "batch", "lr", "labelled_share", "seed", "workers", "logits"),
    "evaluate": ("seed",),
    "export": ("opset", "reference_images", "calibration_images"),
    "build": ("fp32_rel", "int8_calibration", "int8_search_s"),
    "bench": ("rounds", "seconds_per_row"),
}
PLACES += [(section, key) for section, keys in KEYS.items() for key in keys]


def with_values(changes):
    """BASE as YAML, with texts of YAML in some of its places."""
    found = json.loads(json.dumps(BASE))
    texts = {}
    for i, (where, text) in enumerate(changes):
        place = found
        for key in where[:-1]:
            place = place.setdefault(key, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[where[-1]] = f"<{i}>"
            texts[f'"<{i}>"'] = text
    lines = "\n".join(f"{section}: {json.dumps(keys)}" for section, keys in found.items()) + "\n"
    for mark, text in texts.items():
        lines = lines.replace(mark, text)
    return lines.encode("utf-8", "surrogatepass")


def yaml_of(value):
    """JSON is YAML, but for what JSON has no word for."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(PLACES),
        st.sampled_from(SMALL) | st.sampled_from(TRICKS) | fuzz.VALUES.map(yaml_of),
    ),
    min_size=1,
    max_size=2,
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1")
PARAMS = st.one_of(
    CHANGES.map(with_values),
    st.sampled_from(FILES),
    fuzz.DAMAGE.map(lambda d: fuzz.damaged(with_values([]), d)),
    st.sampled_from(ENCODINGS).map(lambda e: with_values([]).decode().encode(e)),
    st.binary(max_size=60),
)


@sizes(30, 600)
def test_any_params_yaml_is_checked_in_one_line(examples, tmp_path):
    file = tmp_path / "params.yaml"

    def attempt(data):
        file.write_bytes(data)
        return fuzz.run("stages.check", "--params", file)

    tell("params.yaml", fuzz.many(examples, PARAMS, attempt))


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width, height, pixels=b""):
    """A PNG that says it is this large and holds these bytes of compressed pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(pixels, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


PICTURE = noise(1, 12)[0]
GOOD = [
    saved(PICTURE, "PNG"),
    saved(PICTURE, "JPEG"),
    saved(PICTURE, "WEBP"),
    saved(PICTURE, "GIF"),
    saved(PICTURE, "BMP"),
    saved(PICTURE, "TIFF"),
    saved(PICTURE, "TIFF", compression="tiff_lzw"),
    saved(PICTURE.convert("P"), "PNG", transparency=3),
    saved(PICTURE.convert("LA"), "PNG"),
    saved(PICTURE.convert("CMYK"), "JPEG"),
    saved(
        PICTURE,
        "JPEG",
        exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06",
    ),
    saved(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
    *(
        saved(PICTURE, kind)
        for kind in ("PPM", "TGA", "EPS", "ICO", "PCX", "SGI", "PDF", "JPEG2000")
    ),
]
ODD = [
    *(
        b"",
        b"\x00",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"BM",
        b"II*\x00",
        b"RIFF....WEBPVP8 ",
    ),
    saved(Image.new("RGB", (1, 1)), "PNG"),
    saved(Image.new("1", (1, 30_000)), "PNG"),
    saved(Image.new("1", (30_000, 1)), "PNG"),
    png(2**31 - 1, 1),
    png(30_000, 30_000),
    png(12_000, 9_000),  # above Pillow's warning, below its error
    png(0, 0),
    png(100, 100, bytes(50)),
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n",
]
PICTURES = st.one_of(
    st.tuples(st.sampled_from(GOOD), fuzz.DAMAGE).map(lambda pair: fuzz.damaged(*pair)),
    st.sampled_from(ODD),
    st.binary(max_size=80),
    st.sampled_from(GOOD),
)
SUFFIX = st.sampled_from(sorted(SUFFIXES) + [".PNG", ".JPG"])


def prepare_line(root, **keys):
    """The command line that prepares `root / "images"` as class folders."""
    base = {"source": "imagefolder", "path": str(root / "images"), "image_size": 8}
    section = {**base, "val": 2, "test": 2, **keys}
    (root / "params.yaml").write_text(json.dumps({"prepare": section}))
    return ["stages.prepare", root / "prepared", "--params", root / "params.yaml"]


@sizes(40, 700)
def test_any_bytes_as_a_picture_are_decoded_or_named(examples, tmp_path):
    place = class_folders(tmp_path / "images", {"cat": 4, "dog": 4}) / "cat"
    (tmp_path / "outs").mkdir()

    def attempt(case):
        data, suffix, on_error = case
        (place / f"odd{suffix}").write_bytes(data)
        line = prepare_line(tmp_path, on_error=on_error)
        line[1] = tmp_path / "outs" / "prepared"
        try:
            code = fuzz.run(*line)
            fuzz.whole_or_absent(line[1], code)
            if on_error == "skip":
                assert code == fuzz.DONE
            return code
        finally:
            (place / f"odd{suffix}").unlink()
            shutil.rmtree(line[1], ignore_errors=True)

    cases = st.tuples(PICTURES, SUFFIX, st.sampled_from(["stop", "skip"]))
    tell("pictures", fuzz.many(examples, cases, attempt))


NAMES = st.one_of(
    st.sampled_from(
        [
            *(
                "cat",
                "a b",
                "-rf",
                "--params",
                ".hidden",
                "unlabelled",
                "train",
                "val",
                "test",
                "é",
                "画像",
                "\U0001f600",
            ),
            *(
                "a\nb",
                "a\tb",
                "a\rb",
                "\x1b[31m",
                "<script>",
                "a|b",
                "a&b",
                "'",
                '"',
                "\\",
                "x" * 200,
                "nan",
                "-1",
            ),
            *(
                "\udcff",
                "a\u2028b",
                "\u202egpj",
                "%s",
                "{}",
                "$x$",
                "`x`",
                "1",
                "01",
                "con",
                "a.png",
                "*",
                "?",
                "[a]",
            ),
        ]
    ),
    st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=8).filter(
        lambda n: n not in (".", "..")
    ),
)
USUAL = st.sampled_from(
    ["cat", "dog", "a b", "画像", "\U0001f600", "<script>", "-rf", "a|b", "*", "1"]
)
COUNTS = st.one_of(
    st.dictionaries(USUAL, st.integers(8, 30), min_size=2, max_size=4),
    st.dictionaries(USUAL | NAMES, st.sampled_from([8, 9, 30, 3, 2, 1, 0]), max_size=4),
)
LINKS = ("loop", "up", "fifo", "dangling", "folder.png", "device", "deep", "nothing")


def populate(root, counts, link, split):
    """Class folders of these names and sizes, and something odd among them."""
    root.mkdir()
    at = root / split if split else root
    for name, n in counts.items():
        (at / name).mkdir(parents=True)
        for i in range(n):
            suffix = (".png", "\n.png", " é.PNG")[i % 3]
            (at / name / f"{i}{suffix}").write_bytes(TINY[i % len(TINY)])
    place = next((p for p in at.iterdir() if p.is_dir()), root) if at.exists() else root
    odd = place / "odd.png"
    if link == "loop":
        odd.symlink_to(odd)
    elif link == "up":
        (place / "up").symlink_to(root)
    elif link == "fifo":
        os.mkfifo(odd)
    elif link == "dangling":
        odd.symlink_to("nowhere")
    elif link == "folder.png":
        odd.mkdir()
    elif link == "device":
        odd.symlink_to("/dev/zero")
    elif link == "deep":
        (place / "/".join("d" * 60)).mkdir(parents=True)


ODD_KEYS = [
    *(("val", v) for v in (0.5, 0.999, 1, 3, 1.5, 1e300, 1e-300)),
    *(("test", v) for v in (0.1, 0.5, 1, 2.5)),
    *(("student_labels", v) for v in (1, 5, 10**9)),
    *(("seed", v) for v in (1, -1, 2**32, 2**70)),
    *(("image_size", v) for v in (9, 64, 4097, 2**63)),
    ("on_error", "skip"),
]
TINY = [saved(p, "PNG") for p in noise(30, 8, seed=3)]


@sizes(30, 400)
def test_any_tree_of_folders_is_prepared_or_refused(examples, tmp_path):
    def attempt(case):
        counts, link, split, keys = case
        root = tmp_path / "a b"
        root.mkdir()
        try:
            populate(root / "images", counts, link, split)
            line = prepare_line(root, **keys)
            code = fuzz.run(*line)
            fuzz.whole_or_absent(root / "prepared", code)
            return code
        finally:
            shutil.rmtree(root)

    keys = st.sampled_from([*[{"val": 0.2, "test": 0.2}] * 4, *({k: v} for k, v in ODD_KEYS)])
    split = st.sampled_from(["", "train", "", "train", "", "val", "unlabelled"])
    cases = st.tuples(COUNTS, st.sampled_from(LINKS), split, keys)
    tell("folders", fuzz.many(examples, cases, attempt))


@pytest.mark.parametrize(
    ("counts", "held_out"),
    [({f"class {i:04d}": 4 for i in range(1000)}, 1000), ({"few": 4, "many": 400}, 100)],
    ids=["1,000 classes", "1 to 100"],
)
def test_many_classes_and_unequal_ones_are_prepared(counts, held_out, tmp_path):
    for name, n in counts.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(TINY[i % len(TINY)])
    line = prepare_line(tmp_path, val=held_out, test=held_out)
    assert fuzz.run(*line) == fuzz.DONE
    assert set(Prepared.open(tmp_path / "prepared").labels) == set(range(len(counts)))


def teaching(prepared, tmp_path):
    """A call that teaches on that folder and gives the exit code, once what it leaves is seen to be whole."""
    params = {"model": "vit_tiny_patch16_224", "kwargs": VIT, "epochs": 1, "batch": 8}
    (tmp_path / "params.yaml").write_text(json.dumps({"teach": params}))
    out = tmp_path / "outs" / "teacher"
    out.parent.mkdir()
    line = ["stages.teach", prepared, out, "--work", tmp_path / "work"]

    def teach():
        code = fuzz.run(*line, "--params", tmp_path / "params.yaml")
        fuzz.whole_or_absent(out, code)
        shutil.rmtree(out, ignore_errors=True)
        return code

    return teach


@sizes(25, 350)
def test_any_index_json_is_opened_or_refused(examples, world, tmp_path):
    folder = shutil.copytree(world / "prepared", tmp_path / "prepared")
    index = json.loads((folder / "index.json").read_bytes())
    teach = teaching(folder, tmp_path)

    def attempt(data):
        (folder / "index.json").write_bytes(data)
        return teach()

    whole = json.dumps(index).encode()
    documents = fuzz.edited(index, "schema", "images_sha256").map(lambda d: json.dumps(d).encode())
    spoilt = fuzz.DAMAGE.map(lambda d: fuzz.damaged(whole, d)) | st.sampled_from(FILES)
    cases = st.one_of(documents, documents, documents, spoilt)
    tell("index.json", fuzz.many(examples, cases, attempt))


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@sizes(15, 150)
def test_any_images_npy_is_opened_or_refused(examples, world, tmp_path):
    """With its right hash in index.json, as somebody would do who means harm."""
    folder = shutil.copytree(world / "prepared", tmp_path / "prepared")
    index = json.loads((folder / "index.json").read_bytes())
    whole = (folder / "images.npy").read_bytes()
    pixels = np.load(folder / "images.npy")
    teach = teaching(folder, tmp_path)

    def attempt(data):
        (folder / "images.npy").write_bytes(data)
        hashed = {**index, "images_sha256": artifacts.sha256(folder / "images.npy")}
        (folder / "index.json").write_text(json.dumps(hashed))
        return teach()

    arrays = [
        *(
            pixels[:-1],
            pixels[:, :7],
            pixels[..., :1],
            pixels.astype(np.float32),
            pixels.astype(">i2"),
        ),
        *(
            pixels.reshape(-1),
            np.array(3),
            np.array([{"a": 1}], dtype=object),
            pixels[:0],
            np.zeros(3, "U5"),
        ),
        *(np.asfortranarray(pixels), np.zeros(24, [("a", "u1")]), pixels.astype(bool)),
    ]
    head = fuzz.DAMAGE.map(lambda d: fuzz.damaged(whole[:128], d) + whole[128:])
    cases = head | st.sampled_from([npy(a) for a in arrays]) | st.binary(max_size=40)
    tell("images.npy", fuzz.many(examples, cases, attempt))


def head_of(path):
    """The JSON at the head of a safetensors file, and what follows it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_head(head, rest, length=None):
    text = json.dumps(head).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + rest


@sizes(25, 350)
def test_any_store_is_read_or_refused(examples, world, tmp_path):
    """Manifests are sealed again, as somebody would do who means harm."""
    manifest = json.loads((world / "store" / "manifest.json").read_bytes())
    shard = manifest["shards"][0]["file"]
    whole = (world / "store" / shard).read_bytes()
    teacher_path = world / "teacher.safetensors"

    def attempt(case):
        kind, what = case
        store = shutil.copytree(world / "store", tmp_path / "store")
        try:
            if kind == "shard":
                (store / shard).write_bytes(what)
                entry = {"bytes": len(what), "sha256": artifacts.sha256(store / shard)}
                edited = {
                    **manifest,
                    "shards": [{**manifest["shards"][0], **entry}, *manifest["shards"][1:]],
                }
                (store / "manifest.json").write_text(json.dumps(reading.seal(edited)))
            elif kind == "sealed":
                sealed = reading.seal(what) if isinstance(what, dict) else what
                (store / "manifest.json").write_text(json.dumps(sealed))
            elif kind == "manifest":
                (store / "manifest.json").write_bytes(what)
            elif kind == "extra":
                (store / "more.safetensors").write_bytes(what)
            line = [
                "verify",
                store,
                "--prepared",
                world / "prepared",
                "--teacher",
                teacher_path,
                "-n",
                4,
            ]
            return max(fuzz.run("pipeline.store", "info", store), fuzz.run("pipeline.store", *line))
        finally:
            shutil.rmtree(store)

    text = json.dumps(manifest).encode()
    head, rest = head_of(world / "store" / shard)
    lengths = st.sampled_from([0, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
    cases = st.one_of(
        fuzz.edited(manifest, "schema").map(lambda m: ("sealed", m)),
        fuzz.edited(manifest["shards"]).map(lambda s: ("sealed", {**manifest, "shards": s})),
        fuzz.edited(head).map(lambda h: ("shard", with_head(h, rest))),
        lengths.map(lambda n: ("shard", with_head(head, rest, n))),
        fuzz.DAMAGE.map(lambda d: ("shard", fuzz.damaged(whole, d))),
        fuzz.DAMAGE.map(lambda d: ("manifest", fuzz.damaged(text, d))),
        st.binary(max_size=40).map(lambda b: ("extra", b)),
    )
    tell("store", fuzz.many(examples, cases, attempt))


@sizes(25, 400)
def test_any_checkpoint_is_loaded_or_refused(examples, world, tmp_path):
    """With its right hash in the JSON beside it, which is the other thing that is spoilt."""
    path = tmp_path / "teacher.safetensors"
    whole = (world / "teacher.safetensors").read_bytes()
    head, rest = head_of(world / "teacher.safetensors")
    description = json.loads((world / "teacher.json").read_bytes())
    out = tmp_path / "outs" / "made.onnx"
    out.parent.mkdir()

    def attempt(case):
        weights, told = case
        path.write_bytes(weights)
        if isinstance(told, dict) and "weights_sha256" in told:
            told = {**told, "weights_sha256": artifacts.sha256(path)}
        path.with_suffix(".json").write_text(json.dumps(told))
        line = [
            "verify",
            world / "store",
            "--prepared",
            world / "prepared",
            "--teacher",
            path,
            "-n",
            4,
        ]
        return fuzz.run("pipeline.store", *line)

    lengths = st.sampled_from([0, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
    weights = st.one_of(
        fuzz.edited(head).map(lambda h: with_head(h, rest)),
        lengths.map(lambda n: with_head(head, rest, n)),
        fuzz.DAMAGE.map(lambda d: fuzz.damaged(whole, d)),
        st.binary(max_size=40),
        st.sampled_from(FILES),
    )
    cases = st.tuples(weights, st.just(description)) | st.tuples(
        st.just(whole), fuzz.edited(description, "schema", "weights_sha256")
    )
    tell("checkpoints", fuzz.many(examples, cases, attempt))


@sizes(25, 250)
def test_any_cifar_batch_is_read_or_refused(examples, tmp_path):
    splits = {"train": containers.pictures(24, 0), "test": containers.pictures(8, 1)}
    folder = containers.as_cifar100(tmp_path, splits)
    whole = {name: (folder / name).read_bytes() for name in ("meta", "train", "test")}
    batch = {"data": [[0]], "fine_labels": [0, 1], "filenames": ["a"], "fine_label_names": ["a"]}

    def attempt(case):
        name, data = case
        (folder / name).write_bytes(data)
        line = prepare_line(tmp_path, source="cifar", path=str(folder), val=4)
        code = fuzz.run(*line)
        fuzz.whole_or_absent(tmp_path / "prepared", code)
        shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
        (folder / name).write_bytes(whole[name])
        return code

    small = fuzz.edited(batch).map(lambda b: pickle.dumps(b, protocol=2))
    far = [
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"N(lp4000000000\n.",
        b"\x80\x04\x8e" + b"\xff" * 8,
        b"(" * 9999,
    ]
    names = st.sampled_from(["meta", "train", "test"])
    hurt = st.tuples(names, fuzz.DAMAGE).map(lambda c: (c[0], fuzz.damaged(whole[c[0]], c[1])))
    near = st.tuples(
        st.sampled_from(["meta", "test"]), st.tuples(st.floats(0, 1), st.integers(0, 255))
    ).map(lambda c: (c[0], flip_structure(whole[c[0]], *c[1])))
    cases = st.one_of(hurt, near, st.tuples(names, small), st.tuples(names, st.sampled_from(far)))
    tell("CIFAR batches", fuzz.many(examples, cases, attempt))


def flip_structure(data, share, value):
    """One byte changed among the first or last 300, where a pickle says what it holds and not the pixels."""
    places = [*range(min(300, len(data))), *range(max(0, len(data) - 300), len(data))]
    at = places[min(int(share * len(places)), len(places) - 1)]
    return data[:at] + bytes([value]) + data[at + 1 :]


@sizes(10, 120)
def test_any_archive_is_read_or_refused(examples, tmp_path):
    splits = {"train": containers.pictures(24, 0), "test": containers.pictures(8, 1)}
    archive = containers.packed(containers.as_cifar100(tmp_path, splits))
    whole = archive.read_bytes()
    bare = gzip.decompress(whole)

    def attempt(data):
        archive.write_bytes(data)
        line = prepare_line(tmp_path, source="cifar", path=str(archive), val=4)
        code = fuzz.run(*line)
        fuzz.whole_or_absent(tmp_path / "prepared", code)
        shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
        return code

    heads = st.tuples(st.floats(0, 1), st.integers(0, 255)).map(lambda c: flip_structure(bare, *c))
    cases = fuzz.DAMAGE.map(lambda d: fuzz.damaged(whole, d)) | heads | st.binary(max_size=600)
    tell("archives", fuzz.many(examples, cases, attempt))


@sizes(15, 200)
def test_any_parquet_file_is_read_or_refused(examples, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    containers.as_parquet(tmp_path, {"train": containers.pictures(24, 0)}, shards=1)
    path = tmp_path / "train-00000-of-00001.parquet"
    whole, table = path.read_bytes(), parquet.read_table(path)
    note = json.loads(table.schema.metadata[b"huggingface"])
    cells = table.column("img")

    def attempt(case):
        kind, what = case
        if kind == "bytes":
            path.write_bytes(what)
        elif kind == "note":
            told = {"huggingface": what if isinstance(what, bytes) else json.dumps(what)}
            parquet.write_table(table.replace_schema_metadata(told), path)
        else:
            parquet.write_table(
                pa.table({"img": cells, "label": pa.array([what] * 12 + [0] * 12)}), path
            )
        line = prepare_line(tmp_path, source="parquet", path=str(path), val=4, test=4)
        code = fuzz.run(*line)
        fuzz.whole_or_absent(tmp_path / "prepared", code)
        shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
        return code

    labels = st.sampled_from([0, 1, -1, 2**40, 10**6, 999_999, None])
    cases = st.one_of(
        fuzz.DAMAGE.map(lambda d: ("bytes", fuzz.damaged(whole, d))),
        fuzz.edited(note).map(lambda n: ("note", n)),
        st.sampled_from(FILES[:20]).map(lambda b: ("note", b)),
        labels.map(lambda v: ("labels", v)),
    )
    tell("parquet", fuzz.many(examples, cases, attempt))


NOTES = ("image_size", "mean", "std", "classes", "precision", "model", "interpolation", "crop", "x")


@sizes(25, 250)
def test_any_notes_and_any_bytes_of_an_onnx_file_are_read_or_refused(examples, tmp_path):
    whole = hostile.model().SerializeToString()
    home, out = tmp_path / "in", tmp_path / "out"
    home.mkdir()

    def attempt(data):
        out.mkdir()
        path = home / "net.onnx"
        path.write_bytes(data)
        try:
            code = fuzz.run("exporters.ort", path, out / "made.onnx")
            fuzz.whole_or_absent(out / "made.onnx", code)
            return code
        finally:
            shutil.rmtree(out)

    def noted(notes):
        return hostile.model(notes={**hostile.NOTES, **notes}).SerializeToString()

    texts = fuzz.TEXT | fuzz.NUMBERS.map(lambda n: repr(n)[:400]) | st.just("x" * 10**5)
    cases = st.one_of(
        st.dictionaries(st.sampled_from(NOTES), texts, min_size=1, max_size=3).map(noted),
        fuzz.DAMAGE.map(lambda d: fuzz.damaged(whole, d)),
        st.sampled_from(FILES),
    )
    tell("ONNX files", fuzz.many(examples, cases, attempt))


@sizes(5, 40)
def test_a_disk_that_is_full_at_any_byte_is_told_and_leaves_nothing(examples, world, tmp_path):
    """The limit is that of the process: no file grows beyond it."""
    prepare_line(tmp_path, path=str(world / "images"), val=4, test=4)
    out = tmp_path / "outs" / "prepared"
    out.parent.mkdir()

    def attempt(limit):
        done = subprocess.run(
            [sys.executable, "-m", "stages.prepare", out, "--params", tmp_path / "params.yaml"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=UNCOUNTED,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert done.returncode in (0, 2) and done.stderr.count("\n") == done.returncode // 2, (
            done.stderr
        )
        fuzz.whole_or_absent(out, done.returncode)
        shutil.rmtree(out, ignore_errors=True)
        return done.returncode

    tell("full disks", fuzz.many(examples, st.integers(0, 9000), attempt))


REAL = {  # what only a process of its own shows: the bytes on stderr, the exit code that a shell sees
    "an alias of itself": b"prepare: &a {source: digits, path: *a}",
    "no UTF-8": b"prepare: {source: '\xff'}",
    "a date that is none": b"prepare: {source: digits, seed: 2001-13-45}",
    "nested too deep": b"[" * 10**5,
    "a huge number": b"prepare: {source: digits, val: " + b"9" * 400 + b"}",
    "endless digits": b"prepare: {source: digits, val: " + b"9" * 5000 + b"}",
    "an empty file": b"",
    "half a character": b'prepare: {source: "\\ud800"}',
}


FIRST = ("no UTF-8", "half a character")


@pytest.mark.parametrize(
    "name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.ci) for n in REAL]
)
def test_a_real_process_ends_as_one_in_this_process_does(name, tmp_path, command):
    file, out = tmp_path / "params.yaml", tmp_path / "out"
    file.write_bytes(REAL[name])
    assert fuzz.run("stages.prepare", out, "--params", file) == fuzz.REFUSED
    done = command("stages.prepare", out, "--params", file, real=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not out.exists(), done.stderr
    assert done.stderr.startswith("stages.prepare: error: ") and not done.stdout
