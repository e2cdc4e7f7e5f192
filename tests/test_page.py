"""The page as a reader uses it: headless Chromium against the real service, compared with the library."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PAGE, Tab, assert_colours, chromium, colours, pixels, service, shades
from conftest import random_sequence

from numpyesm import ESM2, InvalidSequence
from numpyesm.alphabet import AMINO_ACIDS
from numpyesm.fasta import parse_fasta, read_fasta

pytestmark = pytest.mark.slow
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
ROWS = "AVILMCFWYGPSTNQHKRDE"
INCLUDE = ["contacts", "logits", "attentions"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with service("--model", "esm2-8m=synthetic:esm2-8m") as url:
        yield url


@pytest.fixture(scope="module")
def library() -> Callable[[str], Any]:
    with pytest.warns(UserWarning, match="SYNTHETIC"):
        model = ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy")
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


def map_cells(page: Any, length: int) -> np.ndarray:
    """Colours at a quarter of each cell of the contact map (its middle may be under the cursor's box): (L, L, 3)."""
    data = page.eval_on_selector("#contact-map", "canvas => ({...canvas.dataset})")
    left, top, side = (float(data[name]) for name in ("left", "top", "side"))
    at = np.floor((np.arange(length) + 0.25) * side / length).astype(int)
    return pixels(page, "#contact-map")[np.ix_(at + int(top), at + int(left))].astype(np.int64)


def strip_cells(page: Any, host: str, rows: int, columns: int) -> np.ndarray:
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


# -- what is drawn ---------------------------------------------------------------------------------------------------


def test_example_is_drawn_as_the_library_computes_it(tab: Any, library: Any) -> None:
    opened = tab()
    page = opened.open()
    opened.screenshot("start")
    page.get_by_role("button", name="Ubiquitin").click()
    page.wait_for_selector("#results:not([hidden])")
    assert page.text_content("#result-title") == "P0CG48"
    expected = library(UBIQUITIN)
    off_cursor(page)

    length = len(UBIQUITIN)
    cells = map_cells(page, length)
    upper = np.triu_indices(length, k=1)
    keep = upper[0] > 0  # the cursor's line runs along the first row
    upper = (upper[0][keep], upper[1][keep])
    table = colours("sequentialLight")
    assert_colours(cells[upper], table, shades(expected.contacts[upper], 0, 1))
    assert len(np.unique(cells[upper], axis=0)) > 50
    # Below the diagonal: contacts that count, in their colour, and the colour of nothing elsewhere.
    i, j = np.tril_indices(length, k=-1)
    keep = j > 0
    i, j = i[keep], j[keep]
    shown = np.where((expected.contacts[i, j] >= 0.5) & (i - j >= 6), expected.contacts[i, j], 0)
    assert_colours(cells[i, j], table, shades(shown, 0, 1))
    # All of it, once asked.
    page.uncheck("#split")
    settle(page)
    assert_colours(map_cells(page, length)[i, j], table, shades(expected.contacts[i, j], 0, 1))
    page.check("#split")
    settle(page)
    opened.screenshot("ubiquitin-light")


def test_mutations_and_attention_are_drawn(tab: Any, library: Any) -> None:
    sequence = "MKTXBAYIAKQRZUO-WCHE"
    opened = tab()
    opened.open()
    page = opened.compute(sequence)
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
    cells = strip_cells(page, "#attention-map", len(attention), len(sequence)).reshape(-1, 3)[1:]
    assert_colours(cells, colours("sequentialLight"), shades(attention.ravel()[1:], attention.min(), attention.max()))
    page.check("#by-layer")
    low, high = attention.min(axis=1, keepdims=True), attention.max(axis=1, keepdims=True)
    cells = strip_cells(page, "#attention-map", len(attention), len(sequence)).reshape(-1, 3)[1:]
    assert_colours(cells, colours("sequentialLight"), shades((attention - low) / (high - low), 0, 1).ravel()[1:])
    opened.screenshot("odd-letters")


def test_hover_reads_values(tab: Any, library: Any) -> None:
    opened = tab()
    opened.open()
    page = opened.compute(UBIQUITIN)
    expected = library(UBIQUITIN)
    page.locator("#contact-map").scroll_into_view_if_needed()
    data = page.eval_on_selector("#contact-map", "canvas => ({...canvas.dataset})")
    cell = float(data["side"]) / len(UBIQUITIN)
    position = {"x": float(data["left"]) + 60.5 * cell, "y": float(data["top"]) + 9.5 * cell}
    page.hover("#contact-map", position=position)
    p = expected.contacts[9, 60]
    text = f"{p:.3f}" if p >= 0.001 else f"{p:.1e}".replace("e-0", "e-")
    assert page.text_content("#tip") == f"G10 – I61: probability {text}"
    assert page.text_content("#contact-readout .value") == text
    scores = log_odds(UBIQUITIN, expected.logits)
    page.hover("#mutation-map canvas.strip", position={"x": 26 + 2.5 * 14, "y": 20 + 3.5 * 16})
    assert page.text_content("#tip").startswith("I3L: log-odds " + f"{scores[2, 3]:+.2f}".replace("-", "−"))


def test_threshold(tab: Any, library: Any) -> None:
    opened = tab()
    opened.open()
    page = opened.compute(UBIQUITIN)
    contacts = library(UBIQUITIN).contacts

    def counted() -> int:
        settle(page)
        return int(page.text_content("#contact-count").split()[0].replace(",", ""))

    assert counted() == count_contacts(contacts, 0.5)
    page.focus("#threshold")
    page.keyboard.press("ArrowRight")
    assert counted() == count_contacts(contacts, 0.51)
    page.keyboard.press("Home")
    assert counted() == count_contacts(contacts, 0.01)
    page.uncheck("#separated")
    assert counted() == count_contacts(contacts, 0.01, apart=1)
    page.click("summary")
    strongest = [row.split("\t") for row in page.locator("#strongest tbody tr").all_inner_texts()]
    i, j = np.triu_indices(len(UBIQUITIN), k=1)
    order = np.argsort(-contacts[i, j], kind="stable")[:20]
    assert [row[0].strip() for row in strongest] == [
        f"{UBIQUITIN[i[k]]}{i[k] + 1} – {UBIQUITIN[j[k]]}{j[k] + 1}" for k in order
    ]


@pytest.mark.parametrize("sequence", ["M", "MK", "X", "XB"])
def test_one_and_two_residues(tab: Any, library: Any, sequence: str) -> None:
    opened = tab()
    opened.open()
    page = opened.compute(sequence)
    expected = library(sequence)
    message = {1: "One residue", 2: "No two of 2 residues are 6 apart"}[len(sequence)]
    assert message in page.text_content("#contact-count")
    page.uncheck("#separated")
    page.uncheck("#split")
    settle(page)
    index = shades(expected.contacts, 0, 1)
    assert_colours(map_cells(page, len(sequence)), colours("sequentialLight"), index)
    page.focus("#contact-map")
    for key in ("ArrowLeft", "ArrowDown", "ArrowRight", "ArrowUp", "n", "p", "End", "PageDown"):
        page.keyboard.press(key)
    opened.screenshot(f"residues-{sequence}")


def test_2048_residues(tab: Any, library: Any) -> None:
    sequence = random_sequence(2048)
    opened = tab()
    opened.open()
    page = opened.compute(sequence)
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
    keep = y > 4
    y, x = y[keep], x[keep]
    assert_colours(found[y, x], colours("sequentialLight"), shades(pooled[y, x], 0, 1))
    assert page.text_content("#contact-count").startswith(f"{count_contacts(contacts, 0.5)} contact")
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
    settle(page)
    counted = page.text_content("#contact-count").split()[0].replace(",", "")
    assert int(counted) == count_contacts(contacts, 0.01)
    page.keyboard.press("End")
    page.fill("#threshold", "0.5")
    opened.screenshot("residues-2048")
    found = np.loadtxt(io.BytesIO(opened.download("text=Whole map (CSV)")), delimiter=",", dtype=np.float32)
    np.testing.assert_array_equal(found, contacts)


# -- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "selected"),
    [
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
    ],
)
def test_bad_input_is_named_and_shown(tab: Any, text: str, message: str, selected: str) -> None:
    opened = tab()
    page = opened.open()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.method))
    page.fill("#sequence", text)
    page.click("#compute")
    assert message in page.text_content("#problems")
    assert page.get_attribute("#sequence", "aria-invalid") == "true"
    page.get_by_role("button", name="Show").first.click()
    box = "b => b.value.slice(b.selectionStart, b.selectionEnd)"
    assert page.eval_on_selector("#sequence", box) == selected
    assert "POST" not in requests
    assert page.input_value("#sequence") == text
    if "J" in text:
        opened.screenshot("bad-input")
    page.fill("#sequence", "MKTAYI")  # mending takes the complaint away
    page.wait_for_selector("#problems ul", state="detached")
    assert page.get_attribute("#sequence", "aria-invalid") == "false"


