"""Headless Chromium, spoken to by the DevTools protocol: a page is loaded, clicked, typed into and looked at."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
# DevTools' names of keys that are not letters, with their Windows codes.
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "Home": 36} | {
    f"Arrow{side}": code for code, side in enumerate(("Left", "Up", "Right", "Down"), 37)
}


class Tab:
    """One page. requests: addresses asked for; problems: what its console called errors, and uncaught ones."""

    def __init__(self, connection: ClientConnection, session: str) -> None:
        self._connection, self._session, self._number = connection, session, 0
        self.requests: list[str] = []
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; its result."""
        self._number += 1
        message = {"id": self._number, "sessionId": self._session, "method": method, "params": parameters}
        self._connection.send(json.dumps(message))
        while True:
            answer = json.loads(self._connection.recv(timeout=60))
            if answer.get("id") == self._number and answer.get("sessionId") == self._session:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self._hear(answer)

    def _hear(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:2000])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """Of the window, in CSS pixels. phone: two device pixels each, and touch."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def open(self, url: str) -> None:
        """Load a page and wait until it says that it is ready."""
        self.call("Page.navigate", url=url)
        self.until("document.body?.dataset.ready === 'yes'")

    def run(self, code: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, code: str, seconds: float = 60.0) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + seconds
        while not self.run(code):
            assert time.monotonic() < end, (
                f"{code}; the page says {self.run('document.body.innerText')}; {self.problems}"
            )
            time.sleep(0.05)

    def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into a file input, as its dialog would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve())])

    def press(self, *keys: str) -> None:
        """Keys one after the other: names of `KEYS`, or single characters."""
        for key in keys:
            event: dict[str, Any] = {
                "key": key,
                "code": key,
                "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper())),
            }
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, x: float, y: float) -> None:
        """The left button at a place of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drag(self, x: float, y: float, dx: float, dy: float) -> None:
        """With the left button held."""
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", clickCount=1)
        for part in (0.5, 1.0):
            self.call(
                "Input.dispatchMouseEvent",
                type="mouseMoved",
                x=x + part * dx,
                y=y + part * dy,
                button="left",
                buttons=1,
            )
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + dx, y=y + dy, button="left", clickCount=1)

    def picture(self) -> bytes:
        """PNG of what is seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A browser with one empty tab. folder: for its profile. Fails where there is no Chromium."""
    program = next((match for name in PROGRAMS if (match := shutil.which(name))), None)
    assert program, "The page's tests need Chromium: apt-get install chromium-headless-shell"
    command = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    # The program may be a script that starts the browser, and the browser starts others: they end together.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.search(r"DevTools listening on (ws://\S+)", line):
                break
        else:
            raise AssertionError(f"{program} ended with {process.wait()}")
        with connect(match[1], max_size=2**28) as connection:
            yield _first_tab(connection)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def _first_tab(connection: ClientConnection) -> Tab:
    def ask(number: int, method: str, **parameters: Any) -> dict[str, Any]:
        connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer: dict[str, Any] = json.loads(connection.recv(timeout=60))
            if answer.get("id") == number:
                return answer["result"]

    target = ask(-1, "Target.createTarget", url="about:blank")["targetId"]
    return Tab(connection, ask(-2, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
