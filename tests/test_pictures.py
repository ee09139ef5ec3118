"""The pictures of the documentation: made from a report, refused in a line where they cannot be."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pictures
from benchmarks.browser import find
from pipeline.core.errors import UserError
from tests.house import ROOT

PAGE = """<!doctype html><meta charset=utf-8>
<meta name=viewport content="width=device-width"><body style="margin:0;background:#fff">
<figure style="margin:0;width:300px;height:200px;background:#c00"><h3>Accuracy against latency</h3></figure>
{}<div style="height:3000px;width:10px"></div>"""
ATTENTION = '<section style="width:200px;height:100px;background:#00c"><h2>Attention</h2></section>'
without_browser = pytest.mark.skipif(find() is None, reason="no chromium on PATH")


def asked(report: Path, out: Path) -> argparse.Namespace:
    return argparse.Namespace(report=report, out=out)


@without_browser
def test_every_picture_is_made_and_cut_to_its_part(tmp_path: Path) -> None:
    report = tmp_path / "index.html"
    report.write_text(PAGE.format(ATTENTION), encoding="utf-8")
    pictures.main(asked(report, tmp_path / "pictures"))
    sizes = {p.name: Image.open(p).size for p in (tmp_path / "pictures").iterdir()}
    assert sizes == {
        "report.png": (1280, 1000),
        "report-phone.png": (390, 1000),
        "front.png": (300, 200),
        "attention.png": (200, 100),
    }
    red = Image.open(tmp_path / "pictures" / "front.png").convert("RGB").getpixel((290, 190))
    assert red == (204, 0, 0)


@without_browser
def test_a_report_without_a_part_is_named(tmp_path: Path) -> None:
    report = tmp_path / "index.html"
    report.write_text(PAGE.format(""), encoding="utf-8")
    with pytest.raises(UserError, match=r"no part for attention\.png"):
        pictures.main(asked(report, tmp_path / "pictures"))


def test_no_browser_and_no_report_are_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "find", lambda: "/usr/bin/chromium")
    with pytest.raises(UserError, match="got no file; expected a report"):
        pictures.main(asked(tmp_path / "none.html", tmp_path))
    monkeypatch.setattr(pictures, "find", lambda: None)
    with pytest.raises(UserError, match="got none of chromium"):
        pictures.main(asked(tmp_path / "none.html", tmp_path))


def test_the_documentation_shows_the_pictures_that_are_made() -> None:
    page = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    for name in pictures.PICTURES:
        assert f"pictures/{name}" in page
        assert (ROOT / "docs" / "pictures" / name).stat().st_size < 150_000
