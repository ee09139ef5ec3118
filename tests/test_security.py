"""What a malicious file may do here: nothing. docs/security.md, input by input."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import socket
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from benchmarks.browser import Browser, find
from exporters.artifact.reference import Exported
from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.data import images
from pipeline.data.decoding import decode
from pipeline.data.prepared import Prepared
from pipeline.prepare.sources import unpickle
from pipeline.report import gallery
from pipeline.report import page as report_page
from pipeline.report.page import markdown
from pipeline.store import reading
from tests import compared, containers, fuzz, hostile
from tests.house import ROOT
from tests.test_gallery import evidence
from tests.test_images import square_pixels
from tests.test_report import (  # noqa: F401
    Run,
    accuracy,
    run,
    skipped_row,
    summary,
    train_perf,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")


class Evil:
    """Its pickle makes a file named `evil` where it is loaded."""

    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder in which a command that was executed would leave `evil`."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob("evil")), "something was executed"


def test_the_bait_of_these_tests_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))  # made here, to see that loading it leaves a trace
    assert Path("evil").exists()


def zipped(payload: bytes) -> bytes:
    """The container of torch.save."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


BAIT = pickle.dumps(Evil(), protocol=2)
CONTAINERS = {"bare": BAIT, "zip": zipped(BAIT)}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".safetensors"])
def test_a_pickle_by_any_name_is_no_checkpoint(suffix, container, here, digits, teacher_path):
    """Even where the JSON beside it holds its hash, and where it is given as weights to begin with."""
    path = here / f"model{suffix}"
    path.write_bytes(CONTAINERS[container])
    told = artifacts.read_json(teacher_path.with_suffix(".json"))
    artifacts.write_json(here / "model.json", {**told, "weights_sha256": artifacts.sha256(path)})
    assert fuzz.run("exporters.ort", path, here / "made.onnx") == fuzz.REFUSED
    teach = {"model": told["model"], "kwargs": told["kwargs"], "weights": str(path)}
    (here / "params.yaml").write_text(json.dumps({"teach": teach}))
    line = ["stages.teach", digits, here / "out", "--params", here / "params.yaml"]
    assert fuzz.run(*line) == fuzz.REFUSED
    assert not (here / "made.onnx").exists() and not (here / "out").exists()


