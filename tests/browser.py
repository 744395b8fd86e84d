"""Headless Chromium, driven over the pipe of its DevTools protocol: no package needed, only a browser on the PATH."""

import base64
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Enter": 13}


def wait_until(so, seconds: float = 30) -> None:
    """Until `so()` is true."""
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.05)


class Page:
    """One page of the browser: open a file, ask for the value of an expression, press keys, take a picture."""

    def __init__(self, process: subprocess.Popen, to_browser: int, from_browser: int):
        self._process, self._to, self._from, self._asked, self._rest = process, to_browser, from_browser, 0, b""
        self.errors: list[str] = []  # exceptions and console errors, a violated policy among them
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def _message(self) -> dict:
        while b"\0" not in self._rest:
            piece = os.read(self._from, 1 << 16)
            assert piece, f"the browser has ended: {self._process.wait()}"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def ask(self, method: str, **params) -> dict:
        """The result of a command of the protocol; what else the browser says meanwhile is noted if it is an error."""
        self._asked += 1
        session = {"sessionId": self._session} if hasattr(self, "_session") else {}
        message = {"id": self._asked, "method": method, "params": params, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._asked:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            said, event = answer.get("params", {}), answer.get("method")
            if event == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(said["exceptionDetails"]))
            elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
                self.errors.append(said["entry"]["text"])

    def open(self, path: pathlib.Path, anchor: str = "", width: int = 1280, dark: bool = False) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=f"{path.absolute().as_uri()}{anchor}")
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def value(self, expression: str):
        """The value of a JavaScript expression in the page."""
        done = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Until the expression is true."""
        wait_until(lambda: self.value(expression), seconds)

    def press(self, key: str, shift: bool = False) -> None:
        """A key by its name (`ArrowLeft`) or its character."""
        code = KEYS.get(key) or ord(key.upper())
        about = dict(key=key, windowsVirtualKeyCode=code, modifiers=8 if shift else 0)
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def choose(self, element: str, value: str) -> None:
        """Give a field a value, as a user does: with the event that follows."""
        field = f"document.getElementById({json.dumps(element)})"
        self.value(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")

    def save_files_to(self, folder: pathlib.Path) -> None:
        self.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def picture(self, path: pathlib.Path, whole: bool = False) -> None:
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))["data"]
        path.write_bytes(base64.b64decode(data))

    def _clip(self, whole: bool) -> dict:
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"] if whole else None
        return {"clip": {**size, "scale": 1}} if size else {}


@contextlib.contextmanager
def browser(profile: pathlib.Path):
    """A page of a browser of its own, with its profile in a folder; skips where there is no browser."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser on the PATH ({', '.join(NAMES)})")
    (theirs_in, to_browser), (from_browser, theirs_out) = os.pipe(), os.pipe()
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={profile}")  # fmt: skip

    shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the protocol's pipes are 3 and 4
    process = subprocess.Popen(
        ["bash", "-c", shell, program, *flags, "--remote-debugging-pipe"], pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        page = Page(process, to_browser, from_browser)
        yield page
        page.__dict__.pop("_session")
        page.ask("Browser.close")
    finally:
        os.close(to_browser)
        os.close(from_browser)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
