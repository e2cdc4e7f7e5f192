"""Chromium for the tests of the page, and the colours that it should show."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

PAGE = Path(__file__).parents[1] / "numpyesm" / "service" / "page"


def chromium() -> str:
    """Where the browser is; without one the test is skipped and says so."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine (Debian: apt-get install chromium); the page was NOT tested")


class Tab:
    """A page with everything that it should not have done written down; the rest is Playwright's."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(180_000)
        self.address = address
        self.complaints: list[str] = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(m.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._check_origin)
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.load()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.page, name)

    def load(self) -> None:
        """Open the page, or open it again."""
        self.page.goto(self.address)
        self.page.wait_for_selector("#model option", state="attached")

    def _check_origin(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.complaints.append(f"left the origin: {request.url}")

    def compute(self, text: str, *statuses: str) -> Tab:
        """Paste, press the button, wait for what the page says then."""
        self.page.fill("#sequence", text)
        self.page.click("#compute")
        for status in statuses or ("Done in",):
            self.page.wait_for_selector(f"#status:has-text('{status}')")
        return self

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def settle(self) -> None:
        """Until what was asked of the page is painted: the slider counts once a frame."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def says(self, selector: str, text: str | re.Pattern[str]) -> None:
        """Wait until this is what stands there."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_have_text(text)

    def download(self, button: str) -> bytes:
        with self.page.expect_download() as waiting:
            self.page.click(button)
        return Path(waiting.value.path()).read_bytes()

    def pixels(self, canvas: str) -> npt.NDArray[np.int64]:
        """A canvas as (height, width, 3)."""
        from PIL import Image

        self.settle()
        png = self.page.eval_on_selector(canvas, "canvas => canvas.toDataURL()").partition(",")[2]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), np.int64)

    def cells(self, canvas: str, rows: int, columns: int) -> npt.NDArray[np.int64]:
        """Colours of the cells in view, at a quarter of each: its middle may be under the cursor's box."""
        data = self.page.eval_on_selector(canvas, "canvas => ({...canvas.dataset})")
        place = {name: float(value) for name, value in data.items()}
        height, width = (place.get(name) or place["side"] / columns for name in ("row", "column"))
        y = place["top"] + (np.arange(rows) + 0.25) * height
        x = place["left"] + (np.arange(columns) + 0.25) * width
        return self.pixels(canvas)[np.ix_(y.astype(int), x.astype(int))]


def colours(table: str) -> npt.NDArray[np.int64]:
    """The 256 colours of a table, from the text of the page's own module."""
    text = (PAGE / "colourmaps.js").read_text()
    digits = "".join(re.findall(r'"([0-9a-f]+)"', text.split(f"{table}:")[1].split(",\n")[0]))
    anchors = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8).reshape(-1, 3)
    at = np.linspace(0, len(anchors) - 1, 256)
    mixed = [np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.floor(np.stack(mixed, axis=1) + 0.5).astype(np.int64)


def assert_colours(
    found: npt.NDArray[Any], table: str, values: npt.NDArray[Any], low: float = 0, high: float = 1
) -> None:
    """Each pixel has its value's colour, or the next shade (the last bit of a value may round the other way)."""
    index = np.floor((np.asarray(values, np.float64) - low) / (high - low) * 255 + 0.5).astype(np.int64)
    shown = (colours(table)[np.clip(index + step, 0, 255)] for step in (-1, 0, 1))
    wrong = np.minimum.reduce([np.abs(found - one).max(axis=-1) for one in shown]) > 1
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} pixels, first {np.argwhere(wrong)[0]}"
