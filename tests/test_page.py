"""The page as a reader uses it: headless Chromium against the real service, compared with the library."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import (
    PAGE,
    Tab,
    assert_colours,
    chromium,
    colours,
    map_cells,
    off_cursor,
    pixels,
    says,
    settle,
    shades,
    strip_cells,
)
from conftest import random_sequence
from running_service import serving_here

from numpyesm import ESM2, InvalidSequence
from numpyesm.alphabet import AMINO_ACIDS
from numpyesm.config import PROBLEM_TYPES, Classifier, ModelConfig
from numpyesm.fasta import Record, packaged, read_fasta
from numpyesm.weights.synthetic import random_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::numpyesm.InputWarning"),
    pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning"),
]
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
ROWS = "AVILMCFWYGPSTNQHKRDE"
INCLUDE = ["contacts", "logits", "attentions"]
KEY = "sesame-1234"
CONFIG = ModelConfig(num_layers=3, embed_dim=32, num_heads=4, ffn_dim=64)


@pytest.fixture(scope="module")
def model() -> ESM2:
    return ESM2(random_checkpoint(CONFIG, 1), backend="numpy")


@pytest.fixture(scope="module")
def address(model: ESM2) -> Iterator[str]:
    with serving_here({"esm2-8m": model}) as running:
        yield f"{running.url}/"


@pytest.fixture(scope="module")
def library(model: ESM2) -> Callable[[str], Any]:
    return lambda sequence: model.encode([sequence], include=INCLUDE)[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Callable[..., Tab]]:
    """Opens tabs; at the end none may have complained or left the origin."""
    tabs: list[Tab] = []

    def make(url: str = address, **options: Any) -> Tab:
        tabs.append(Tab(browser, url, **({"viewport": {"width": 1280, "height": 900}} | options)))
        return tabs[-1]

    yield make
    complaints = [complaint for one in tabs for complaint in one.complaints]
    for one in tabs:
        one.context.close()
    assert complaints == []


def log_odds(sequence: str, logits: np.ndarray) -> np.ndarray:
    """(L, 20) in the order of the page's rows; NaN where the residue is none of the 20."""
    x = logits.astype(np.float64)
    x -= np.logaddexp.reduce(x, axis=1, keepdims=True)
    scores = np.full_like(x, np.nan)
    for i, letter in enumerate(sequence):
        if letter in AMINO_ACIDS:
            scores[i] = x[i] - x[i, AMINO_ACIDS.index(letter)]
    return scores[:, [AMINO_ACIDS.index(letter) for letter in ROWS]]


def count_contacts(contacts: np.ndarray, threshold: float, apart: int = 6) -> int:
    i, j = np.triu_indices(len(contacts), k=apart)
    return int((contacts[i, j] >= np.float32(threshold)).sum())


def counted(page: Any) -> int:
    """How many contacts the page says there are."""
    settle(page)
    return int(page.text_content("#contact-count").split()[0].replace(",", ""))


def as_shown(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.1e}".replace("e-0", "e-")


def check_upper_half(page: Any, contacts: np.ndarray, table: str = "sequentialLight") -> None:
    """Above the diagonal stands every probability, in its colour (the cursor's line runs along the first row)."""
    off_cursor(page)
    i, j = np.triu_indices(len(contacts), k=1)
    i, j = i[i > 0], j[i > 0]
    assert_colours(map_cells(page, len(contacts))[i, j], colours(table), shades(contacts[i, j], 0, 1))


# -- what is drawn ---------------------------------------------------------------------------------------------------


def test_example_is_drawn_as_the_library_computes_it(tab: Any, library: Any) -> None:
    page = tab()
    page.get_by_role("button", name="Ubiquitin").click()
    page.wait_for_selector("#results:not([hidden])")
    assert page.text_content("#result-title") == "P0CG48"
    length, contacts = len(UBIQUITIN), library(UBIQUITIN).contacts
    check_upper_half(page, contacts)
    # Below the diagonal: contacts that count, in their colour, and the colour of nothing elsewhere; all, once asked.
    i, j = np.tril_indices(length, k=-1)
    i, j = i[j > 0], j[j > 0]
    counts = (contacts[i, j] >= 0.5) & (i - j >= 6)
    for shown in (np.where(counts, contacts[i, j], 0), contacts[i, j]):
        settle(page)
        assert_colours(map_cells(page, length)[i, j], colours("sequentialLight"), shades(shown, 0, 1))
        page.uncheck("#split")