def test_an_archive_of_pictures_executes_nothing_and_writes_nothing_outside(here):
    splits = {"train": containers.pictures(24, 0), "test": containers.pictures(8, 1)}
    folder = containers.as_cifar100(here, splits)
    (folder / "train").write_bytes(BAIT)
    archive = containers.packed(folder)
    with tarfile.open(here / "more.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
        for name in ("../escaped", "/escaped", f"{folder.name}/../../escaped"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo(f"{folder.name}/test")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = set(here.rglob("*"))
    for path in (folder, archive, here / "more.tar.gz"):
        section = {"source": "cifar", "path": str(path), "image_size": 32}
        (here / "params.yaml").write_text(json.dumps({"prepare": section}))
        line = ["stages.prepare", here / "out", "--params", here / "params.yaml"]
        assert fuzz.run(*line) == fuzz.REFUSED
    assert set(here.rglob("*")) == before | {here / "params.yaml"}


def test_a_short_pickle_cannot_take_all_memory():
    with pytest.raises(UserError, match="memo index: got 2147483647; expected below 9"):
        unpickle.loads(b"\x80\x02Nr\xff\xff\xff\x7f.", "batch")


def test_arrays_of_objects_are_refused(here, digits):
    objects = np.array([Evil()], dtype=object)
    prepared = here / "prepared"
    prepared.mkdir()
    np.save(prepared / "images.npy", objects, allow_pickle=True)
    index = artifacts.read_json(digits / "index.json")
    hashed = {**index, "images_sha256": artifacts.sha256(prepared / "images.npy")}
    artifacts.write_json(prepared / "index.json", hashed)
    with pytest.raises(UserError, match="images.npy: damaged: not a NumPy array .*Python objects"):
        Prepared.open(prepared)
    np.savez(here / "reference.npz", labels=objects, x=objects, allow_pickle=True)
    np.save(here / "calibration.npy", objects, allow_pickle=True)
    with pytest.raises(UserError, match="not an export"):
        Exported.open(here)


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/name:os.system", "ruby/x"]
)
def test_no_tag_of_yaml_makes_an_object(tag, here):
    (here / "params.yaml").write_text(f"prepare: {{source: !!{tag} ['touch evil']}}")
    line = ["stages.prepare", here / "out", "--params", here / "params.yaml"]
    assert fuzz.run(*line) == fuzz.REFUSED


@pytest.mark.parametrize("location", ["../../etc/x", "/etc/hostname", "below/../../x"])
def test_an_onnx_file_reads_nothing_outside_its_folder(location, here):
    path = hostile.external(location, present=False)(here)
    assert fuzz.run("exporters.ort", path, here / "made.onnx") == fuzz.REFUSED
    assert not (here / "made.onnx").exists()


@pytest.mark.parametrize("name", ["../teacher.safetensors", "/etc/passwd", "..", ""])
def test_a_store_reads_nothing_outside_its_folder(name, features, tmp_path):
    manifest = artifacts.read_json(features / "manifest.json")
    manifest["shards"][0]["file"] = name
    artifacts.write_json(tmp_path / "manifest.json", reading.seal(manifest))
    with pytest.raises(UserError, match=r"shards\[0\].file: got"):
        reading.open_manifest(tmp_path)


def test_no_picture_starts_ghostscript(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(images.BrokenImage, match="no format that is read here"):
        square_pixels(lambda: decode(path), "a.png", 8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("sides", "reason"),
    [
        ((12_000, 9_000), "truncated|broken"),  # Pillow would only warn of it: 108 million pixels
        ((12_000, 12_000), "12000 x 12000 pixels; allowed: 134217728 in all"),
        ((30_000, 30_000), "exceeds limit|pixels; allowed"),
    ],
)
def test_a_picture_too_large_is_refused_and_never_half_decoded(sides, reason, tmp_path):
    from tests.test_fuzz import png

    (tmp_path / "bomb.png").write_bytes(png(*sides, bytes(1000)))
    with pytest.raises(images.BrokenImage, match=reason):
        square_pixels(lambda: decode(tmp_path / "bomb.png"), "bomb.png", 8)


@pytest.mark.filterwarnings("error")
def test_a_large_photograph_is_decoded_whole(tmp_path):
    """Above the size of which Pillow warns: the last rows are there, not grey."""
    Image.new("L", (11_000, 9_000), 200).save(tmp_path / "large.png")
    found = square_pixels(lambda: decode(tmp_path / "large.png"), "large.png", 8)
    assert (found == 200).all()


def test_no_command_asks_the_network(monkeypatch, tmp_path, digits, teacher_path, features):
    def refused(*_):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    (tmp_path / "params.yaml").write_text("prepare: {source: digits, image_size: 8}")
    line = ["stages.prepare", tmp_path / "out", "--params", tmp_path / "params.yaml"]
    assert fuzz.run(*line) == fuzz.DONE
    line = ["verify", features, "--prepared", digits, "--teacher", teacher_path, "-n", 2]
    assert fuzz.run("pipeline.store", *line) == fuzz.DONE
    assert fuzz.run("exporters.ort", teacher_path, tmp_path / "made.onnx") == fuzz.DONE


NAMES = (
    "<script>alert(1)</script>",
    "\"'><img src=http://127.0.0.1:9/x onerror=alert(1)>",
    "</style></title></svg><svg onload=alert(1)>",
    "[a](javascript:alert(1)) ![b](http://127.0.0.1:9/y)",
    "{{ 7*7 }} {% raw %} &lt;script&gt;",
    "`x` | </td></table><iframe src=http://127.0.0.1:9/z>",
    "--><script>alert(2)</script><!-- <!--",
    "<a href='javascript:alert(1)' autofocus onfocus=alert(1)>a</a>",
    "<http://127.0.0.1:9/w> http://127.0.0.1:9/v <b>bold</b>",
    "]]><style>@import 'http://127.0.0.1:9/u';</style>",
)
FOREIGN = """[...document.querySelectorAll('script, iframe, object, embed, link, base, form, b')]
  .map(e => e.outerHTML)"""
HANDLERS = """[...document.querySelectorAll('*')].filter(
  e => [...e.attributes].some(a => a.name.startsWith('on') || /javascript:/i.test(a.value)
    && !['title', 'alt', 'aria-label'].includes(a.name))).map(e => e.outerHTML)"""


def infested(run: Run) -> tuple[dict, dict, list]:  # noqa: F811
    """A summary, a gallery and a history in which everything that has a name has an evil one."""
    compared.with_pairs(run)
    found, perf = accuracy(), train_perf()
    found["models"][NAMES[0]] = found["models"].pop("plain")
    perf["methods"][NAMES[0]] = perf["methods"].pop("plain")
    perf["methods"][NAMES[0]]["curves"][NAMES[1]] = [[0, 1.0], [1, 0.5]]
    run.write("accuracy.json", found)
    run.write("train_perf.json", perf)
    skipped = skipped_row("ort-fp32", "student", 1, "fp32", NAMES[2])
    found = run.read("bench/ort-fp32.json")
    run.write("bench/ort-fp32.json", {**found, "rows": [skipped, *found["rows"][1:]]})
    edge = summary(run)
    edge["title"], edge["machine"]["cpu"] = NAMES[3], NAMES[4]
    edge["comparisons"] = [compared.comparison(NAMES[5], "FAIL", 2.0)]
    edge["verdict"]["notes"] = list(NAMES)
    edge["verdict"]["failures"] = list(NAMES)
    prepared = Prepared.open(run.prepared)
    prepared = replace(prepared, classes=NAMES)
    shown = gallery.gallery(evidence(prepared), prepared, "cakd")
    past = [(NAMES[6], earlier) for _, earlier in compared.past(edge)]
    return edge, shown, past


def opened(browser, path):
    """The page, once all it would do by itself has been done; (alerts, page)."""
    page = browser.open(path)
    page.evaluate("new Promise(done => setTimeout(done, 200))")
    return [e for e in browser.events if e["method"] == "Page.javascriptDialogOpening"], page


@pytest.mark.skipif(find() is None, reason="no chromium on PATH to open the page with")
@pytest.mark.parametrize("kind", ["one run", "several machines", "without its policy"])
def test_no_name_becomes_markup_in_the_page(kind, run, tmp_path):  # noqa: F811
    edge, shown, past = infested(run)
    several = kind == "several machines"
    text = (
        report_page.page([edge, edge], earlier=past)
        if several
        else report_page.page([edge], shown, past)
    )
    if kind == "without its policy":
        text, n = re.subn(r"<meta[^>]*Content-Security-Policy[^>]*>", "", text)
        assert n == 1
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    with Browser(str(find())) as browser:
        alerts, page = opened(browser, path)
        assert not alerts and not page.requests and not page.errors
        assert page.evaluate(FOREIGN) == [] and page.evaluate(HANDLERS) == []
        assert "<script>alert(1)</script>" in page.evaluate("document.body.textContent")


@pytest.mark.skipif(find() is None, reason="no chromium on PATH to open the page with")
def test_no_name_becomes_markup_in_edge_md(run, tmp_path):  # noqa: F811
    """As a renderer shows it that lets HTML through, which GitHub's does not."""
    from markdown_it import MarkdownIt

    edge, _, past = infested(run)
    text = markdown([edge, edge], past)
    path = tmp_path / "edge.html"
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>a</title>{rendered}", encoding="utf-8"
    )
    with Browser(str(find())) as browser:
        alerts, page = opened(browser, path)
        assert not alerts and not page.requests and not page.errors
        assert page.evaluate(FOREIGN) == [] and page.evaluate(HANDLERS) == []
        assert page.evaluate("document.querySelectorAll('img, a').length") == 0
        assert "<script>alert(1)</script>" in page.evaluate("document.body.textContent")


@pytest.mark.skipif(find() is None, reason="no chromium on PATH to open the page with")
def test_what_looks_for_markup_finds_it(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<!doctype html><meta charset=utf-8>" + "".join(NAMES[:2]))
    with Browser(str(find())) as browser:
        browser.events.clear()
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            browser.call(f"{domain}.enable", session)
        browser.call("Page.navigate", session, url=path.as_uri())
        browser.wait("Page.javascriptDialogOpening")
