"""The pictures of the documentation, from the report of a run: `python -m benchmarks.pictures`.

Opens `reports/index.html` in a Chromium from PATH and writes PNG files of 256 colours to `docs/pictures`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from benchmarks.browser import NAMES, Browser, find
from pipeline.core import cli
from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError

DESKTOP, PHONE = 1280, 390  # pixels wide
FIGURE = (
    "[...document.querySelectorAll('figure')].find(f => f.querySelector('h3')?.textContent === {})"
)
SECTION = (
    "[...document.querySelectorAll('section')].find(s => s.querySelector('h2')?.textContent === {})"
)
# file -> width of the window, the element (None: the page), the height in pixels that is kept
PICTURES: dict[str, tuple[int, str | None, float | None]] = {
    "report.png": (DESKTOP, None, 1000),
    "report-phone.png": (PHONE, None, 1000),
    "front.png": (DESKTOP, FIGURE.format("'Accuracy against latency'"), None),
    "attention.png": (DESKTOP, SECTION.format("'Attention'"), None),
}


def main(args: argparse.Namespace) -> None:
    """Write the pictures. Raises UserError: no browser, no report, a report without one of them."""
    executable = find()
    if executable is None:
        raise UserError(
            f"PATH: got none of {', '.join(NAMES)}; expected one to open the report with; install it"
        )
    if not args.report.is_file():
        raise UserError(f"{args.report}: got no file; expected a report; run `make repro`")
    with Browser(executable) as browser:
        for name, (width, element, height) in PICTURES.items():
            page = browser.open(args.report.resolve(), width)
            if element is not None and not page.evaluate(f"Boolean({element})"):
                raise UserError(
                    f"{args.report}: got no part for {name}; expected a run with this part; take the default run"
                )
            with atomic(args.out / name) as temporary:
                page.screenshot(temporary, element, height)
                small = Image.open(temporary).convert("RGB").quantize(256, dither=Image.Dither.NONE)
                small.save(temporary, format="PNG", optimize=True)
            print(f"{args.out / name}: {small.width} x {small.height}")


if __name__ == "__main__":
    line = argparse.ArgumentParser(prog="benchmarks.pictures", description=__doc__)
    line.add_argument("report", type=Path, nargs="?", default=Path("reports/index.html"))
    line.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder to write")
    cli.run(main, line)