def test_mutations_and_attention_are_drawn(tab: Any, library: Any) -> None:
    sequence = "MKTXBAYIAKQRZUO-WCHE"
    page = tab().compute(sequence)
    expected = library(sequence)
    scores = log_odds(sequence, expected.logits).T
    known = np.isfinite(scores)
    limit = np.ceil(np.nanmax(np.abs(scores)) * 10) / 10
    cells = strip_cells(page, "#mutation-map", 20, len(sequence))
    known[0, 0] = False  # under the cursor
    assert_colours(cells[known], colours("divergingLight"), shades(scores[known], -limit, limit))
    assert known.sum() == 20 * 14 - 1
    unknown = ~np.isfinite(scores)
    assert (cells[unknown] == [0xD8, 0xDC, 0xE0]).all()  # no wild type: no value, no colour of a value

    attention = expected.attentions
    lows, highs = attention.min(axis=1, keepdims=True), attention.max(axis=1, keepdims=True)
    for low, high in ((attention.min(), attention.max()), (lows, highs)):
        cells = strip_cells(page, "#attention-map", len(attention), len(sequence)).reshape(-1, 3)[1:]
        index = shades((attention - low) / (high - low), 0, 1).ravel()[1:]
        assert_colours(cells, colours("sequentialLight"), index)
        page.check("#by-layer")


def test_values_threshold_and_banner(tab: Any, library: Any) -> None:
    page = tab().compute(UBIQUITIN)
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
        page.keyboard.press(key)
        assert counted(page) == count_contacts(contacts, threshold)
    page.uncheck("#separated")
    assert counted(page) == count_contacts(contacts, 0.01, apart=1)
    page.click("summary")
    strongest = [row.split("\t") for row in page.locator("#strongest tbody tr").all_inner_texts()]
    i, j = np.triu_indices(len(UBIQUITIN), k=1)
    order = np.argsort(-contacts[i, j], kind="stable")[:20]
    assert [row[0].strip() for row in strongest] == [
        f"{UBIQUITIN[i[k]]}{i[k] + 1} – {UBIQUITIN[j[k]]}{j[k] + 1}" for k in order
    ]

    banner = page.locator("#synthetic")
    for y in (0, 1200, 10**6):
        page.evaluate("y => scrollTo(0, y)", y)
        settle(page)
        box = banner.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] < 200
    assert "synthetic weights" in banner.inner_text().lower()
    assert "synthetic weights" in page.text_content("#result-about")
    assert "SYNTHETIC WEIGHTS" in (PAGE / "picture.js").read_text()


def test_one_and_two_residues(tab: Any, library: Any) -> None:
    page = tab()
    for sequence, message in (("M", "One residue"), ("XB", "No two of 2 residues are 6 apart")):
        page.compute(sequence)
        assert message in page.text_content("#contact-count")
        page.uncheck("#separated")
        page.uncheck("#split")
        settle(page)
        index = shades(library(sequence).contacts, 0, 1)
        assert_colours(map_cells(page, len(sequence)), colours("sequentialLight"), index)
        page.focus("#contact-map")
        for key in ("ArrowLeft", "ArrowDown", "ArrowRight", "ArrowUp", "n", "p", "End", "PageDown"):
            page.keyboard.press(key)
        page.load()


