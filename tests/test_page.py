"""The page as a reader uses it: headless Chromium against the real service, compared with the library."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, random_sequence
from PIL import Image
from running_service import ServiceHere

from numpyesm import ESM2, InvalidSequence
from numpyesm.alphabet import AMINO_ACIDS
from numpyesm.config import PROBLEM_TYPES, Classifier
from numpyesm.fasta import packaged, read_fasta
from numpyesm.heads import log_softmax
from numpyesm.weights.synthetic import random_checkpoint

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning", "ignore::numpyesm.InputWarning"),
]
PAGE = Path(__file__).parents[1] / "numpyesm" / "service" / "page"
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
ROWS = "AVILMCFWYGPSTNQHKRDE"
ORDER = [AMINO_ACIDS.index(letter) for letter in ROWS]
INCLUDE = ["contacts", "logits", "attentions"]
KEY = "sesame-1234"


def read_png(data: bytes) -> np.ndarray:
    """A picture as (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int64)


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
        playwright.expect(self.page.locator(selector)).to_have_text(text)

    def download(self, button: str) -> bytes:
        with self.page.expect_download() as waiting:
            self.page.click(button)
        return Path(waiting.value.path()).read_bytes()

    def pixels(self, canvas: str) -> np.ndarray:
        """A canvas."""
        self.settle()
        return read_png(base64.b64decode(self.eval_on_selector(canvas, "it => it.toDataURL()").partition(",")[2]))

    def cells(self, canvas: str, rows: int, columns: int) -> np.ndarray:
        """Colours of the cells in view, at a quarter of each: its middle may be under the cursor's box."""
        data = self.page.eval_on_selector(canvas, "canvas => ({...canvas.dataset})")
        place = {name: float(value) for name, value in data.items()}
        height, width = (place.get(name) or place["side"] / columns for name in ("row", "column"))
        y = place["top"] + (np.arange(rows) + 0.25) * height
        x = place["left"] + (np.arange(columns) + 0.25) * width
        return self.pixels(canvas)[np.ix_(y.astype(int), x.astype(int))]

    def assert_colours(self, found: Any, table: str, values: Any, low: float = 0, high: float = 1) -> None:
        """Each pixel has its value's colour, or the next shade (the last bit of a value may round the other way)."""
        colours = np.array(self.page.evaluate(f"async () => (await import('/page/colourmaps.js')).{table}"))
        index = np.floor((np.asarray(values, np.float64) - low) / (high - low) * 255 + 0.5).astype(np.int64)
        shown = (colours[np.clip(index + step, 0, 255)] for step in (-1, 0, 1))
        wrong = np.minimum.reduce([np.abs(found - one).max(axis=-1) for one in shown]) > 1
        assert not wrong.any(), f"{wrong.sum()} of {wrong.size} pixels, first {np.argwhere(wrong)[0]}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; without one the test is skipped and says so."""
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    if (path := next(found, None)) is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium); the page was NOT tested")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def address(model: ESM2) -> Iterator[str]:
    with ServiceHere({"esm2-8m": model}) as running:
        yield f"{running.url}/"


@pytest.fixture(scope="module")
def library(model: ESM2) -> Callable[[str], Any]:
    return lambda sequence: model.encode([sequence], include=INCLUDE)[0]


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Callable[..., Tab]]:
    """Opens tabs; at the end none may have complained or left the origin."""
    tabs: list[Tab] = []

    def make(url: str = address, **options: Any) -> Tab:
        tabs.append(Tab(browser, url, **({"viewport": {"width": 1280, "height": 900}} | options)))
        return tabs[-1]

    yield make
    for one in tabs:
        one.context.close()
    assert [complaint for one in tabs for complaint in one.complaints] == []


def log_odds(sequence: str, logits: np.ndarray) -> np.ndarray:
    """(L, 20) in the order of the page's rows; NaN where the residue is none of the 20."""
    x = log_softmax(logits)
    wild = [x[i, AMINO_ACIDS.index(c)] if c in AMINO_ACIDS else np.nan for i, c in enumerate(sequence)]
    return (x - np.array(wild)[:, None])[:, ORDER]


