"""The page of a run in a real browser: it asks for nothing, complains of nothing, and fits a phone."""

from __future__ import annotations

import pytest

from pipeline import gallery, render
from pipeline.data import Prepared
from tests.browser import Browser, find
from tests.test_gallery import evidence
from tests.test_report import Run, run, summary  # noqa: F401 - the fixture

VIEWS = {"light": {}, "dark": {"dark": True}, "phone": {"width": 390}, "print": {"media": "print"}}
EMPTY = "[...document.querySelectorAll('svg,img')].filter(e => e.getBoundingClientRect().width < 5)"


@pytest.mark.skipif(find() is None, reason="no chromium on PATH to open the page with")
@pytest.mark.parametrize("view", VIEWS)
def test_the_page_is_whole_and_quiet(view: str, run: Run) -> None:  # noqa: F811
    prepared = Prepared.open(run.prepared, check=False)
    shown = gallery.gallery(evidence(prepared), prepared, "cakd")
    path = run.folder / "page.html"
    path.write_text(render.page([summary(run)], shown))
    with Browser(str(find())) as browser:
        page = browser.open(path, **VIEWS[view])
        assert page.evaluate("document.querySelectorAll('svg').length") == 8
        assert page.evaluate("document.querySelectorAll('img').length") == 53
        assert page.evaluate(f"{EMPTY}.length") == 0
        assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
        width = VIEWS[view].get(
            "width", 1280
        )  # a phone's innerWidth grows with a page too wide for it
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert not page.requests and not page.errors