def test_2048_residues(tab: Any, library: Any) -> None:
    sequence = random_sequence(2048)
    page = tab().compute(sequence)
    contacts = library(sequence).contacts
    off_cursor(page)
    data = page.eval_on_selector("#contact-map", "canvas => ({...canvas.dataset})")
    left, top, side = (int(float(data[name])) for name in ("left", "top", "side"))
    assert side >= 600
    found = pixels(page, "#contact-map")[top : top + side, left : left + side].astype(np.int64)
    # A pixel shows the largest of the cells under it: a single contact is not lost.
    first = np.arange(side) * 2048 // side
    last = np.maximum(first, -(-(np.arange(side) + 1) * 2048 // side) - 1)
    pooled = np.array([contacts[a : b + 1].max(axis=0) for a, b in zip(first, last, strict=True)])
    pooled = np.array([pooled[:, a : b + 1].max(axis=1) for a, b in zip(first, last, strict=True)]).T
    y, x = np.triu_indices(side, k=8)
    y, x = y[y > 4], x[y > 4]
    assert_colours(found[y, x], colours("sequentialLight"), shades(pooled[y, x], 0, 1))
    assert counted(page) == count_contacts(contacts, 0.5)
    # The strips hold all columns, paint those in view, and go to the end by one key.
    box = page.locator("#mutation-map .strip-box")
    box.focus()
    page.keyboard.press("End")
    assert f"{sequence[-1]}2048" in page.text_content("#mutation-map .strip-readout")
    assert box.evaluate("b => b.scrollLeft + b.clientWidth >= b.scrollWidth - 2")
    assert page.eval_on_selector("#mutation-map canvas.strip", "c => c.width") < 1300
    # Every pair at once.
    page.focus("#threshold")
    page.keyboard.press("Home")
    assert counted(page) == count_contacts(contacts, 0.01)
    page.fill("#threshold", "0.5")
    lines = page.download("text=Whole map (CSV)").split()
    assert len(lines) == 2048
    np.testing.assert_array_equal(np.array(lines[700].split(b","), np.float32), contacts[700])
    page.set_viewport_size({"width": 360, "height": 740})
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


# -- what is asked ---------------------------------------------------------------------------------------------------

BAD = [
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
]


def test_bad_input_is_named_and_shown(tab: Any) -> None:
    page = tab()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.method))
    for text, message, selected in BAD:
        page.fill("#sequence", text)
        page.click("#compute")
        assert message in page.text_content("#problems")
        assert page.get_attribute("#sequence", "aria-invalid") == "true"
        page.get_by_role("button", name="Show").first.click()
        box = "b => b.value.slice(b.selectionStart, b.selectionEnd)"
        assert page.eval_on_selector("#sequence", box) == selected
        assert page.input_value("#sequence") == text
        page.fill("#sequence", "MKTAYI")  # mending takes the complaint away
        page.wait_for_selector("#problems ul", state="detached")
        assert page.get_attribute("#sequence", "aria-invalid") == "false"
    for text, message in (
        ("", "Paste a sequence, or pick an example."),
        ("  \n\t\n", "Paste a sequence, or pick an example."),
        ("; only a comment", "Paste a sequence, or pick an example."),
        (">a\nMK\n" * 101, "101 sequences; the page takes 100"),
        ("A" * 4_000_001, "4.0 million"),
    ):
        page.evaluate("text => (document.getElementById('sequence').value = text)", text)
        page.click("#compute")
        assert message in page.text_content("#problems")
    assert "POST" not in requests


def as_library_reads(text: str) -> list[Record]:
    return list(read_fasta(io.BytesIO(text.encode())))


def test_fasta_is_read_as_the_library_reads_it(tab: Any) -> None:
    page = tab()
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
    for text in texts:
        found = page.evaluate("async text => (await import('/page/fasta.js')).parse(text)", text)
        assert found["problems"] == [], text
        expected = as_library_reads(text)
        assert [(r["header"], r["sequence"]) for r in found["records"]] == [
            (r.description, r.sequence) for r in expected
        ], text
    for text in (">a\n>b\nMK", "MK\n>a\nMK", ">a\n*\n"):
        found = page.evaluate("async text => (await import('/page/fasta.js')).parse(text)", text)
        assert found["problems"], text
        with pytest.raises(InvalidSequence):
            as_library_reads(text)
    for widths in ((60, 60, 30), (60, 60), (75, 75, 1), (35, 35, 20), (35, 35), (20, 20, 5), (60, 50), (1030, 1030)):
        text = "\n".join(random_sequence(width, i) for i, width in enumerate(widths))
        found = page.evaluate("async text => (await import('/page/fasta.js')).parse(text)", text)
        assert [r["sequence"] for r in found["records"]] == [r.sequence for r in as_library_reads(text)], widths
    # A sequence that is wrapped is one, and the page says so.
    sequence = random_sequence(150)
    wrapped = "\n".join(sequence[k : k + 60] for k in range(0, 150, 60))
    page.fill("#sequence", wrapped)
    says(page, "#summary", "1 sequence, 150 residues (read as one wrapped sequence)")


