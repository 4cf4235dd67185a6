"""Every lesson in JupyterLab: run, moved, looked at in four ways, reopened without its kernel."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.lab import OURS, THEMES, TOO_WIDE, UNNAMED, WIDTHS, Lab, axe
from jupyter_server import PATIENCE, ROOT, Server
from playwright.sync_api import Browser, Locator, expect

from minidora.widgets import WITHOUT_KERNEL

LESSONS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
BY_IPYWIDGETS = "aria-input-field-name"
"""ipywidgets gives the handle of a slider no name, and we cannot: its label stands before it."""

BY_BROWSERS = "scrollable-region-focusable"
"""At 900 pixels long formulas are moved sideways. Chromium and Firefox let the keyboard do that."""

WITHOUT_SLIDERS = ("07_gpu_kernels",)
"""Its figures show what was measured or counted once."""


@pytest.fixture(scope="module", params=LESSONS)
def name(request: Any) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def lab(server: Server, chromium: Browser, pictures: Path, name: str) -> Iterator[Lab]:
    """A lesson whose cells have all been run."""
    for old in pictures.glob(f"{name}-*.png"):
        old.unlink()
    lab = Lab(server, chromium, pictures)
    lab.open(f"notebooks/{name}.ipynb")
    lab.run_all()
    yield lab
    lab.close()


def test_every_cell_runs(lab: Lab) -> None:
    cells = lab.cells()
    failed = [
        f"{cell['id']}: {output.get('ename')}: {output.get('evalue')}"
        for cell in cells
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]
    assert not failed
    assert [cell["count"] for cell in cells] == [*range(1, len(cells) + 1)]


def test_no_cell_writes_a_warning(lab: Lab) -> None:
    written = [
        f"{cell['id']}: {output['text'][:300]}"
        for cell in lab.cells()
        for output in cell["outputs"]
        if output.get("name") == "stderr"
    ]
    assert not written


def _changes(picture: Locator, label: Locator, before: tuple[str | None, ...]) -> None:
    image = picture.locator("img")
    expect(label).not_to_have_text(str(before[0]), timeout=PATIENCE * 1000)
    expect(image).not_to_have_attribute("alt", str(before[1]), timeout=PATIENCE * 1000)
    expect(image).not_to_have_attribute("src", str(before[2]), timeout=PATIENCE * 1000)


def _state(picture: Locator, label: Locator) -> tuple[str | None, ...]:
    image = picture.locator("img")
    return label.inner_text(), image.get_attribute("alt"), image.get_attribute("src")


def test_sliders_follow_mouse_and_keyboard(lab: Lab, name: str) -> None:
    page = lab.page
    widgets = page.locator(".jp-OutputArea .widget-vbox")
    assert (name in WITHOUT_SLIDERS) == (widgets.count() == 0)
    for widget in widgets.all():
        slider = widget.locator(".widget-hslider").first
        handle, label = slider.locator(".noUi-handle"), slider.locator(".widget-label")
        picture = widget.locator(".widget-html-content")
        slider.scroll_into_view_if_needed()

        before = _state(picture, label)
        handle.hover()  # which waits until it stands still
        page.mouse.down()
        rail, knob = slider.locator(".noUi-base").bounding_box(), handle.bounding_box()
        assert rail
        assert knob
        share = 0.1 if knob["x"] > rail["x"] + rail["width"] / 2 else 0.9
        page.mouse.move(rail["x"] + share * rail["width"], knob["y"] + 5, steps=3)
        page.mouse.up()
        _changes(picture, label, before)

        page.wait_for_function("() => jupyterapp.shell.currentWidget.context.sessionContext"
                               ".session.kernel.status === 'idle'")  # fmt: skip
        before = _state(picture, label)
        handle.focus()
        page.keyboard.press("ArrowLeft" if share > 0.5 else "ArrowRight")
        _changes(picture, label, before)


def test_nothing_can_be_typed_beside_a_slider(lab: Lab) -> None:
    """What is typed there would stay and be no value: ipywidgets' readouts allow it."""
    typed = lab.page.locator(".jp-OutputArea .widget-hslider [contenteditable=true]")
    assert [readout.inner_text() for readout in typed.all() if readout.is_visible()] == []


def test_a_label_shows_its_own_words_under_the_mouse(lab: Lab) -> None:
    labels = lab.page.locator(".jp-OutputArea .widget-label[title='null']")
    assert [label.inner_text() for label in labels.all() if label.is_visible()] == []


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_can_be_read(lab: Lab, name: str, width: int, theme: str) -> None:
    lab.view(width, theme)
    lab.show_whole(f"{name}-{width}-{theme.lower()}")
    wide, by_others = lab.page.evaluate(TOO_WIDE), [BY_IPYWIDGETS]
    if width == WIDTHS[0]:  # beside the list of files 460 px are left, too few for a printed table
        kept = {key: wide.pop(key) for key in ("scrolled", "wrapped")}
        (lab.pictures / f"{name}-{width}.json").write_text(json.dumps(kept, indent=1))
        by_others.append(BY_BROWSERS)
    assert not any(wide.values()), wide
    assert lab.page.evaluate(UNNAMED) == []
    assert axe(lab.page, OURS, without=tuple(by_others)) == []


@pytest.mark.parametrize("kernel", ["without a kernel", "with a new kernel"])
def test_reopened_it_says_what_its_sliders_need(lab: Lab, name: str, kernel: str) -> None:
    path = f"notebooks/{name}.ipynb"
    if kernel == "without a kernel":
        lab.save()
        lab.command("kernelmenu:shutdown")
        lab.reload()
    else:
        lab.open(path)
    lost = re.compile("model not found|Loading widget|Error displaying widget|[HV]Box\\(")
    areas = lab.page.locator(".jp-Cell-outputArea").filter(has_text=WITHOUT_KERNEL)
    sliders = sum(WITHOUT_KERNEL in str(cell["outputs"]) for cell in lab.cells())
    # JupyterLab adds cells one by one.
    expect(areas).to_have_count(sliders, timeout=PATIENCE * 1000)
    lab.page.wait_for_function(
        "() => document.querySelectorAll('.jp-Notebook .jp-Cell').length"
        " === jupyterapp.shell.currentWidget.content.widgets.length"
    )
    assert (name in WITHOUT_SLIDERS) == (sliders == 0)
    for number, area in enumerate(areas.all(), start=1):
        for _ in range(2):  # cells before it get their heights while it is scrolled to
            area.scroll_into_view_if_needed()
            lab.page.wait_for_timeout(1000)
        lab.show(f"{name}-{kernel.replace(' ', '-')}-{number}")
    everywhere = lab.page.locator(".jp-Cell-outputArea").filter(has_text=lost)
    explained = everywhere.filter(has_text=WITHOUT_KERNEL)
    assert explained.count() == everywhere.count(), everywhere.all_inner_texts()
