"""A real browser without a window, asked over a pipe: Chromium's DevTools protocol, which needs no package of Python's.

    with open_browser(folder) as browser:
        shown = browser.show(path, width=400, dark=True)    what sticks out, what it has fetched, what it complains of
        browser.photograph(png)                             the page as it is shown now

Messages are JSON, each ended by a zero byte, on the file descriptors 3 (to the browser) and 4 (from it).
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
# Elements that stick out of the page to the right, or out of what holds their text.
OVERFLOW = """
(() => {
  const wide = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > wide) found.push('page ' + document.documentElement.scrollWidth);
  for (const each of document.querySelectorAll('main *')) {
    const box = each.getBoundingClientRect();
    if (each.closest('.wide, svg, details:not([open])') || !box.width) continue;
    if (box.right > wide + 0.5 || box.left < -0.5) found.push(each.outerHTML.slice(0, 90));
  }
  return found;
})()
"""
# Pairs of marks of one axis that lie on each other.
OVERLAP = """
(() => {
  const found = [];
  for (const marks of document.querySelectorAll('.ys, .xs')) {
    const boxes = [...marks.children].map(each => [each.getBoundingClientRect(), each.textContent]);
    const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    for (const [i, [a, said]] of boxes.entries()) for (const [b, other] of boxes.slice(i + 1))
      if (meet(a, b)) found.push(said + ' on ' + other);
  }
  return found;
})()
"""


class Shown(NamedTuple):
    """What a page is like in a browser."""

    overflow: list[str]
    overlap: list[str]
    complaints: list[str]  # of the console, policy violations included
    requests: list[str]  # addresses, but the page's own and data:
    height: int


class Browser:
    """One that is open: see ``open_browser``."""

    def __init__(self, process: "subprocess.Popen[bytes]", write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._number, self._rest, self._session = 0, b"", ""
        self._events: list[dict[str, Any]] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")

    def show(self, path: Path, width: int, dark: bool = False, height: int = 900) -> Shown:
        """Opens a file in a window ``width`` pixels wide, on a light or a dark system."""
        self._events.clear()
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setEmulatedMedia", features=scheme)
        address = path.resolve().as_uri()
        self._ask("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())
        overflow, overlap = self.evaluate(OVERFLOW), self.evaluate(OVERLAP)
        tall = self.evaluate("document.documentElement.scrollHeight")
        return Shown(overflow, overlap, list(self._complaints()), list(self._requests(address)), int(tall))

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript that is ours, not the page's."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def photograph(self, path: Path, clip: tuple[int, int, int, int] | None = None) -> None:
        """Writes a PNG of the whole page, or of ``clip``: x, y, width, height."""
        words: dict[str, Any] = {"format": "png", "captureBeyondViewport": True}
        if clip is None:
            clip = (
                0,
                0,
                *self.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollHeight]"),
            )
        words["clip"] = {**dict(zip(("x", "y", "width", "height"), clip, strict=True)), "scale": 1}
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", **words)["data"]))

    def _complaints(self) -> Iterator[str]:
        for event in self._events:
            if event["method"] == "Log.entryAdded":
                yield event["params"]["entry"]["text"]
            elif event["method"] == "Runtime.exceptionThrown":
                yield str(event["params"]["exceptionDetails"])
            elif event["method"] == "Runtime.consoleAPICalled":
                yield str(event["params"]["args"])

    def _requests(self, own: str) -> Iterator[str]:
        for event in self._events:
            if event["method"] == "Network.requestWillBeSent":
                address = event["params"]["request"]["url"]
                if address != own and not address.startswith("data:"):
                    yield address

    def _ask(self, method: str, **words: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": words}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found)
                result: dict[str, Any] = found["result"]
                return result
            self._events.append(found)

    def _next(self) -> dict[str, Any]:
        """The next message that is whole."""
        while b"\0" not in self._rest:
            piece = os.read(self._read, 2**20)
            assert piece, f"the browser has ended: {self._process.poll()}"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found if "id" in found or "method" in found else {"method": ""}


def find_browser() -> str | None:
    """The first of NAMES that is on this machine."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Starts one with a new profile in ``folder``, and ends it."""
    program = find_browser()
    assert program is not None
    theirs, ours = os.pipe()
    mine, its = os.pipe()
    # The browser wants 3 and 4: a shell puts them there, as this process may use these numbers itself.
    script = f'exec "$0" "$@" 3<&{theirs} 4>&{its}'
    words = [program, *QUIET, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank"]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(["bash", "-c", script, *words], pass_fds=(theirs, its), stdout=log, stderr=log)
    os.close(theirs)
    os.close(its)
    try:
        yield Browser(process, ours, mine)
    finally:
        with suppress(OSError):  # it may be gone
            os.write(ours, b'{"id": 0, "method": "Browser.close"}\0')
        process.wait(timeout=30)
        os.close(ours)
        os.close(mine)
