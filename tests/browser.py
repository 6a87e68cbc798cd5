"""A headless Chromium that a test drives through the pipe of its debugging protocol.

https://chromedevtools.github.io/devtools-protocol: JSON messages that end with a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
# WebGL 2 by a software renderer; no sandbox, because tests may run as root in a container.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Browser:
    """One page in a browser: what it shows, what it logs and what it asks the network for."""

    def __init__(self, to_browser: int, from_browser: int, seconds: float):
        self._write, self._read = to_browser, from_browser
        self._left, self._number, self._session = b"", 0, ""
        self._seconds = seconds
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._read, 1 << 20)
            assert part, "the browser ended"
            self._left += part
        text, self._left = self._left.split(b"\0", 1)
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(json.dumps(params["args"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(json.dumps(params["entry"])[:500])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"][:200])

    def open(self, page: Path, width: int = 1280, height: int = 900) -> None:
        """Open a page in a window, or on a phone where it is narrow."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=page.absolute().as_uri())

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true; the page is asked once per frame that it draws."""
        limit = time.monotonic() + self._seconds
        while not self.value(expression):
            assert time.monotonic() < limit, f"{expression} is not true; {self.errors}"
            self.value("new Promise((done) => setTimeout(done, 50))")

    def wheel(self, x: float, y: float, turns: int) -> None:
        """Turn the wheel at a place of the window."""
        for _ in range(abs(turns)):
            self.call(
                "Input.dispatchMouseEvent",
                type="mouseWheel",
                x=x,
                y=y,
                deltaX=0,
                deltaY=120 if turns > 0 else -120,
            )

    def click(self, selector: str) -> None:
        """Click on an element."""
        self.value(f"document.querySelector({selector!r}).click()")

    def picture(self, file: Path | None = None, *, whole: bool = False) -> bytes:
        """What the window shows, or the whole page, as a PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        data = base64.b64decode(answer["data"])
        if file is not None:
            file.write_bytes(data)
        return data


@contextmanager
def browser(profile: Path, seconds: float = 120) -> Iterator[Browser]:
    """Start a browser with an empty profile, and end it.

    Args:
        profile: A folder for its files.
        seconds: The most that `Browser.wait` waits.
    """
    assert PROGRAM is not None
    for_browser, to_browser = os.pipe()
    from_browser, of_browser = os.pipe()
    # The protocol's file numbers are 3 and 4.
    line = f'exec "$@" 3<&{for_browser} 4>&{of_browser}'
    process = subprocess.Popen(
        ["bash", "-c", line, "bash", PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(for_browser, of_browser),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    os.close(for_browser)
    os.close(of_browser)
    try:
        yield Browser(to_browser, from_browser, seconds)
    finally:
        os.close(to_browser)
        process.terminate()
        process.wait()
        os.close(from_browser)