def count_contacts(contacts: np.ndarray, threshold: float, apart: int = 6) -> int:
    return int((np.triu(contacts, apart) >= np.float32(threshold)).sum())


def counted(page: Tab) -> int:
    """How many contacts the page says there are."""
    page.settle()
    return int(page.text_content("#contact-count").split()[0].replace(",", ""))


def as_shown(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.1e}".replace("e-0", "e-")


def check_map(page: Tab, contacts: np.ndarray, table: str = "LIGHT.sequential", split: bool = True) -> None:
    """All probabilities in their colours; in a split map, only those that count are below the diagonal."""
    page.focus("#contact-map")
    page.press("Home", "PageUp")  # the cursor's lines run along the first row and column
    i, j = np.indices(contacts.shape)
    counts = (contacts >= 0.5) & (i - j >= 6)
    shown = np.where(split & (i > j) & ~counts, 0, contacts)
    seen = (i != j) & (i > 0) & (j > 0)
    page.assert_colours(page.cells("#contact-map", *contacts.shape)[seen], table, shown[seen])


# -- what is drawn ---------------------------------------------------------------------------------------------------


def test_example_is_drawn_as_the_library_computes_it_in_both_themes(tab: Any, library: Any) -> None:
    page = tab(color_scheme="dark")
    page.get_by_role("button", name="Ubiquitin").click()
    page.wait_for_selector("#results:not([hidden])")
    assert page.text_content("#result-title") == "P0CG48"
    contacts = library(UBIQUITIN).contacts
    check_map(page, contacts, "DARK.sequential")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(14, 18, 29)"
    page.get_by_role("button", name="Light colours").click()
    check_map(page, contacts)
    page.uncheck("#split")
    check_map(page, contacts, split=False)
    page.reload()  # the choice stays
    assert page.evaluate(ground) == "rgb(243, 245, 246)"


def test_mutations_and_attention_are_drawn(tab: Any, library: Any) -> None:
    sequence = "MKTXBAYIAKQRZUO-WCHE"
    page = tab().compute(sequence)
    expected = library(sequence)
    scores = log_odds(sequence, expected.logits).T
    known = np.isfinite(scores)
    limit = np.ceil(np.nanmax(np.abs(scores)) * 10) / 10
    cells = page.cells("#mutation-map canvas.strip", 20, len(sequence))
    assert (cells[~known] == [0xD8, 0xDC, 0xE0]).all()  # no wild type: no value, no colour of a value
    known[0, 0] = False  # under the cursor
    assert known.sum() == 20 * 14 - 1
    page.assert_colours(cells[known], "LIGHT.diverging", scores[known], -limit, limit)

    attention = expected.attentions
    lows, highs = attention.min(axis=1, keepdims=True), attention.max(axis=1, keepdims=True)
    for low, high in ((attention.min(), attention.max()), (lows, highs)):
        cells = page.cells("#attention-map canvas.strip", *attention.shape).reshape(-1, 3)
        page.assert_colours(cells[1:], "LIGHT.sequential", ((attention - low) / (high - low)).ravel()[1:])
        page.check("#by-layer")


