"""Chromium for the tests of the page, and the colours that it should show."""

from __future__ import annotations

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


def map_cells(page: Any, length: int) -> npt.NDArray[np.int64]:
    """Colours at a quarter of each cell of the contact map (its middle may be under the cursor's box): (L, L, 3)."""
    data = page.eval_on_selector("#contact-map", "canvas => ({...canvas.dataset})")
    left, top, side = (float(data[name]) for name in ("left", "top", "side"))
    at = np.floor((np.arange(length) + 0.25) * side / length).astype(int)
    return pixels(page, "#contact-map")[np.ix_(at + int(top), at + int(left))].astype(np.int64)


def strip_cells(page: Any, host: str, rows: int, columns: int) -> npt.NDArray[np.int64]:
    """Colours near the corner of each cell in view: (rows, columns, 3)."""
    data = page.eval_on_selector(f"{host} canvas.strip", "canvas => ({...canvas.dataset})")
    x = int(data["left"]) + np.arange(columns) * int(data["column"]) + 3
    y = int(data["top"]) + np.arange(rows) * int(data["row"]) + 3
    return pixels(page, f"{host} canvas.strip")[np.ix_(y, x)].astype(np.int64)


def settle(page: Any) -> None:
    """Until what was asked of the page is painted: the slider counts once a frame."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def says(page: Any, selector: str, text: str | re.Pattern[str]) -> None:
    """Wait until this is what stands there."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(text)


def off_cursor(page: Any) -> None:
    """Send the cursor of the contact map to the first residue, away from what is looked at."""
    page.focus("#contact-map")
    for key in ("Home", "PageUp"):
        page.keyboard.press(key)
