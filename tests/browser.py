"""Chromium and a running service for the tests of the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

PAGE = Path(__file__).parents[1] / "numpyesm" / "service" / "page"
SCREENSHOTS = Path(__file__).parents[1] / "test-output" / "page"


def chromium() -> str:
    """Where the browser is; without one the test is skipped and says so."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine (Debian: apt-get install chromium); the page was NOT tested")


@contextmanager
def service(*arguments: str, **environment: str) -> Iterator[str]:
    """`numpyesm serve` on a free port of the loopback; the address of its page."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NUMPYESM", "HF_"))}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "numpyesm", "serve", "--port", "0", "--backend", "numpy", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=clean | {"HF_HUB_OFFLINE": "1"} | environment,
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"on (http://\S+/)", line):
                break
        else:
            pytest.fail("the service did not start:\n" + "".join(said))
        # The access log would fill the pipe.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)
    drain.wait(60)


class Tab:
    """A page with everything that it should not have done written down."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.address = address
        self.complaints: list[str] = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(m.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._check_origin)
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))

    def _check_origin(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.complaints.append(f"left the origin: {request.url}")

    def open(self) -> Any:
        self.page.goto(self.address)
        self.page.wait_for_selector("#model option", state="attached")
        return self.page

    def compute(self, text: str, status: str = "Done in") -> Any:
        """Paste, press the button, wait for the status."""
        from playwright.sync_api import expect

        self.page.fill("#sequence", text)
        self.page.click("#compute")
        expect(self.page.locator("#status")).to_contain_text(status, timeout=60_000)
        return self.page

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def download(self, button: str) -> bytes:
        with self.page.expect_download() as waiting:
            self.page.click(button)
        return Path(waiting.value.path()).read_bytes()


def colours(table: str) -> npt.NDArray[np.int64]:
    """The 256 colours of a table, from the text of the page's own module."""
    text = (PAGE / "colourmaps.js").read_text()
    digits = "".join(re.findall(r'"([0-9a-f]+)"', text.split(f"{table}:")[1].split(",\n")[0]))
    anchors = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8).reshape(-1, 3)
    at = np.linspace(0, len(anchors) - 1, 256)
    mixed = [np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.floor(np.stack(mixed, axis=1) + 0.5).astype(np.int64)


def shades(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.int64]:
    """Rows of the table for values."""
    part = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    return np.clip(np.floor(part * 255 + 0.5), 0, 255).astype(np.int64)


def assert_colours(found: npt.NDArray[Any], table: npt.NDArray[np.int64], index: npt.NDArray[np.int64]) -> None:
    """Each pixel has its colour, or that of the next shade (the last bit of a value may round the other way)."""
    near = [np.abs(found - table[np.clip(index + step, 0, 255)]).max(axis=-1) for step in (-1, 0, 1)]
    wrong = np.minimum.reduce(near) > 1
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} pixels, first {np.argwhere(wrong)[0]}"


def pixels(page: Any, selector: str) -> npt.NDArray[np.uint8]:
    """A canvas as (height, width, 3)."""
    import base64

    encoded = page.eval_on_selector(
        selector,
        """canvas => {
            const copy = document.createElement("canvas");
            [copy.width, copy.height] = [canvas.width, canvas.height];
            const context = copy.getContext("2d", { willReadFrequently: true });
            context.drawImage(canvas, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let text = "";
            for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.subarray(i, i + 32768));
            return [canvas.width, canvas.height, btoa(text)];
        }""",
    )
    width, height, text = encoded
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(height, width, 4)[:, :, :3]