def test_values_threshold_and_a_warning_in_sight_wherever_one_scrolls(tab: Any, library: Any) -> None:
    page = tab().compute(UBIQUITIN)
    for y in (0, 1200, 10**6):
        page.evaluate("y => scrollTo(0, y)", y)
        page.settle()
        box = page.locator("#synthetic").bounding_box()
        assert 0 <= box["y"] < 200 - box["height"]
    assert "synthetic weights" in page.inner_text("#synthetic").lower()
    assert "synthetic weights" in page.text_content("#result-about")
    assert "SYNTHETIC WEIGHTS" in (PAGE / "picture.js").read_text()

    expected = library(UBIQUITIN)
    contacts = expected.contacts
    page.locator("#contact-map").scroll_into_view_if_needed()
    data = page.eval_on_selector("#contact-map", "canvas => ({...canvas.dataset})")
    cell = float(data["side"]) / len(UBIQUITIN)
    position = {"x": float(data["left"]) + 60.5 * cell, "y": float(data["top"]) + 9.5 * cell}
    page.hover("#contact-map", position=position)
    text = as_shown(contacts[9, 60])
    assert page.text_content("#tip") == f"G10 – I61: probability {text}"
    assert page.text_content("#contact-readout .value") == text
    scores = log_odds(UBIQUITIN, expected.logits)
    page.hover("#mutation-map canvas.strip", position={"x": 26 + 2.5 * 14, "y": 20 + 3.5 * 16})
    assert page.text_content("#tip").startswith("I3L: log-odds " + f"{scores[2, 3]:+.2f}".replace("-", "−"))

    assert counted(page) == count_contacts(contacts, 0.5)
    page.focus("#threshold")
    for key, threshold in (("ArrowRight", 0.51), ("Home", 0.01)):
        page.press(key)
        assert counted(page) == count_contacts(contacts, threshold)
    page.uncheck("#separated")
    assert counted(page) == count_contacts(contacts, 0.01, apart=1)
    page.click("summary")
    strongest = [row.split("\t")[0].strip() for row in page.locator("#strongest tbody tr").all_inner_texts()]
    i, j = np.triu_indices(len(UBIQUITIN), k=1)
    order = np.argsort(-contacts[i, j], kind="stable")[:20]
    assert strongest == [
        f"{UBIQUITIN[a]}{a + 1} – {UBIQUITIN[b]}{b + 1}" for a, b in zip(i[order], j[order], strict=True)
    ]


