"""The page in a real browser: any Chromium. Where there is none these tests fail and say what to install."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serving.conftest import PATIENCE, Live, wait_until
from serving.test_api import Pipelines, drawn_by, pixels
from simplear.generation import SimpleARPipeline
from simplear.serving import Service

pytestmark = pytest.mark.long
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE = {"width": 390, "height": 844}
expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(
            "the page is tested in Chromium and there is none: apt-get install chromium, or CHROMIUM=/path/to/it."
        )
    with sync_playwright() as playwright:
        # Chromium has no sandbox of its own for root, as containers run it; it sees nothing but our page.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which nothing may go wrong, and from which nothing is asked elsewhere."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda asked: problems.append(asked.url) if "//127.0.0.1" not in asked.url[:20] else None)
    yield page
    # The browser itself notes what the server refuses.
    assert [
        each for each in problems if not each.startswith(("data:", "Failed to load resource: the server responded"))
    ] == []
    context.close()


def shown(page: Page, selector: str) -> NDArray[np.uint8]:
    """Pixels of an image on the page, as its own file has them."""
    source = page.locator(selector).get_attribute("src") or ""
    assert source.startswith("data:image/png;base64,")
    return pixels(source.partition(",")[2])


def test_drawing(page: Page, pipelines: Pipelines, tmp_path: Path) -> None:
    with Live(pipelines).running() as live:
        page.goto(live.url)
        expect(page.locator("#guidance")).to_have_attribute("placeholder", "2")
        page.get_by_label("Prompt", exact=True).fill("a red circle")
        page.get_by_label("Seed").fill("5")
        live.engine.hold()
        page.get_by_role("button", name="Draw").click()
        wait_until(lambda: live.engine.rows == 1)
        live.engine.hold()
        # The upper rows are there before the image is: transparent below.
        image = page.locator("#canvas img")
        expect(image).to_have_attribute("src", re.compile("^data:image/png"))
        early = shown(page, "#canvas img")
        assert early.shape[2] == 4 and early[0, 0, 3] == 255 and early[-1, 0, 3] == 0
        live.engine.go()
        expect(page.locator("#status")).to_contain_text("Drawn in")
        np.testing.assert_array_equal(shown(page, "#canvas img"), drawn_by(pipelines["first"], "a red circle", 5, 1))
        expect(image).to_have_attribute("alt", "a red circle")
        expect(page.locator("#gallery li")).to_have_count(1)
        expect(page.locator("#gallery figcaption")).to_contain_text("first · seed 5 · guidance 2 · 24x32")
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        assert download.value.suggested_filename == "a-red-circle-5.png"
        download.value.save_as(tmp_path / "image.png")
        assert "simplear" in Image.open(tmp_path / "image.png").text


def test_two_checkpoints_side_by_side(page: Page, live: Live, pipelines: Pipelines) -> None:
    page.goto(live.url)
    page.get_by_label("Prompt", exact=True).fill("one star")
    page.get_by_label("Compare with").select_option("second")
    page.get_by_label("Guidance").fill("3")
    page.get_by_label("Images").fill("2")
    page.keyboard.press("Enter")
    expect(page.locator("#gallery li")).to_have_count(4)
    expect(page.locator("#canvas h3")).to_have_text(["first", "second"])
    seeds = page.locator("#canvas figcaption").all_inner_texts()
    assert seeds[:2] == seeds[2:] and len(set(seeds)) == 2
    first = int(seeds[0].removeprefix("seed "))
    for place, name in ((1, "first"), (2, "second")):
        made = shown(page, f"#canvas .column:nth-child({place}) figure:first-child img")
        np.testing.assert_array_equal(made, drawn_by(pipelines[name], "one star", first, 2, guidance_scale=3.0))
    # A picture of the gallery brings its settings back.
    page.get_by_label("Prompt", exact=True).fill("other")
    page.locator("#gallery li").filter(has_text=f"second · {seeds[0]}").get_by_role("button").click()
    assert page.get_by_label("Prompt", exact=True).input_value() == "one star"
    assert page.locator("#model").input_value() == "second" and page.locator("#seed").input_value() == str(first)


def test_stop_and_errors(page: Page, pipelines: Pipelines) -> None:
    with Live(pipelines).running() as live:
        page.goto(live.url)
        page.get_by_label("Prompt", exact=True).fill("q z " * 900)
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_role("alert").first).to_contain_text("there is room for")
        page.get_by_label("Prompt", exact=True).fill("<img src=x onerror=alert(1)>")
        live.engine.hold()
        page.get_by_role("button", name="Draw").click()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#status")).to_have_text("Stopped")
        live.engine.go()
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#gallery .asked")).to_have_text("<img src=x onerror=alert(1)>")


def test_a_key(page: Page, pipelines: dict[str, SimpleARPipeline]) -> None:
    """Also one of other letters than a header has; who closes the dialog is asked again when a key is needed."""
    with Live(pipelines, Service(api_key="clé €")).running() as live:
        page.goto(live.url)
        dialog = page.locator("#key-dialog")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_role("alert").first).to_contain_text("asks for a key")
        expect(dialog).to_be_hidden()
        page.get_by_label("Prompt", exact=True).fill("one star")
        page.get_by_role("button", name="Draw").click()
        page.get_by_role("button", name="Cancel").click()
        expect(dialog).to_be_hidden()
        page.get_by_role("button", name="Draw").click()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-problem")).to_be_visible()
        page.get_by_label("API key").fill("clé €")
        page.keyboard.press("Enter")
        expect(page.locator("#gallery li")).to_have_count(1)
        live.service.api_key = "another"  # two requests need it at once
        page.get_by_label("Compare with").select_option("second")
        page.get_by_role("button", name="Draw").click()
        page.get_by_label("API key").fill("another")
        page.keyboard.press("Enter")
        expect(page.locator("#gallery li")).to_have_count(3)


def test_the_keyboard_alone_and_names_to_hear(page: Page, pipelines: Pipelines) -> None:
    """The focus stays where the next thing is done, and no two buttons are called alike."""
    with Live(pipelines).running() as live:
        page.goto(live.url)
        page.get_by_label("Images").fill("2")
        draw, stop = page.get_by_role("button", name="Draw"), page.get_by_role("button", name="Stop")
        page.get_by_label("Prompt", exact=True).fill("a red circle")
        page.get_by_role("button", name="Draw").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#gallery li")).to_have_count(2)
        expect(draw).to_be_focused()
        live.engine.hold()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        expect(stop).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Stopped")
        expect(draw).to_be_focused()
        live.engine.go()
        page.keyboard.press("Enter")
        expect(page.locator("#gallery li")).to_have_count(4)
        names = page.locator("#gallery a, #gallery button").evaluate_all("all => all.map(one => one.ariaLabel)")
        assert len(set(names)) == 8 and all("a red circle" in name for name in names)
        assert names[-2].startswith("Download image 1, seed ") and names[1].startswith("Reuse image 4, seed ")
        drawn = page.locator("#canvas img").evaluate_all("all => all.map(one => one.alt)")
        assert drawn == ["a red circle, image 1 of 2", "a red circle, image 2 of 2"]


def test_a_phone_and_the_keyboard(page: Page, live: Live) -> None:
    page.set_viewport_size(PHONE)
    page.goto(live.url)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    unnamed = page.locator("input, select, textarea, button").evaluate_all(
        "all => all.filter(one => !(one.labels?.length || one.textContent.trim())).map(one => one.id)"
    )
    assert unnamed == []
    page.locator("#prompt").focus()
    page.keyboard.type("one star")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#gallery li")).to_have_count(1)
    expect(page.locator("#now")).to_be_in_viewport()
