"""A real Chromium without a window, driven over a pipe by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

PROGRAM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--disable-extensions", "--disable-background-networking", "--disable-sync", "--hide-scrollbars",
    "--disable-component-update", "--remote-debugging-pipe", "--no-proxy-server",
)  # fmt: skip
_LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The protocol's descriptors are 3 and 4."""


class Page:
    """One page."""

    def __init__(self, reader: asyncio.StreamReader, write_fd: int) -> None:
        self._reader, self._write_fd = reader, write_fd
        self._number = 0
        self._session: dict[str, str] = {}

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        await asyncio.to_thread(os.write, self._write_fd, json.dumps(message).encode() + b"\0")
        while True:
            said = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            if said.get("id") == self._number:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']}")
                return said["result"]

    async def attach(self) -> None:
        """Take the page that there is."""
        targets = (await self.call("Target.getTargets"))["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        session = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": session["sessionId"]}
        await self.call("Page.enable")

    async def show(self, width: int, height: int, scheme: str = "light") -> None:
        """As large as that, light or dark; less than 600 wide is a phone."""
        scale = {"deviceScaleFactor": 2 if width < 600 else 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **scale)
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def open(self, url: str) -> None:
        """Go there; returns before it is loaded."""
        await self.call("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """What an expression of JavaScript is worth."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", expression))
        return answer["result"].get("value")

    async def until(self, expression: str, patience_s: float = 30.0) -> Any:
        """Wait until an expression is true, and return it."""
        async with asyncio.timeout(patience_s):
            while not (found := await self.value(expression)):  # noqa: ASYNC110 - another process changes it
                await asyncio.sleep(0.05)
        return found

    async def screenshot(self) -> bytes:
        """The whole page as PNG."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])


@contextlib.asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Page]:
    """A browser with its profile in a folder."""
    assert PROGRAM is not None
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()
    pipes = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_browser, to_us)]  # neither is 3 or 4
    starter = [sys.executable, "-c", _LAUNCH, *map(str, pipes)]
    command = [*starter, PROGRAM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    quiet = asyncio.subprocess.DEVNULL
    browser = await asyncio.create_subprocess_exec(*command, pass_fds=pipes, stdout=quiet, stderr=quiet)
    for fd in pipes:
        os.close(fd)
    os.close(to_browser)
    os.close(to_us)
    reader = asyncio.StreamReader(limit=2**26)
    pipe = os.fdopen(from_browser, "rb")
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    page = Page(reader, from_us)
    try:
        await page.attach()
        yield page
    finally:
        with contextlib.suppress(ProcessLookupError):
            browser.kill()
        await browser.wait()
        transport.close()
        os.close(from_us)