def test_2048_residues(tab: Any, library: Any) -> None:
    sequence = random_sequence(2048)
    page = tab().compute(sequence)
    contacts = library(sequence).contacts
    page.focus("#contact-map")
    page.press("Home", "PageUp")
    data = page.eval_on_selector("#contact-map", "canvas => ({...canvas.dataset})")
    left, top, side = (int(float(data[name])) for name in ("left", "top", "side"))
    assert side >= 600
    # A pixel shows the largest of the cells under it: a single contact is not lost.
    first = np.arange(side) * 2048 // side
    last = np.maximum(first, -(-(np.arange(side) + 1) * 2048 // side) - 1)
    pooled = np.array([contacts[a : b + 1].max(axis=0) for a, b in zip(first, last, strict=True)])
    pooled = np.array([pooled[:, a : b + 1].max(axis=1) for a, b in zip(first, last, strict=True)]).T
    y, x = np.triu_indices(side, k=8)
    y, x = y[y > 4], x[y > 4]
    page.assert_colours(page.pixels("#contact-map")[top + y, left + x], "LIGHT.sequential", pooled[y, x])
    assert counted(page) == count_contacts(contacts, 0.5)
    # The strips hold all columns, paint those in view, and go to the end by one key.
    box = page.locator("#mutation-map .strip-box")
    box.focus()
    page.press("End")
    assert f"{sequence[-1]}2048" in page.text_content("#mutation-map .strip-readout")
    assert box.evaluate("b => b.scrollLeft + b.clientWidth >= b.scrollWidth - 2")
    assert page.eval_on_selector("#mutation-map canvas.strip", "c => c.width") < 1300
    # Every pair at once.
    page.focus("#threshold")
    page.press("Home")
    assert counted(page) == count_contacts(contacts, 0.01)
    page.fill("#threshold", "0.5")
    lines = page.download("text=Whole map (CSV)").split()
    assert len(lines) == 2048
    np.testing.assert_array_equal(np.array(lines[700].split(b","), np.float32), contacts[700])


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_bad_input_is_named_and_shown(tab: Any) -> None:
    page = tab()
    page.on("request", lambda request: request.method == "POST" and page.complaints.append("sent"))
    for text, message, selected in (
        ("MKT1A", "The sequence: “1” at position 4 is not allowed (a number", "1"),
        (">a\nMKTAY\n>b two\nMKTA\nYJAK\n", "Record 2 (b): “J” at position 6 is not allowed", "J"),
        ("MK<mask>A", "“<” at position 3 is not allowed (masks belong", "<"),
        (">a\nMK*A\n", "“*” at position 3 is not allowed (a stop inside", "*"),
        (">a\n>b\nMK\n", "Record 1 (a) has no sequence", ">a"),
        ("MKTA\n>b\nMK\n", "Sequence before the first > header", "MKTA"),
        ("MKTAßYI", "“ß” at position 5", "ß"),
        ("MK\U0001f600T", "“\U0001f600” at position 3", "\U0001f600"),
        ("MK\u200bT", "“U+200B” at position 3", "\u200b"),
        ("A" * 2049, "has 2049 residues; at most 2048 are allowed", "A"),
        *((text, "Paste a sequence, or pick an example.", "") for text in ("", "  \n\t\n", "; only a comment")),
        (">a\nMK\n" * 101, "101 sequences; the page takes 100", ""),
        ("A" * 4_000_001, "4.0 million", ""),
    ):
        page.evaluate("text => (document.getElementById('sequence').value = text)", text)
        page.click("#compute")
        assert message in page.text_content("#problems")
        assert page.get_attribute("#sequence", "aria-invalid") == "true"
        if selected:
            page.get_by_role("button", name="Show").first.click()
            assert page.evaluate("getSelection().toString()") == selected
        assert page.input_value("#sequence") == text
        page.fill("#sequence", "MKTAYI")  # mending takes the complaint away
        page.wait_for_selector("#problems ul", state="detached")
        assert page.get_attribute("#sequence", "aria-invalid") == "false"


def test_fasta_is_read_as_the_library_reads_it(tab: Any) -> None:
    page = tab()

    def by_page(text: str) -> list[tuple[str, str]] | None:
        found = page.evaluate("async text => (await import('/page/fasta.js')).parse(text)", text)
        return None if found["problems"] else [(r["header"], r["sequence"]) for r in found["records"]]

    def by_library(text: str) -> list[tuple[str, str]] | None:
        try:
            return [(r.description, r.sequence) for r in read_fasta(io.BytesIO(text.encode()))]
        except InvalidSequence:
            return None

    texts = [
        ">a one\nMKTAYI\nAKQR\n>b\nMK\n",
        ">a one\r\nmktayi\r\nakqr*\r\n\r\n>b\r\n mk \r\n",
        "; old comment\n>a|b|c d e\nMK TA\tYI\n",
        "\ufeff>a\nMK-X\n",
        "MKTAYI\nWCHE\nMK\n",
        ">\nMK\n",
        ">a\nMKTAYI*\n>b\nMK\n",
        "  >indented\nMK\n",
        ">a\nMK\n\n\nTA\n",
        (PAGE.parents[1] / "data" / "example_proteins.fasta").read_text(),
    ]
    refused = [">a\n>b\nMK", "MK\n>a\nMK", ">a\n*\n"]
    # Lines without a header are one wrapped sequence, or one sequence each.
    for widths in ((60, 60, 30), (60, 60), (75, 75, 1), (35, 35, 20), (35, 35), (20, 20, 5), (60, 50), (1030, 1030)):
        texts.append("\n".join(random_sequence(width, i) for i, width in enumerate(widths)))
    for text in texts + refused:
        assert by_page(text) == by_library(text), text
        assert (by_page(text) is None) == (text in refused)
    page.set_input_files("#file", {"name": "x.fasta", "mimeType": "text/plain", "buffer": texts[10].encode()})
    page.says("#summary", "1 sequence, 150 residues (read as one wrapped sequence)")
    assert page.input_value("#sequence") == texts[10]


def test_examples_are_the_proteins_they_say_and_docs_name_this_service(tab: Any, address: str) -> None:
    page = tab()
    examples = page.evaluate("async () => (await import('/page/examples.js')).EXAMPLES")
    ours = {example["header"].split()[0]: example["sequence"] for example in examples}
    named = {r.id: r.sequence for r in packaged("example_proteins.fasta")}
    for name in ("UniRef50_UPI000836A30F", "UniRef50_A0A1E3NP16"):
        assert ours.pop(name) == named[name]
    lengths = {"P0CG48": 76, "P00974": 58, "P00698": 129, "P01308": 110, "P42212": 238}
    assert {name: len(sequence) for name, sequence in ours.items()} == lengths
    page.goto(f"{address}docs")
    page.says("#models", re.compile("^esm2-8m .*: encode, predict, log_prob$"))
    assert page.inner_text("pre >> nth=0").startswith(f"curl {address}api/v3/esm2-8m/encode/")


def test_records_of_one_residue_of_two_and_with_a_hostile_header(tab: Any, library: Any) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'{{7*7}}../../etc/passwd\u202e"
    second = random_sequence(40)
    page = tab().compute(f">{evil}\nMKTAYI\n>two some words\n{second}\n>three\nM\n>four\nXB\n", "4 of 4 done")
    assert page.locator("main img, main script").count() == 0
    records = page.locator("#record-list button")
    assert [text.split()[0] for text in records.all_inner_texts()] == [evil.split()[0], "two", "three", "four"]
    assert page.text_content("#result-title") == evil.split()[0]
    with page.expect_download() as waiting:
        page.click("text=These contacts (CSV)")
    assert re.fullmatch(r"[A-Za-z0-9_][\w.-]*\.contacts\.csv", waiting.value.suggested_filename)
    records.nth(1).click()
    assert page.text_content("#result-title") == "two"
    assert records.nth(1).get_attribute("aria-current") == "true"
    check_map(page, library(second).contacts)
    assert second in page.text_content("#code")
    for number, sequence, message in ((2, "M", "One residue"), (3, "XB", "No two of 2 residues are 6 apart")):
        records.nth(number).click()
        assert message in page.text_content("#contact-count")
        for box in ("#separated", "#split"):
            page.uncheck(box)
        contacts = library(sequence).contacts
        page.assert_colours(page.cells("#contact-map", *contacts.shape), "LIGHT.sequential", contacts)
        page.focus("#contact-map")
        page.press("ArrowLeft", "ArrowDown", "ArrowRight", "ArrowUp", "n", "p", "End", "PageDown")
        page.check("#separated")


# -- when it does not go well ----------------------------------------------------------------------------------------


def test_what_goes_wrong_is_said_and_input_is_kept(tab: Any) -> None:
    page = tab()
    body = {"detail": "refused", "errors": [], "error": {"items__0__sequence": ["item 0: no tryptophan here"]}}
    answer: dict[str, Any] = {"json": body}  # as the service does it; without a status, the connection is broken
    busy = "The server is busy; trying again in 1 s (attempt 2 of 5)"
    for status, seconds, text, statuses in (
        (503, "1", "MKTAYI", [busy, "Done in"]),
        (503, "900", "MKTAYI", ["The server is busy. It asks to try again in 900 s."]),
        (0, "", "MKTAYI", ["The server cannot be reached"]),
        (422, "", ">w\nWWW\n>k\nKKK\n", ["1 of 2 done, 1 failed."]),
    ):
        answer.update(status=status, headers={"Retry-After": seconds})
        page.route("**/encode/", lambda r: r.fulfill(**answer) if answer["status"] else r.abort(), times=1)
        page.compute(text, *statuses)
        assert page.input_value("#sequence") == text
    assert page.text_content("#problems") == "w: no tryptophan here"
    assert "no tryptophan" in page.locator("#record-list button").nth(0).inner_text()
    assert page.text_content("#result-title") == "k"
    page.complaints.clear()  # Chromium logs what was refused
    page.load()
    page.route("**/encode/", lambda _: None, times=1)  # never answered
    page.compute("MKTAYI", "Computing")
    page.click("#cancel")
    page.wait_for_selector("text=Cancelled.")
    assert page.is_hidden("#cancel")
    assert page.is_hidden("#results")
    page.compute("MKTAYI")


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_only_the_heads_that_weights_have_are_asked_and_shown(tab: Any, head: str) -> None:
    """Classes of a classifier; contacts only where there is a contact head."""
    classifier = Classifier(head, ("<b>inside</b>", "outside"), PROBLEM_TYPES[0])
    checkpoint = random_checkpoint(replace(SMALL, classifier=classifier))
    for name in [name for name in checkpoint.tensors if name.startswith("contact_head")]:
        del checkpoint.tensors[name]
    model = ESM2(checkpoint, backend="numpy")
    with ServiceHere({"tuned": model}) as running:
        page = tab(f"{running.url}/").compute("MKTAYI")
        found = json.loads(page.download("#save-json"))["results"][0]
    expected = model.classify(["MKTAYI"])[0]
    assert set(found) == {"sequence_index", "logits", "vocab_tokens", "attentions", "classes", "labels"}
    assert page.is_hidden("#contacts-section")
    assert page.is_visible("#mutations-section")
    assert '"contacts"' not in page.text_content("#code")
    assert found["labels"] == expected.labels
    np.testing.assert_allclose(found["classes"], expected.probabilities, atol=1e-5)
    if head == "sequence":
        probability, label = max(zip(expected.probabilities, expected.labels, strict=True))
        assert page.text_content("#class-table tbody tr") == f"{label}{probability:.4f}"
    else:
        assert page.is_visible("#class-map canvas.strip")


# -- how it is used --------------------------------------------------------------------------------------------------


def test_keyboard_alone(tab: Any, library: Any) -> None:
    page = tab(reduced_motion="reduce")

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.className"))

    def tab_to(wanted: str) -> None:
        for _ in range(40):
            page.press("Tab")
            if focused() == wanted:
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"focus on {wanted} cannot be seen"
                return
        pytest.fail(f"Tab does not reach {wanted}")

    page.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the sequence"
    tab_to("sequence")
    page.keyboard.insert_text(f">kb\n{UBIQUITIN}")
    tab_to("compute")
    page.press("Enter")
    page.wait_for_selector("text=Done in")
    contacts = library(UBIQUITIN).contacts
    i, j = np.unravel_index(np.triu(contacts, 6).argmax(), contacts.shape)
    strongest = re.compile(f"^{UBIQUITIN[i]}{i + 1} – {UBIQUITIN[j]}{j + 1}:")
    to_q2_i13 = "Home PageUp ArrowRight ArrowRight Shift+ArrowRight ArrowDown"
    for wanted, keys, place, text in [
        ("contact-map", to_q2_i13, "#spoken", f"Q2 – I13: probability {as_shown(contacts[1, 12])}"),
        ("", "n", "#spoken", strongest),
        ("threshold", "ArrowLeft", "#threshold-value", "0.49"),
        ("split", "Space", "#split:not(:checked)", ""),
        ("strip-box", "ArrowDown", "#spoken", re.compile("^M1V: log-odds")),
        ("code-tab-0", "ArrowRight", "#code", re.compile("import requests")),
    ]:
        if wanted:
            tab_to(wanted)
        page.press(*keys.split())
        page.says(place, text)
    assert focused() == "code-tab-1"
    page.press("Shift+Tab")
    assert focused() != "code-tab-0"


def test_phone_has_no_sideways_scroll(tab: Any) -> None:
    page = tab(viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True, is_mobile=True)
    for length in (0, 2, 60):
        if length:
            page.compute(f">{'averylongname' * 12} {'word ' * 60}\n{random_sequence(length)}\n")
            page.click("summary")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("visualViewport.scale") == 1
        wide = page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter(e => e.getClientRects().length
                  && !e.closest(".strip-box, pre, .skip, #tip") && e.getBoundingClientRect().right > 360.5)
                  .map(e => e.tagName + "#" + e.id)"""
        )
        assert wide == []
    page.tap("#contact-map", position={"x": 200, "y": 100})
    assert page.is_visible("#tip")


def test_text_has_the_contrast_of_wcag_aa() -> None:
    def luminance(digits: str) -> float:
        c = np.array(list(bytes.fromhex(digits))) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    pairs = (
        "text/ground text/sheet text/wrong-soft text/accent-soft text/code soft/ground soft/sheet "
        "accent/sheet accent-ink/accent wrong/sheet"
    )
    both = re.findall(r"--([\w-]+): light-dark\(#(\w{6}), #(\w{6})\)", (PAGE / "style.css").read_text())
    for value in ({name: light for name, light, _ in both}, {name: dark for name, _, dark in both}):
        for pair in pairs.split():
            a, b = sorted(luminance(value[name]) for name in pair.split("/"))
            assert (b + 0.05) / (a + 0.05) >= 4.5, pair


# -- what is taken along ---------------------------------------------------------------------------------------------


def test_downloads_hold_the_librarys_numbers(tab: Any, library: Any) -> None:
    sequence = UBIQUITIN[:40] + "XB-"
    page = tab().compute(f">dl\n{sequence}")
    expected = library(sequence)
    document = json.loads(page.download("#save-json"))
    assert (document["name"], document["model"], document["sequence"]) == ("dl", "esm2-8m", sequence)
    assert document["synthetic_weights"] is True
    check_result(document["results"][0], expected)

    def table(button: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(page.download(button).decode())))

    rows = table("text=These contacts (CSV)")
    assert len(rows) == count_contacts(expected.contacts, 0.5)
    for row in rows:
        i, j = int(row["position_1"]) - 1, int(row["position_2"]) - 1
        assert (row["residue_1"], row["residue_2"]) == (sequence[i], sequence[j])
        assert np.float32(row["probability"]) == expected.contacts[i, j]

    rows = table("text=Scores (CSV)")
    mutants = [(str(i), letter, mutant) for i, letter in enumerate(sequence, start=1) for mutant in ROWS]
    assert [(row["position"], row["residue"], row["mutant"]) for row in rows] == mutants
    found = np.array([float(row["log_odds"] or "nan") for row in rows]).reshape(-1, 20)
    np.testing.assert_allclose(found, log_odds(sequence, expected.logits), rtol=1e-7, atol=1e-7)

    rows = table("text=Values (CSV)")
    found = np.array([[np.float32(row[f"layer_{k + 1}"]) for row in rows] for k in range(SMALL.num_layers)])
    np.testing.assert_array_equal(found, expected.attentions)

    for number in range(3):
        picture = read_png(page.download(f"text=Picture (PNG) >> nth={number}"))
        assert (np.array(picture.shape[:2]) > [200, 500]).all()
        assert len(np.unique(picture @ [65536, 256, 1])) > 50  # colours


def check_result(result: dict[str, Any], expected: Any) -> None:
    """An answer as JSON, bit for bit the library's."""
    for name in INCLUDE:
        np.testing.assert_array_equal(np.array(result[name], dtype=np.float32), getattr(expected, name))
    assert result["vocab_tokens"] == expected.vocab_tokens


def run(*command: str) -> bytes:
    """stdout of a program that has the key."""
    environment = os.environ | {"NUMPYESM_API_KEY": KEY, "PYTHONPATH": str(PAGE.parents[2])}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_key_is_kept_in_the_tab_and_shown_code_gives_what_is_shown(tab: Any, tmp_path: Path) -> None:
    sequence = UBIQUITIN + "X-"
    model = ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy")
    expected = model.encode([sequence], include=INCLUDE)[0]
    with ServiceHere({"esm2-8m": model}, [KEY]) as service:
        page = tab(f"{service.url}/")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.fill("#sequence", sequence)
        page.click("#compute")
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.type("wrong")
        page.press("Enter")
        page.wait_for_selector("text=The server did not accept this key")
        page.fill("#key", KEY)
        page.press("Enter")
        page.wait_for_selector("text=Done in")
        page.complaints.clear()  # Chromium logs every 401
        assert page.evaluate("sessionStorage.getItem('numpyesm-key')") == KEY
        assert page.evaluate("Object.keys(localStorage).length") == 0

        page.fill("#threshold", "0.3")
        count, codes = counted(page), {}
        for one in page.get_by_role("tab").all():
            one.click()
            codes[one.inner_text()] = page.text_content("#code")
        assert KEY not in page.content()
        check_result(json.loads(run("bash", "-c", codes["curl"]))["results"][0], expected)
        out = tmp_path / "out.npz"
        save = f"\nnp.savez({str(out)!r}, contacts=contacts, attentions=attentions, scores=scores, count=len(pairs))\n"
        for title in ("Python, requests", "Python, this library"):
            assert b"contacts" in run(sys.executable, "-W", "ignore", "-c", codes[title] + save)
            with np.load(out) as found:
                np.testing.assert_array_equal(found["contacts"], expected.contacts)
                np.testing.assert_array_equal(found["attentions"].astype(np.float32), expected.attentions)
                scores = log_odds(sequence, expected.logits)
                np.testing.assert_allclose(found["scores"][:, ORDER], scores, rtol=1e-6, atol=1e-6)
                assert found["count"] == count
        page.click("#copy")
        page.wait_for_selector("text=Copied.")
        assert page.evaluate("navigator.clipboard.readText()") == codes["Python, this library"]
        page.load()  # the tab remembers
        page.compute("MKTA")
        assert page.is_hidden("#key-dialog")
