"""A headless Chromium, driven over two pipes by the DevTools protocol: what a page asks for and says."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
)
PATIENCE = 30.0  # seconds


def find() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one page at a time; a context manager."""

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.mkdtemp()
        read_theirs, self._out = os.pipe()
        self._in, write_theirs = os.pipe()
        theirs = (read_theirs, write_theirs)

        def hand_over() -> None:  # the browser reads from 3 and writes to 4
            kept = [os.dup(fd) for fd in theirs]
            for fd, place in zip(kept, (3, 4), strict=True):
                os.dup2(fd, place)

        line = [executable, *(f"--{flag}" for flag in FLAGS), f"--user-data-dir={self._profile}"]
        self._process = subprocess.Popen(
            [*line, "--remote-debugging-pipe", "about:blank"],
            preexec_fn=hand_over,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in theirs:
            os.close(fd)
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its result; events that come meanwhile are kept. Raises RuntimeError: refused."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait(self, method: str) -> None:
        """Until an event of this name has come."""
        while not any(e.get("method") == method for e in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise RuntimeError(f"no word from the browser in {PATIENCE:g} s")
            read = os.read(self._in, 1 << 20)
            if not read:
                raise RuntimeError("the browser has gone")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(
        self, path: Path, width: int = 1280, dark: bool = False, media: str = "screen"
    ) -> Page:
        """A file in a window of this width; below 600 px a phone's."""
        self.events.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")
        return page


class Page:
    """A page that has loaded."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this page."""
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression. Raises RuntimeError: it threw."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    @property
    def requests(self) -> list[str]:
        """What was asked of the network: every address but the page's own and those of data."""
        events = self._browser.events
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        addresses = [s["request"]["url"] for s in sent if s.get("type") != "Document"]
        return [a for a in addresses if not a.startswith("data:")]

    @property
    def errors(self) -> list[str]:
        """What the page complained of: console errors and warnings, exceptions, refused resources."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [json.dumps(e["params"]) for e in self._browser.events if e["method"] in kinds]

    def screenshot(
        self, path: Path, element: str | None = None, height: float | None = None
    ) -> None:
        """A PNG of the page, or of the element that a JavaScript expression gives; `height` cuts it, in pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        if element is not None:
            box = self.evaluate(f"JSON.stringify(({element}).getBoundingClientRect())")
            clip |= {side: json.loads(box)[side] for side in ("x", "y", "width", "height")}
        if height is not None:
            clip["height"] = min(clip["height"], height)
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))