def test_nothing_pasted(tab: Any) -> None:
    page = tab().open()
    for text in ("", "  \n\t\n", "; only a comment"):
        page.fill("#sequence", text)
        page.click("#compute")
        assert page.text_content("#problems") == "Paste a sequence, or pick an example."
        page.wait_for_timeout(200)  # the reading of what was typed must not take it back
        assert page.text_content("#problems") == "Paste a sequence, or pick an example."


def test_fasta_is_read_as_the_library_reads_it(tab: Any) -> None:
    page = tab().open()
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
        expected = list(parse_fasta(io.StringIO(text.removeprefix("\ufeff"))))
        assert [(r["header"], r["sequence"]) for r in found["records"]] == [
            (r.description, r.sequence) for r in expected
        ], text
    for text in (">a\n>b\nMK", "MK\n>a\nMK", ">a\n*\n"):
        found = page.evaluate("async text => (await import('/page/fasta.js')).parse(text)", text)
        assert found["problems"], text
        with pytest.raises(InvalidSequence):
            list(parse_fasta(io.StringIO(text)))
    for widths in ((60, 60, 30), (60, 60), (75, 75, 1), (35, 35, 20), (35, 35), (20, 20, 5), (60, 50), (1030, 1030)):
        text = "\n".join(random_sequence(width, i) for i, width in enumerate(widths))
        found = page.evaluate("async text => (await import('/page/fasta.js')).parse(text)", text)
        assert [r["sequence"] for r in found["records"]] == [r.sequence for r in parse_fasta(io.StringIO(text))], widths
    # A sequence that is wrapped is one, and the page says so.
    sequence = random_sequence(150)
    wrapped = "\n".join(sequence[k : k + 60] for k in range(0, 150, 60))
    page.fill("#sequence", wrapped)
    says(page, "#summary", "1 sequence, 150 residues (read as one wrapped sequence)")


