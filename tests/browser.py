"""A headless Chromium for tests, driven over the DevTools protocol on a pipe: no library, no port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

EXECUTABLE = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
NO_BROWSER = "no Chromium on this machine (Debian: apt-get install chromium)"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",  # noqa: E501
    "--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--window-size=1500,950",
)  # fmt: skip


class Browser:
    """One page. What it wrote to the console as errors, and exceptions, are in `errors`; dialogs in `dialogs`."""

    def __init__(self, profile: Path) -> None:
        assert EXECUTABLE is not None
        there, self._out = os.pipe()
        self._in, back = os.pipe()

        def connect() -> None:  # Chromium reads commands from 3 and answers on 4
            low, high = os.dup(there), os.dup(back)
            os.dup2(low, 3)
            os.dup2(high, 4)

        command = [EXECUTABLE, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(there)
        os.close(back)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        wanted = self._count
        while True:
            answer = self._read()
            if answer.get("id") == wanted:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has gone"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = dict(json.loads(line))
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:600])
        elif kind == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif kind == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
        return message

    def open(self, url: str) -> None:
        """Load a page from scratch and wait until it has drawn itself."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait("document.querySelector('nav a') !== null")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 15.0) -> None:
        """Wait until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < end, f"still not true: {expression}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """A key on whatever has the focus."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(10)
        os.close(self._in)
        os.close(self._out)