def test_examples_are_the_proteins_they_say(tab: Any) -> None:
    page = tab()
    examples = page.evaluate("async () => (await import('/page/examples.js')).EXAMPLES")
    named = {r.id: r.sequence for r in packaged("example_proteins.fasta")}
    ours = {example["header"].split()[0]: example["sequence"] for example in examples}
    assert {name for name in ours if name in named} == {"UniRef50_UPI000836A30F", "UniRef50_A0A1E3NP16"}
    assert all(ours[name] == named[name] for name in ours if name in named)
    lengths = {"P0CG48": 76, "P00974": 58, "P00698": 129, "P01308": 110, "P42212": 238}
    assert {name: len(sequence) for name, sequence in ours.items() if name in lengths} == lengths


def test_several_records(tab: Any, library: Any) -> None:
    second = random_sequence(40)
    page = tab().compute(f">one some words\n{UBIQUITIN}\n>two\n{second}\n>three\nMK\n", "3 of 3 done")
    records = page.locator("#record-list button")
    assert [text.split()[0] for text in records.all_inner_texts()] == ["one", "two", "three"]
    assert page.text_content("#result-title") == "one"
    records.nth(1).click()
    assert page.text_content("#result-title") == "two"
    assert page.get_attribute("#record-list li:nth-child(2) button", "aria-current") == "true"
    check_upper_half(page, library(second).contacts)
    assert second in page.text_content("#code")


def test_hostile_header_is_text(tab: Any) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'{{7*7}}../../etc/passwd\u202e"
    page = tab()
    for text, place in ((f">{evil}\nMKTAYI\n>b\nMK\n", "#results"), (f">{evil}\nMK9\n", "#problems")):
        page.fill("#sequence", text)
        page.click("#compute")
        page.wait_for_selector(f"{place}:not([hidden])")
        settle(page)
        assert page.locator("main img, main script").count() == 0
    assert page.text_content("#result-title") == evil.split()[0]
    with page.expect_download() as waiting:
        page.click("text=These contacts (CSV)")
    assert re.fullmatch(r"[A-Za-z0-9_][\w.-]*\.contacts\.csv", waiting.value.suggested_filename)