def test_examples_are_the_proteins_they_say(tab: Any) -> None:
    page = tab().open()
    examples = page.evaluate("async () => (await import('/page/examples.js')).EXAMPLES")
    named = {r.id: r.sequence for r in read_fasta(str(PAGE.parents[1] / "data" / "example_proteins.fasta"))}
    ours = {example["header"].split()[0]: example["sequence"] for example in examples}
    assert {name for name in ours if name in named} == {"UniRef50_UPI000836A30F", "UniRef50_A0A1E3NP16"}
    assert all(ours[name] == named[name] for name in ours if name in named)
    lengths = {"P0CG48": 76, "P00974": 58, "P00698": 129, "P01308": 110, "P42212": 238}
    assert {name: len(sequence) for name, sequence in ours.items() if name in lengths} == lengths


def test_too_much_at_once(tab: Any) -> None:
    page = tab().open()
    for text, message in ((">a\nMK\n" * 101, "101 sequences; the page takes 100"), ("A" * 4_000_001, "4.0 million")):
        page.evaluate("text => (document.getElementById('sequence').value = text)", text)
        page.click("#compute")
        assert message in page.text_content("#problems")


def test_several_records(tab: Any, library: Any) -> None:
    first, second = UBIQUITIN, random_sequence(40)
    opened = tab()
    opened.open()
    page = opened.compute(f">one some words\n{first}\n>two\n{second}\n>three\nMK\n", "3 of 3 done")
    records = page.locator("#record-list button")
    assert [text.split()[0] for text in records.all_inner_texts()] == ["one", "two", "three"]
    assert page.text_content("#result-title") == "one"
    records.nth(1).click()
    assert page.text_content("#result-title") == "two"
    assert page.get_attribute("#record-list li:nth-child(2) button", "aria-current") == "true"
    off_cursor(page)
    upper = np.triu_indices(40, k=1)
    keep = upper[0] > 0
    i, j = upper[0][keep], upper[1][keep]
    index = shades(library(second).contacts[i, j], 0, 1)
    assert_colours(map_cells(page, 40)[i, j], colours("sequentialLight"), index)
    assert second in page.text_content("#code")
    opened.screenshot("several")


