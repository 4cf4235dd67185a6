"""Every lesson as nbconvert writes it: no serious fault, and a name for each figure."""

from pathlib import Path

import pytest
from browser.lab import HEIGHT, THEMES, WIDTHS, axe, stay_here
from figures import Images
from jupyter_server import ROOT
from nbconvert import HTMLExporter
from playwright.sync_api import Browser

LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NBCONVERTS = [[".jp-InputPrompt"], [".jp-OutputPrompt"], [".highlight"]]
"""Its grey prompts and its colours of code are too pale for axe, whatever the notebook says."""
LINKS = "link-in-text-block"
"""It does not underline links."""


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_no_serious_fault(path: Path, theme: str, chromium: Browser, tmp_path: Path) -> None:
    body, _ = HTMLExporter(theme=theme.lower()).from_filename(str(path))
    images = Images(body).found
    assert images
    assert [image for image in images if len(image.get("alt") or "") < 60] == []
    file = tmp_path / "lesson.html"
    file.write_text(body, encoding="utf-8")
    for width in WIDTHS:
        page = chromium.new_page(viewport={"width": width, "height": HEIGHT})
        page.route("http*://**", stay_here)
        page.goto(file.as_uri())
        assert axe(page, [["body"]], exclude=NBCONVERTS, without=(LINKS,)) == []
        page.close()
