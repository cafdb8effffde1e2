"""`flextok app`, used in a browser as a visitor would."""

import io
import multiprocessing
import os
import shutil
import socket
import time
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from flextok_pl.cli import main

pytest.importorskip("gradio", reason="the page needs the extra app: pip install 'flextok_pl[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright: pip install it")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")

PATIENCE = 120_000  # ms, on a busy machine


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the app with the demo's models, in a process of its own."""
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def serve():
        os.environ |= {"GRADIO_TEMP_DIR": str(folder), "HOME": str(folder)}
        main(["app", "--port", str(port)])

    process = multiprocessing.get_context("fork").Process(target=serve)
    process.start()
    url = f"http://127.0.0.1:{port}/"
    for _ in range(600):
        try:
            with urlopen(url, timeout=10):
                break
        except OSError:
            assert process.is_alive()
            time.sleep(0.1)
    yield url
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """The page, with the first example resampled; what it asks for comes from this machine."""
    opened = visit(browser, address)
    yield opened
    opened.context.close()


def visit(browser, address):
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda request: asked_for.append(request.url))
    page.goto(address)
    page.locator(".tokens span").first.wait_for()
    return page


asked_for: list[str] = []


def shown(page, name):
    """The address of the picture in a place, which tells its content."""
    found = page.locator(f"#{name} img")
    return found.first.get_attribute("src") if found.count() else None


def changed(page, name, before):
    """The address of the picture in a place when it is another one."""
    page.wait_for_function(
        "([name, before]) => { const i = document.querySelector(`#${name} img`); return i && i.src !== before }",
        arg=[name, before],
    )
    return shown(page, name)


def tokens(page, source):
    return page.locator(f".tokens .{source}").count()


def set_number(page, label, value):
    field = page.get_by_label(f"number input for {label}").filter(visible=True)
    field.fill(str(value))
    field.press("Enter")


def upload(page, place, name, content):
    page.locator("input[type=file]").nth(place).set_input_files(
        {"name": name, "mimeType": "image/png", "buffer": content}
    )


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60), colour).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(page, address):
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB"))


def test_resampling_swapping_and_cutting(page):
    assert tokens(page, "first") == 64 and tokens(page, "cut") == 0
    before = shown(page, "result")
    set_number(page, "Tokens kept", 8)
    page.get_by_text("8 of picture A; 56 cut").wait_for()
    cut = changed(page, "result", before)
    upload(page, 0, "mine.png", png((255, 0, 0)))
    changed(page, "result", cut)
    assert (pixels(page, shown(page, "picture-a"))[30, 30] == (255, 0, 0)).all(), "the upload is picture A"

    page.locator(".examples").nth(1).locator("button").nth(3).click()
    set_number(page, "Tokens of A before those of B", 3)
    page.get_by_text("3 of picture A").wait_for()
    assert [tokens(page, source) for source in ("first", "second", "cut")] == [3, 5, 56]
    assert shown(page, "picture-b") is not None
    page.get_by_role("button", name="Remove picture B").click()
    page.get_by_text("8 of picture A; 56 cut").wait_for()
    assert shown(page, "picture-b") is None and tokens(page, "second") == 0


def test_hostile_uploads_leave_the_page_as_it_was(page):
    before = shown(page, "picture-a")
    for name, content, message in (
        ("a.png", b"#!/bin/sh\n", "cannot be read as a picture"),
        ("a.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "cannot be read as a picture"),
    ):
        upload(page, 0, name, content)
        page.locator(".toast-body").filter(has_text=message).first.wait_for()
        page.locator(".toast-close").first.click()
    assert shown(page, "picture-a") == before and tokens(page, "first") == 64


def test_generating_and_decoding_anew(page):
    page.get_by_role("tab", name="Generate").click()
    set_number(page, "Pictures", 2)
    page.get_by_role("button", name="Generate", exact=True).click()
    whole = changed(page, "drawn", None)
    assert page.locator("#drawn button img").count() == 2
    set_number(page, "Tokens decoded", 4)
    coarse = changed(page, "drawn", whole)
    set_number(page, "Tokens decoded", 64)
    changed(page, "drawn", coarse)
    assert (pixels(page, shown(page, "drawn")) == pixels(page, whole)).all(), "of the same tokens"


def start_search(page, **options):
    page.get_by_role("tab", name="Search").click()
    for label, value in options.items():
        set_number(page, label.replace("_", " "), value)
    page.get_by_role("button", name="Search", exact=True).click()


def test_searching_ends_with_picture_tree_and_costs(page):
    start_search(page, Candidates=2, Beam_width=2, Tokens=4)
    page.get_by_text("Step 3 of 3").wait_for()
    page.get_by_text("scored candidates 10").wait_for()
    changed(page, "best", None)
    assert len(pixels(page, changed(page, "tree", None))) > 3 * 64, "a row for each step"


def test_a_search_shows_the_best_so_far_and_can_be_stopped(page):
    start_search(page, Candidates=32, Beam_width=8, Tokens=64)
    page.get_by_text("of 7").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    assert shown(page, "best") is not None and shown(page, "tree") is not None
    page.get_by_role("tab", name="Resample").click()
    set_number(page, "Tokens kept", 1)
    page.get_by_text("63 cut").wait_for()
    page.get_by_role("tab", name="Search").click()
    assert page.get_by_text("Step 7 of 7").count() == 0


def test_visitors_do_not_see_each_other(page, browser, address):
    other = visit(browser, address)
    for visitor, number in ((page, 2), (other, 5)):
        visitor.locator(".examples").first.locator("button").nth(number).click()
        set_number(visitor, "Tokens kept", number)
    for visitor, number in ((page, 2), (other, 5)):
        visitor.get_by_text(f"{number} of picture A; {64 - number} cut").wait_for()
    ids = [visitor.locator(".tokens").inner_text().split()[:2] for visitor in (page, other)]
    assert ids[0] != ids[1]
    other.context.close()


def test_nothing_comes_from_elsewhere(page, address):
    assert asked_for and {url.split("/")[2] for url in asked_for if "//" in url} == {address.split("/")[2]}
    with urlopen(address, timeout=60) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