def test_open_a_file(tab: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(">from file\nMKTAYI\n")
    page = tab()
    page.set_input_files("#file", path)
    says(page, "#summary", "1 sequence, 6 residues")
    assert page.input_value("#sequence") == ">from file\nMKTAYI\n"


# -- when it does not go well ----------------------------------------------------------------------------------------


def refuse(status: int, times: int = 10**9, **headers: str) -> Callable[[Any], None]:
    """A handler that refuses the first requests as the service does, and lets the others through."""
    left = [times]
    detail = "the queue is full" if status == 503 else "item 0: this server wants no tryptophan"
    error = {"items__0__sequence": [detail]}
    body = {"detail": detail, "errors": [], "status_code": status, "code": "user.validation", "error": error}

    def handle(route: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            route.continue_()
        else:
            route.fulfill(status=status, headers=headers, content_type="application/json", body=json.dumps(body))

    return handle


def test_what_goes_wrong_is_said_and_input_is_kept(tab: Any) -> None:
    page = tab()
    busy = "The server is busy; trying again in 1 s (attempt 2 of 5)"
    for handler, text, statuses in (
        (refuse(503, times=1, **{"Retry-After": "1"}), "MKTAYI", [busy, "Done in"]),
        (refuse(503, **{"Retry-After": "900"}), "MKTAYI", ["The server is busy. It asks to try again in 900 s."]),
        (lambda route: route.abort(), "MKTAYI", ["The server cannot be reached"]),
        (refuse(422, times=1), ">w\nWWW\n>k\nKKK\n", ["1 of 2 done, 1 failed."]),
    ):
        page.route("**/encode/", handler)
        page.compute(text, *statuses)
        assert page.input_value("#sequence") == text
        page.unroute("**/encode/")
    assert page.text_content("#problems") == "w: this server wants no tryptophan"
    assert "no tryptophan" in page.locator("#record-list button").nth(0).inner_text()
    assert page.text_content("#result-title") == "k"
    page.complaints.clear()  # Chromium logs what was refused


def test_cancel(tab: Any) -> None:
    page = tab()
    page.route("**/encode/", lambda route: None)  # never answered
    page.fill("#sequence", "MKTAYI")
    page.click("#compute")
    page.click("#cancel")
    page.wait_for_selector("text=Cancelled.")
    assert page.is_hidden("#cancel")
    assert page.is_hidden("#results")
    page.unroute("**/encode/")
    page.compute("MKTAYI")


def test_weights_without_a_contact_head(tab: Any) -> None:
    """The server's answer decides what is asked; here it is told that there is no contact head."""

    def no_head(route: Any) -> None:
        body = route.fetch().json()
        for model in body["models"]:
            model["contacts"] = False
        route.fulfill(json=body)

    page = tab()
    page.route("**/models/", no_head)
    page.load()
    page.compute("MKTAYI")
    assert page.is_hidden("#contacts-section")
    assert page.is_visible("#mutations-section")
    assert '"contacts"' not in page.text_content("#code")
    found = json.loads(page.download("#save-json"))["results"][0]
    assert set(found) == {"sequence_index", "logits", "vocab_tokens", "attentions"}


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_classes_are_shown(tab: Any, head: str) -> None:
    config = replace(CONFIG, classifier=Classifier(head, ("<b>inside</b>", "outside"), PROBLEM_TYPES[0]))
    model = ESM2(random_checkpoint(config), backend="numpy")
    with serving_here({"tuned": model}) as running:
        page = tab(f"{running.url}/").compute("MKTAYI")
        expected = model.classify(["MKTAYI"])[0]
        found = json.loads(page.download("#save-json"))["results"][0]
    assert found["labels"] == expected.labels
    np.testing.assert_allclose(found["classes"], expected.probabilities, atol=1e-5)
    if head == "sequence":
        best = int(expected.probabilities.argmax())
        row = page.text_content("#class-table tbody tr")
        assert row == f"{expected.labels[best]}{expected.probabilities[best]:.4f}"
    else:
        assert page.is_visible("#class-map canvas.strip")


# -- how it is used --------------------------------------------------------------------------------------------------


def test_keyboard_alone(tab: Any, library: Any) -> None:
    page = tab(reduced_motion="reduce")

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.className"))

    def tab_to(wanted: str, most: int = 40) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if focused() == wanted:
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"focus on {wanted} cannot be seen"
                return
        pytest.fail(f"Tab does not reach {wanted}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the sequence"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    if focused() != "sequence":  # some versions focus the target itself, some what follows
        page.keyboard.press("Shift+Tab")
    page.focus("body")
    tab_to("sequence")
    page.keyboard.insert_text(f">kb\n{UBIQUITIN}")
    tab_to("compute")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Done in")
    contacts = library(UBIQUITIN).contacts
    tab_to("contact-map")
    for key in ("Home", "PageUp", "ArrowRight", "ArrowRight", "Shift+ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    says(page, "#spoken", f"Q2 – I13: probability {as_shown(contacts[1, 12])}")
    i, j = np.triu_indices(len(UBIQUITIN), k=6)
    k = np.argsort(-contacts[i, j], kind="stable")[0]
    page.keyboard.press("n")
    says(page, "#spoken", re.compile(f"^{UBIQUITIN[i[k]]}{i[k] + 1} – {UBIQUITIN[j[k]]}{j[k] + 1}:"))
    tab_to("threshold")
    page.keyboard.press("ArrowLeft")
    says(page, "#threshold-value", "0.49")
    tab_to("split")
    page.keyboard.press("Space")
    assert not page.is_checked("#split")
    tab_to("strip-box")
    page.keyboard.press("ArrowDown")
    says(page, "#spoken", re.compile("^M1V: log-odds"))
    tab_to("code-tab-0")
    page.keyboard.press("ArrowRight")
    assert focused() == "code-tab-1"
    assert "import requests" in page.text_content("#code")
    page.keyboard.press("Shift+Tab")
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


def test_dark(tab: Any, library: Any) -> None:
    page = tab(color_scheme="dark")
    sequence = random_sequence(60)
    page.compute(sequence)
    ground = "getComputedStyle(document.body).backgroundColor"
    check_upper_half(page, library(sequence).contacts, "sequentialDark")
    assert page.evaluate(ground) == "rgb(14, 18, 29)"
    page.get_by_role("button", name="Light colours").click()
    check_upper_half(page, library(sequence).contacts)
    assert page.evaluate(ground) == "rgb(243, 245, 246)"
    page.reload()  # the choice stays
    assert page.evaluate(ground) == "rgb(243, 245, 246)"


def test_text_has_the_contrast_of_wcag_aa() -> None:
    def luminance(digits: str) -> float:
        c = np.array(list(bytes.fromhex(digits))) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    css = (PAGE / "style.css").read_text()
    for block in (css.split("}")[0], css.split('[data-theme="dark"] {')[1].split("}")[0]):
        value = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", block))
        for ink, ground in [("text", "ground"), ("text", "sheet"), ("soft", "ground"), ("soft", "sheet"),
                            ("accent", "sheet"), ("accent-ink", "accent"), ("wrong", "sheet"),
                            ("text", "wrong-soft"), ("text", "accent-soft"), ("text", "code")]:  # fmt: skip
            a, b = sorted(luminance(value[name]) for name in (ink, ground))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (ink, ground)


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
    assert [(int(r["position"]), r["residue"], r["mutant"]) for r in rows] == [
        (i + 1, letter, mutant) for i, letter in enumerate(sequence) for mutant in ROWS
    ]
    found = np.array([float(r["log_odds"] or "nan") for r in rows]).reshape(-1, 20)
    np.testing.assert_allclose(found, log_odds(sequence, expected.logits), rtol=1e-7, atol=1e-7)

    rows = table("text=Values (CSV)")
    found = np.array([[np.float32(r[f"layer_{k + 1}"]) for r in rows] for k in range(CONFIG.num_layers)])
    np.testing.assert_array_equal(found, expected.attentions)

    from matplotlib.image import imread

    for number in range(3):
        png = page.download(f"text=Picture (PNG) >> nth={number}")
        picture = np.ascontiguousarray(imread(io.BytesIO(png)))  # (height, width, 4)
        assert picture.shape[0] > 200
        assert picture.shape[1] > 500
        assert len(np.unique((picture[..., :3] * 255).astype(np.int64) @ [65536, 256, 1])) > 50  # colours


def check_result(result: dict[str, Any], expected: Any) -> None:
    """An answer as JSON, bit for bit the library's."""
    for name in INCLUDE:
        np.testing.assert_array_equal(np.array(result[name], dtype=np.float32), getattr(expected, name))
    assert result["vocab_tokens"] == expected.vocab_tokens


def run(command: list[str]) -> bytes:
    """stdout of a program that has the key."""
    environment = os.environ | {"NUMPYESM_API_KEY": KEY, "PYTHONPATH": str(PAGE.parents[2])}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_key_is_kept_in_the_tab_and_shown_code_gives_what_is_shown(tab: Any, tmp_path: Path) -> None:
    sequence = UBIQUITIN + "X-"
    model = ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy")
    expected = model.encode([sequence], include=INCLUDE)[0]
    with serving_here({"esm2-8m": model}, [KEY]) as service:
        page = tab(f"{service.url}/")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.fill("#sequence", sequence)
        page.click("#compute")
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The server did not accept this key")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
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
        check_result(json.loads(run(["bash", "-c", codes["curl"]]))["results"][0], expected)
        order = [AMINO_ACIDS.index(letter) for letter in ROWS]
        out = tmp_path / "out.npz"
        ending = (
            f"\nnp.savez({str(out)!r}, contacts=contacts, attentions=attentions, scores=scores, count=len(pairs))\n"
        )
        for title in ("Python, requests", "Python, this library"):
            assert b"contacts" in run([sys.executable, "-W", "ignore", "-c", codes[title] + ending])
            with np.load(out) as found:
                np.testing.assert_array_equal(found["contacts"], expected.contacts)
                np.testing.assert_array_equal(found["attentions"].astype(np.float32), expected.attentions)
                scores = log_odds(sequence, expected.logits)
                np.testing.assert_allclose(found["scores"][:, order], scores, rtol=1e-6, atol=1e-6)
                assert found["count"] == count
        page.click("#copy")
        page.wait_for_selector("text=Copied.")
        assert page.evaluate("navigator.clipboard.readText()") == codes["Python, this library"]
        page.load()  # the tab remembers
        page.compute("MKTA")
        assert page.is_hidden("#key-dialog")


def test_files_are_self_contained() -> None:
    """No address of another host, nothing inline that the policy forbids, nothing that makes HTML of text."""
    for path in sorted(PAGE.iterdir()):
        text = path.read_text()
        addresses = set(re.findall(r"https?://[^\s\"'`)<>]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not {one for one in addresses if not one.startswith("http://127.0.0.1:8000")}, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", text)
