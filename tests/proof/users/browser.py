"""A real browser for the proofs: headless Chromium, spoken to by its own DevTools protocol over a pair of pipes.

No driver and no client library: `--remote-debugging-pipe` reads JSON from file descriptor 3 and writes it to 4, each
message ended by a zero byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), "/usr/bin/chromium"
)
HOW_TO_INSTALL = "this proof needs a real Chromium: apt-get install -y chromium (Debian), or put `chromium` on PATH"
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
TIMEOUT_S = 60


class Browser:
    """One page of a browser of its own. A context: leaving it ends the browser."""

    def __init__(self, profile: Path) -> None:
        assert Path(CHROMIUM).exists(), HOW_TO_INSTALL
        self._profile, self._number, self._pending = profile, 0, b""
        self.console: list[str] = []  # errors and warnings of all pages since the last `open`
        self.requests: list[str] = []  # every address that was asked for since then

    def __enter__(self) -> Browser:
        (low_read, self._write), (self._read, low_write) = os.pipe(), os.pipe()
        # bash puts the pipes where the protocol wants them, from numbers that are not in the way.
        their_read, their_write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (low_read, low_write))
        command = f'exec "$@" 3<&{their_read} 4>&{their_write} {their_read}<&- {their_write}>&-'
        self._log = open(self._profile.with_suffix(".log"), "wb")
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, *_OPTIONS, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(their_read, their_write), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        for fd in (low_read, low_write, their_read, their_write):
            os.close(fd)
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)
        os.close(self._read)
        try:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=10)
        self._log.close()

    _session = None

    def open(self, page: Path, *, scheme: str, width: int, height: int = 900, scripts: bool = True) -> None:
        """Load a file as a reader of that colour scheme with that screen would."""
        self.console, self.requests = [], []
        phone = width < 600
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._ask("Page.navigate", url=page.resolve().as_uri())
        self._until("Page.loadEventFired")

    def run(self, expression: str) -> Any:
        """What a JavaScript expression is on the page; it must be plain JSON."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Move the pointer there."""
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def key(self, name: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=name)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        image = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(image))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _until(self, event: str) -> None:
        while (answer := self._next()).get("method") != event:
            self._note(answer)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.console.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.console.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.console.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                log = self._profile.with_suffix(".log").read_text(errors="replace")[-2000:]
                what = "has ended" if ready else f"did not answer within {TIMEOUT_S} s"
                raise AssertionError(f"{CHROMIUM} {what}\n{HOW_TO_INSTALL}\n{log}")
            self._pending += part
        first, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message
