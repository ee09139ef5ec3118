"""The page of a run in a real browser: it asks for nothing, complains of nothing, and fits a phone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.browser import Browser, find
from pipeline.data.prepared import Prepared
from pipeline.report import gallery
from pipeline.report import page as report_page
from tests import compared
from tests.test_gallery import evidence
from tests.test_report import Run, run, summary  # noqa: F401 - the fixture

VIEWS = {"light": {}, "dark": {"dark": True}, "phone": {"width": 390}, "print": {"media": "print"}}
EMPTY = "[...document.querySelectorAll('svg,img')].filter(e => e.getBoundingClientRect().width < 5)"
CLIPPED = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map(text => text.textContent);
})"""
UNTOLD = """[...document.querySelectorAll('figure:has(> svg)')].filter(
  f => !f.querySelector('h3') || !f.querySelector('svg').getAttribute('aria-label'))"""
SMALLEST = """Math.min(...[...document.querySelectorAll('.flow svg text, .pair svg text')].map(
  t => t.getBoundingClientRect().height))"""
FIGURES = (
    *(
        "CPU time relative to the baseline",
        "Accuracy against latency",
        "Student/teacher latency ratio",
    ),
    *("Latency distribution", "File size", "Memory", "Images per class"),
    *("Latency by run", "Accuracy by run", "cross_entropy"),
)
BUDGETS = {"top1_min": 0.8, "wall_ms_max": 1.0, "ort-fp32.size_mb_max": 4.0}


def written(run: Run) -> Path:  # noqa: F811
    """The page of a run that has everything."""
    compared.with_pairs(run)
    prepared = Prepared.open(run.prepared)
    shown = gallery.gallery(evidence(prepared), prepared, "cakd")
    edge = summary(run, BUDGETS)
    verdicts = [("ort-fp32", "PASS", 1.0), ("ov-fp32", "INCONCLUSIVE", 1.1), ("ov-int8", "FAIL", 2)]
    edge["comparisons"] = [compared.comparison(*of) for of in verdicts]
    path = run.folder / "page.html"
    path.write_text(report_page.page([edge], shown, compared.past(edge)), encoding="utf-8")
    return path


@pytest.mark.skipif(find() is None, reason="no chromium on PATH to open the page with")
@pytest.mark.parametrize("view", VIEWS)
def test_the_page_is_whole_and_quiet(view: str, run: Run) -> None:  # noqa: F811
    path = written(run)
    with Browser(str(find())) as browser:
        page = browser.open(path, **VIEWS[view])
        assert page.evaluate("document.querySelectorAll('figure svg').length") == 14
        assert page.evaluate("document.querySelectorAll('img').length") == 53
        assert page.evaluate(f"{EMPTY}.length") == 0
        assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
        width = VIEWS[view].get(
            "width", 1280
        )  # a phone's innerWidth grows with a page too wide for it
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert page.evaluate(CLIPPED) == []
        assert page.evaluate(SMALLEST) >= 9
        assert not page.requests and not page.errors


@pytest.mark.skipif(find() is None, reason="no chromium on PATH to open the page with")
def test_every_picture_is_there_with_its_heading_and_its_label(run: Run) -> None:  # noqa: F811
    with Browser(str(find())) as browser:
        page = browser.open(written(run))
        headings = (
            "[...document.querySelectorAll('figure:has(> svg) > h3')].map(h => h.textContent)"
        )
        assert set(FIGURES) <= set(page.evaluate(headings))
        assert page.evaluate(f"{UNTOLD}.length") == 0
        captions = "[...document.querySelectorAll('.flow figure, .pair figure:has(> svg)')]"
        without = page.evaluate(
            f"{captions}.filter(f => !f.querySelector('figcaption')).map(f => f.textContent.trim())"
        )
        assert without == []


def test_the_page_stays_below_a_megabyte(run: Run) -> None:  # noqa: F811
    assert written(run).stat().st_size < 1e6