def test_hostile_header_is_text(tab: Any) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'{{7*7}}../../etc/passwd\u202e"
    opened = tab()
    page = opened.open()
    for text, place in ((f">{evil}\nMKTAYI\n>b\nMK\n", "#results"), (f">{evil}\nMK9\n", "#problems")):
        page.fill("#sequence", text)
        page.click("#compute")
        page.wait_for_selector(f"{place}:not([hidden])")
        page.wait_for_timeout(200)  # time to misbehave
        assert page.locator("main img, main script").count() == 0
    assert page.text_content("#result-title") == evil.split()[0]
    with page.expect_download() as waiting:
        page.click("text=These contacts (CSV)")
    assert re.fullmatch(r"[A-Za-z0-9_][\w.-]*\.contacts\.csv", waiting.value.suggested_filename)


def test_open_a_file(tab: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(">from file\nMKTAYI\n")
    page = tab().open()
    page.set_input_files("#file", path)
    says(page, "#summary", "1 sequence, 6 residues")
    assert page.input_value("#sequence") == ">from file\nMKTAYI\n"


# -- when it does not go well ----------------------------------------------------------------------------------------


def refuse(status: int, times: int = 10**9, **headers: str) -> Callable[[Any], None]:
    """A handler that refuses the first requests as the service does, and lets the others through."""
    left = [times]
    detail = "the queue is full" if status == 503 else "item 0: this server wants no tryptophan"
    body = {
        "detail": detail,
        "errors": [],
        "status_code": status,
        "code": "user.validation",
        "error": {"items__0__sequence": [detail]},
    }

    def handle(route: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            route.continue_()
        else:
            route.fulfill(status=status, headers=headers, content_type="application/json", body=json.dumps(body))

    return handle


def test_busy_server_is_tried_again(tab: Any) -> None:
    opened = tab()
    page = opened.open()
    page.route("**/encode/", refuse(503, times=1, **{"Retry-After": "1"}))
    page.fill("#sequence", "MKTAYI")
    page.click("#compute")
    page.wait_for_selector("text=The server is busy; trying again in 1 s (attempt 2 of 5)")
    page.wait_for_selector("text=Done in")
    opened.complaints.clear()  # Chromium logs every 503


def test_busy_for_long_is_said(tab: Any) -> None:
    opened = tab()
    page = opened.open()
    page.route("**/encode/", refuse(503, **{"Retry-After": "900"}))
    opened.compute("MKTAYI", "The server is busy. It asks to try again in 900 s.")
    opened.complaints.clear()


def test_unreachable_server_is_said_and_input_kept(tab: Any) -> None:
    opened = tab()
    page = opened.open()
    page.route("**/encode/", lambda route: route.abort())
    opened.compute("MKTAYI", "The server cannot be reached")
    assert page.input_value("#sequence") == "MKTAYI"
    page.unroute("**/encode/")
    opened.compute("MKTAYI")
    opened.complaints.clear()


def test_the_servers_own_refusal_is_shown_at_its_record(tab: Any) -> None:
    opened = tab()
    page = opened.open()
    page.route("**/encode/", refuse(422, times=1))
    opened.compute(">w\nWWW\n>k\nKKK\n", "1 of 2 done, 1 failed.")
    assert page.text_content("#problems") == "w: this server wants no tryptophan"
    assert "no tryptophan" in page.locator("#record-list button").nth(0).inner_text()
    assert page.text_content("#result-title") == "k"
    opened.complaints.clear()


def test_cancel(tab: Any) -> None:
    opened = tab()
    page = opened.open()
    page.fill("#sequence", random_sequence(2048))
    page.click("#compute")
    page.click("#cancel")
    page.wait_for_selector("text=Cancelled.")
    assert page.is_hidden("#cancel")
    assert page.is_hidden("#results")
    opened.compute("MKTAYI")


def test_weights_without_a_contact_head(tab: Any) -> None:
    """The server's answer decides what is asked; here it is told that there is no contact head."""
    opened = tab()

    def no_head(route: Any) -> None:
        body = route.fetch().json()
        for model in body["models"]:
            model["contacts"] = False
        route.fulfill(json=body)

    opened.page.route("**/models/", no_head)
    opened.open()
    page = opened.compute("MKTAYI")
    assert page.is_hidden("#contacts-section")
    assert page.is_visible("#mutations-section")
    assert '"contacts"' not in page.text_content("#code")
    found = json.loads(opened.download("#save-json"))["results"][0]
    assert set(found) == {"sequence_index", "logits", "vocab_tokens", "attentions"}


# -- how it is used --------------------------------------------------------------------------------------------------


def test_keyboard_alone(tab: Any, library: Any) -> None:
    opened = tab(reduced_motion="reduce")
    page = opened.open()

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
    p = contacts[1, 12]
    text = f"{p:.3f}" if p >= 0.001 else f"{p:.1e}".replace("e-0", "e-")
    says(page, "#spoken", f"Q2 – I13: probability {text}")
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
    opened.screenshot("keyboard")


@pytest.mark.parametrize("length", [0, 2, 60, 2048])
def test_phone_has_no_sideways_scroll(tab: Any, length: int) -> None:
    opened = tab(viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True, is_mobile=True)
    page = opened.open()
    if length:
        opened.compute(f">{'averylongname' * 12} {'word ' * 60}\n{random_sequence(length)}\n")
        page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("visualViewport.scale") == 1
    wide = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter(e => e.getClientRects().length
              && !e.closest(".strip-box, pre, .skip, #tip") && e.getBoundingClientRect().right > 360.5)
              .map(e => e.tagName + "#" + e.id)"""
    )
    assert wide == []
    if length > 2:
        page.tap("#contact-map", position={"x": 200, "y": 100})
        assert page.is_visible("#tip")
    opened.screenshot(f"phone-{length}")


def test_dark(tab: Any, library: Any) -> None:
    opened = tab(color_scheme="dark")
    opened.open()
    sequence = random_sequence(60)
    page = opened.compute(sequence)
    contacts = library(sequence).contacts
    i, j = np.triu_indices(60, k=1)
    i, j = i[i > 0], j[i > 0]

    def check(table: str, ground: str) -> None:
        off_cursor(page)
        assert_colours(map_cells(page, 60)[i, j], colours(table), shades(contacts[i, j], 0, 1))
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground

    check("sequentialDark", "rgb(14, 18, 29)")
    opened.screenshot("dark")
    page.get_by_role("button", name="Light colours").click()
    check("sequentialLight", "rgb(243, 245, 246)")
    page.reload()  # the choice stays
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(243, 245, 246)"


def test_contrast_and_uniform_colours() -> None:
    """Text reaches WCAG AA on its ground; colour tables are straight lines of CIELAB lightness."""

    def linear(rgb: np.ndarray) -> np.ndarray:
        c = np.asarray(rgb) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)

    def luminance(rgb: np.ndarray) -> Any:
        return linear(rgb) @ [0.2126, 0.7152, 0.0722]

    def lightness(rgb: np.ndarray) -> np.ndarray:
        return 116 * np.cbrt(np.maximum(luminance(rgb), 0.008856)) - 16

    for name in ("sequentialLight", "sequentialDark", "divergingLight", "divergingDark"):
        found = lightness(colours(name))
        for half in [found] if name.startswith("seq") else [found[:128], found[128:]]:
            straight = np.linspace(half[0], half[-1], len(half))
            assert np.abs(half - straight).max() < 1.5, name
            assert abs(half[0] - half[-1]) > 55, name

    css = (PAGE / "style.css").read_text()
    for block in (css.split("}")[0], css.split('[data-theme="dark"] {')[1].split("}")[0]):
        value = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", block))
        for ink, ground in [("text", "ground"), ("text", "sheet"), ("soft", "ground"), ("soft", "sheet"),
                            ("accent", "sheet"), ("accent-ink", "accent"), ("wrong", "sheet"),
                            ("text", "wrong-soft"), ("text", "accent-soft"), ("text", "code")]:  # fmt: skip
            a, b = sorted(luminance(np.array(list(bytes.fromhex(value[n])))) for n in (ink, ground))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (ink, ground)


def test_synthetic_weights_cannot_be_missed(tab: Any) -> None:
    opened = tab()
    opened.open()
    page = opened.compute(UBIQUITIN)
    banner = page.locator("#synthetic")
    for y in (0, 1200, 10**6):
        page.evaluate("y => scrollTo(0, y)", y)
        settle(page)
        box = banner.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] < 200
    assert "Synthetic weights" in banner.inner_text() or "SYNTHETIC WEIGHTS" in banner.inner_text()
    assert "synthetic weights" in page.text_content("#result-about")
    assert "SYNTHETIC WEIGHTS" in (PAGE / "picture.js").read_text()


# -- what is taken along ---------------------------------------------------------------------------------------------


def test_downloads_hold_the_librarys_numbers(tab: Any, library: Any) -> None:
    sequence = UBIQUITIN[:40] + "XB-"
    opened = tab()
    opened.open()
    opened.compute(f">dl\n{sequence}")
    expected = library(sequence)

    document = json.loads(opened.download("#save-json"))
    assert (document["name"], document["model"], document["sequence"]) == ("dl", "esm2-8m", sequence)
    assert document["synthetic_weights"] is True
    result = document["results"][0]
    for name in INCLUDE:
        np.testing.assert_array_equal(np.array(result[name], dtype=np.float32), getattr(expected, name))
    assert result["vocab_tokens"] == expected.vocab_tokens

    def table(button: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(opened.download(button).decode())))

    rows = table("text=These contacts (CSV)")
    assert len(rows) == count_contacts(expected.contacts, 0.5)
    for row in rows:
        i, j = int(row["position_1"]) - 1, int(row["position_2"]) - 1
        assert (row["residue_1"], row["residue_2"]) == (sequence[i], sequence[j])
        assert np.float32(row["probability"]) == expected.contacts[i, j]
    whole = np.loadtxt(io.BytesIO(opened.download("text=Whole map (CSV)")), delimiter=",", dtype=np.float32)
    np.testing.assert_array_equal(whole, expected.contacts)

    rows = table("text=Scores (CSV)")
    scores = log_odds(sequence, expected.logits)
    assert [(int(r["position"]), r["residue"], r["mutant"]) for r in rows] == [
        (i + 1, letter, mutant) for i, letter in enumerate(sequence) for mutant in ROWS
    ]
    found = np.array([float(r["log_odds"] or "nan") for r in rows]).reshape(-1, 20)
    np.testing.assert_allclose(found, scores, rtol=1e-7, atol=1e-7)

    rows = table("text=Values (CSV)")
    found = np.array([[np.float32(r[f"layer_{k + 1}"]) for r in rows] for k in range(6)])
    np.testing.assert_array_equal(found, expected.attentions)

    for number, name in enumerate(("contacts", "mutations", "attention")):
        png = opened.download(f"text=Picture (PNG) >> nth={number}")
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", png[16:24])
        assert width > 500
        assert height > 200
        from matplotlib.image import imread

        picture = imread(io.BytesIO(png))
        assert picture.shape[:2] == (height, width)
        assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50
        target = Path(__file__).parents[1] / "test-output" / "page"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"download-{name}.png").write_bytes(png)


def code_tabs(page: Any) -> dict[str, str]:
    found = {}
    for tab in page.get_by_role("tab").all():
        tab.click()
        found[tab.inner_text()] = page.text_content("#code")
    return found


def run_code(code: str, tmp_path: Path, **environment: str) -> dict[str, np.ndarray]:
    """The program as shown, and what its variables were at the end."""
    out = tmp_path / "out.npz"
    ending = f"\nnp.savez({str(out)!r}, contacts=contacts, attentions=attentions, scores=scores, count=len(pairs))\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + ending],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "contacts" in done.stdout
    with np.load(out) as arrays:
        return dict(arrays)


def test_shown_code_runs_and_gives_what_is_shown(tab: Any, library: Any, tmp_path: Path) -> None:
    sequence = UBIQUITIN + "X-"
    opened = tab()
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.open()
    page = opened.compute(sequence)
    page.fill("#threshold", "0.3")
    settle(page)
    codes = code_tabs(page)
    expected = library(sequence)
    count = int(page.text_content("#contact-count").split()[0])

    done = subprocess.run(["bash", "-c", codes["curl"]], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["results"][0]
    for name in INCLUDE:
        np.testing.assert_array_equal(np.array(result[name], dtype=np.float32), getattr(expected, name))

    scores = log_odds(sequence, expected.logits)
    order = [AMINO_ACIDS.index(letter) for letter in ROWS]
    for title in ("Python, requests", "Python, this library"):
        found = run_code(codes[title], tmp_path, PYTHONPATH=str(PAGE.parents[2]))
        np.testing.assert_array_equal(found["contacts"], expected.contacts)
        np.testing.assert_array_equal(found["attentions"].astype(np.float32), expected.attentions)
        np.testing.assert_allclose(found["scores"][:, order], scores, rtol=1e-6, atol=1e-6)
        assert found["count"] == count
    page.click("#copy")
    page.wait_for_selector("text=Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == codes["Python, this library"]


def test_key_is_asked_for_and_kept_in_the_tab(tab: Any, library: Any, tmp_path: Path) -> None:
    with service("--model", "esm2-8m=synthetic:esm2-8m", NUMPYESM_API_KEYS="sesame-1234") as url:
        opened = tab(url)
        page = opened.open()
        page.fill("#sequence", "MKTAYIAKQR")
        page.click("#compute")
        page.wait_for_selector("#key-dialog[open]")
        opened.screenshot("key")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The server did not accept this key")
        page.fill("#key", "sesame-1234")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Done in")
        opened.complaints.clear()  # Chromium logs every 401
        assert page.evaluate("sessionStorage.getItem('numpyesm-key')") == "sesame-1234"
        assert page.evaluate("Object.keys(localStorage).length") == 0
        codes = code_tabs(page)
        assert "sesame" not in page.content()
        command = subprocess.run(
            ["bash", "-c", codes["curl"]],
            capture_output=True,
            env=os.environ | {"NUMPYESM_API_KEY": "sesame-1234"},
            timeout=60,
        )
        contacts = library("MKTAYIAKQR").contacts
        found = json.loads(command.stdout)["results"][0]["contacts"]
        np.testing.assert_array_equal(np.array(found, dtype=np.float32), contacts)
        found = run_code(codes["Python, requests"], tmp_path, NUMPYESM_API_KEY="sesame-1234")["contacts"]
        np.testing.assert_array_equal(found, contacts)
        page.reload()  # the tab remembers
        page.wait_for_selector("#model option", state="attached")
        opened.compute("MKTA")
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
