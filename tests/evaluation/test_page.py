"""The page for people: everything is on it, nothing is fetched, and no text can act as markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simplear.evaluation.publish import THUMBNAIL, write_page

REPORT: dict[str, Any] = {
    "runs": {
        "a": {"overall": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 4}},
        "b": {"overall": {"accuracy": 0.25, "low": 0.2, "high": 0.3, "n": 4}},
    },
    "settings": {"b": {"seed": 7, "negative_prompt": "</table><script>alert(1)</script>"}},
}
HOSTILE = '"><img src=http://example.com/x onerror=alert(1)> & <b>'


class Elements(HTMLParser):
    """All elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found[-1:] and self.found[-1][0] not in ("script", "style"):
            self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture()
def images(tmp_path: Path) -> list[dict[str, Any]]:
    """Two of a prompt in one category, two in another; one is large."""
    random = np.random.default_rng(0)
    found = []
    for number, (prompt, tag, right) in enumerate(
        [("one dog", "x", True), ("one dog", "x", False), (HOSTILE, "y", False), ("a cat", "y", False)]
    ):
        side = 400 if number == 3 else 32
        file = f"{number}.png"
        Image.fromarray(random.integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)).save(tmp_path / file)
        reason = "" if right else f"no <dog> {number}"
        found.append({"file": file, "prompt": prompt, "tag": tag, "correct": right, "reason": reason})
    return found


def page_of(tmp_path: Path, images: list[dict[str, Any]]) -> tuple[str, Elements]:
    verdict = "score" if "score" in images[0] else "correct"
    write_page(tmp_path / "page.html", REPORT, "b", tmp_path, images, verdict)
    text = (tmp_path / "page.html").read_text()
    elements = Elements()
    elements.feed(text)
    return text, elements


def test_every_image_stands_with_prompt_verdict_and_reason(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    _, elements = page_of(tmp_path, images)
    figures = elements.named("figure")
    assert [figure["data-verdict"] for figure in figures] == ["right", "wrong", "wrong", "wrong"]
    assert [figure["data-category"] for figure in figures] == ["x", "x", "y", "y"]
    assert {"one dog", HOSTILE, "a cat", "no <dog> 1"} <= set(elements.texts)
    assert {"50.0% (40.0–60.0)", "25.0% (20.0–30.0)"} <= {text.strip() for text in elements.texts}
    assert {"x", "y"} <= set(elements.texts)


def test_thumbnails_are_the_images(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    """Small ones to the bit, large ones reduced."""
    _, elements = page_of(tmp_path, images)
    shown = [image["src"] or "" for image in elements.named("img")]
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in shown]
    assert (np.asarray(pictures[0]) == np.asarray(Image.open(tmp_path / images[0]["file"]))).all()
    assert pictures[3].size == (THUMBNAIL, THUMBNAIL // 2) and shown[3].startswith("data:image/jpeg")


def test_nothing_is_fetched_and_no_text_acts(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    text, elements = page_of(tmp_path, images)
    assert len(elements.named("script")) == 1 and len(elements.named("img")) == len(images)
    assert not any(name in attributes for _, attributes in elements.found for name in ("href", "onerror", "onload"))
    assert all((image["src"] or "").startswith("data:image/") for image in elements.named("img"))
    assert not elements.named("link") and not re.search(r"url\(|@import|fetch\(|XMLHttp", text)
    policy = next(meta["content"] for meta in elements.named("meta") if "content" in meta and "http-equiv" in meta)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_scores_have_no_verdict_and_the_lower_is_the_worse(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    scored = [{**item, "score": 0.25 * number} for number, item in enumerate(images)]
    text, elements = page_of(tmp_path, scored)
    failures = [float(figure["data-failure"] or 0) for figure in elements.named("figure")]
    assert failures == [0, -0.25, -0.5, -0.75]
    assert 'data-verdict="right"' not in text and "0.750" in text
