"""What the tests do in JupyterLab and read from it."""

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from axe_playwright_python.base import AXE_SCRIPT
from jupyter_server import PATIENCE, Server
from playwright.sync_api import Browser, Locator, Page, Route, TimeoutError, WebSocket

WIDTHS = (900, 1300)
THEMES = ("Light", "Dark")
HEIGHT = 1400

OURS = [[".jp-Notebook .jp-OutputArea"], [".jp-Notebook .jp-MarkdownOutput"]]
"""The notebook's area as far as a lesson fills it; the rest is JupyterLab's own."""

CELLS = """() => jupyterapp.shell.currentWidget.content.widgets
  .filter(cell => cell.model.type === 'code')
  .map(cell => ({
    id: cell.model.id,
    source: cell.model.sharedModel.source,
    count: cell.model.executionCount,
    outputs: cell.model.outputs.toJSON(),
  }))"""

TOO_WIDE = """() => {
  // What does not fit: {cut: pictures and widgets, scrolled: formulas and tables that have to be
  // moved sideways, wrapped: printed lines that are broken, and with them the columns of a table}
  const right = document.querySelector('.jp-Notebook').getBoundingClientRect().right;
  const found = {cut: [], scrolled: [], wrapped: []};
  const words = element => element.textContent.trim().replace(/\\s+/g, ' ').slice(0, 80);
  for (const part of document.querySelectorAll('.jp-OutputArea-output, .jp-MarkdownOutput')) {
    for (const element of part.querySelectorAll('img, .jupyter-widgets')) {
      const box = element.getBoundingClientRect();
      if (box.right > right || element.scrollWidth > element.clientWidth + 1)
        found.cut.push(`${element.className || element.alt}: ${words(element)}`);
    }
    if (part.scrollWidth > part.clientWidth + 1)
      found.scrolled.push(`${part.scrollWidth - part.clientWidth} px: ${words(part)}`);
  }
  for (const pre of document.querySelectorAll('.jp-OutputArea-output pre')) {
    const lines = pre.textContent.replace(/\\n$/, '').split('\\n').length;
    const shown = pre.clientHeight / parseFloat(getComputedStyle(pre).lineHeight);
    if (shown > lines + 0.5) found.wrapped.push(words(pre));
  }
  return found;
}"""

UNNAMED = """() => [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output img')]
  .filter(image => (image.alt || '').length < 60).map(image => image.outerHTML.slice(0, 200))"""


def axe(page: Page, include: Any, exclude: Any = (), without: tuple[str, ...] = ()) -> list[str]:
    """The serious and critical faults that axe-core finds, a line each."""
    page.evaluate(AXE_SCRIPT)
    result = page.evaluate(
        "([context, options]) => axe.run(context, options)",
        [
            {"include": include, "exclude": list(exclude)},
            {
                "resultTypes": ["violations"],
                "rules": {rule: {"enabled": False} for rule in without},
            },
        ],
    )
    return [
        f"{fault['impact']}: {fault['id']}: {_short(node['html'])}: "
        + " ".join(node.get("failureSummary", "").split())[:200]
        for fault in result["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def _short(html: str) -> str:
    return re.sub(r"base64,[^\"]*", "...", html)[:200]


def stay_here(route: Route) -> None:
    """The course is offline: nothing but this machine is asked."""
    if "//127.0.0.1:" in route.request.url:
        route.continue_()
    else:
        route.abort()


class Lab:
    """JupyterLab in a window of its own."""

    def __init__(self, server: Server, chromium: Browser, pictures: Path) -> None:
        self.server = server
        self.pictures = pictures
        self.page = chromium.new_page(viewport={"width": WIDTHS[-1], "height": HEIGHT})
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.route(re.compile("^https?:"), stay_here)
        self.said = ""  # by the terminal
        self.page.on("websocket", self._listen)

    def close(self) -> None:
        self.page.close()

    def command(self, name: str, **arguments: Any) -> None:
        """One of JupyterLab's commands, as its menus call it."""
        self.page.evaluate(
            "async ([name, told]) => { await jupyterapp.commands.execute(name, told); }",
            [name, arguments],
        )

    def show(self, name: str) -> None:
        """A screenshot for the person who looks at it."""
        self.page.screenshot(path=self.pictures / f"{name}.png")

    # ---- Notebooks ----

    def open(self, path: str) -> None:
        """Open a notebook by its address, with a kernel, in an otherwise empty JupyterLab."""
        address, token = self.server.address, self.server.token
        self.page.goto(f"http://{address}/lab/tree/{path}?token={token}&reset")
        self._loaded()
        self.page.wait_for_function(
            "() => jupyterapp.shell.currentWidget.context.sessionContext.session?.kernel?.status"
            " === 'idle'"
        )

    def return_to(self, path: str) -> None:
        """From the terminal back to a notebook that is open."""
        self.command("docmanager:open", path=path)
        self.page.wait_for_function(
            "() => jupyterapp.shell.currentWidget.context?.isReady === true"
        )

    def reload(self) -> None:
        """File > Reload Notebook from Disk."""
        self.page.get_by_role("menuitem", name="File", exact=True).click()
        self.page.get_by_text("Reload Notebook from Disk").click()
        confirm = self.page.locator(".jp-Dialog .jp-mod-accept")
        with suppress(TimeoutError):
            confirm.click(timeout=2000)
        self.page.wait_for_timeout(1000)

    def _loaded(self) -> None:
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.context?.isReady === true"
        )

    def run_all(self) -> None:
        self.command("notebook:run-all-cells")

    def save(self) -> None:
        self.page.keyboard.press("Control+s")
        self.page.wait_for_function("() => !jupyterapp.shell.currentWidget.context.model.dirty")

    def cells(self) -> list[dict[str, Any]]:
        """id, source, count and outputs of the code cells, as the notebook holds them."""
        found: list[dict[str, Any]] = self.page.evaluate(CELLS)
        return found

    def cell(self, identity: str) -> Locator:
        """A code cell on the page, scrolled to."""
        index = self.page.evaluate(
            "id => jupyterapp.shell.currentWidget.content.widgets"
            ".findIndex(cell => cell.model.id === id)",
            identity,
        )
        found = self.page.locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{index}']")
        found.scroll_into_view_if_needed()
        return found

    def type_and_run(self, identity: str, source: str) -> None:
        """Replace a cell's source as somebody does who types, and run it."""
        self.cell(identity).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(source)
        self.run(identity)

    def run(self, identity: str) -> str:
        """Run a cell with Shift+Enter; its output as text."""
        cell = self.cell(identity)
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")
        self.page.wait_for_function(
            "id => { const cell = jupyterapp.shell.currentWidget.content.widgets"
            ".find(cell => cell.model.id === id);"
            " return cell.model.executionState === 'idle' && cell.model.executionCount; }",
            arg=identity,
        )
        return cell.locator(".jp-Cell-outputArea").inner_text()

    def view(self, width: int, theme: str) -> None:
        """Resize the window and choose a theme."""
        self.page.set_viewport_size({"width": width, "height": HEIGHT})
        self.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        self.page.wait_for_function(
            "light => document.body.dataset.jpThemeLight === light",
            arg="true" if theme == "Light" else "false",
        )
        self.page.wait_for_timeout(300)  # a new layout

    def show_whole(self, name: str) -> None:
        """Screenshots of the notebook from top to bottom."""
        outer = ".jp-Notebook .jp-WindowedPanel-outer"
        step = self.page.evaluate(
            "outer => { const e = document.querySelector(outer); e.scrollTop = 0;"
            " return e.clientHeight - 60; }",
            outer,
        )
        for number in range(1, 100):
            self.page.wait_for_timeout(150)
            self.show(f"{name}-{number:02}")
            more = self.page.evaluate(
                "([outer, step]) => { const e = document.querySelector(outer);"
                " const before = e.scrollTop; e.scrollTop += step; return e.scrollTop > before; }",
                [outer, step],
            )
            if not more:
                return

    # ---- The terminal ----

    def _listen(self, socket: WebSocket) -> None:
        if "/terminals/websocket/" in socket.url:
            socket.on("framereceived", self._hear)

    def _hear(self, payload: str | bytes) -> None:
        kind, *texts = json.loads(payload)
        if kind == "stdout":
            self.said += "".join(texts)

    def terminal(self, line: str) -> str:
        """Type a line into JupyterLab's terminal; what is said until it ends."""
        if not self.page.locator(".jp-Terminal").count():
            self.command("terminal:create-new")
        self.page.evaluate(
            "() => { for (const tab of jupyterapp.shell.widgets('main'))"
            " if (tab.node.querySelector('.jp-Terminal')) jupyterapp.shell.activateById(tab.id); }"
        )
        self.page.locator(".jp-Terminal .xterm-screen").click()
        self.page.wait_for_timeout(1000)  # the shell's prompt
        self.said = ""
        self.page.keyboard.type(f"{line}; echo en''ded")
        self.page.keyboard.press("Enter")
        deadline = time.monotonic() + PATIENCE
        while "ended\r\n" not in self.said:
            assert time.monotonic() < deadline, f"{line} does not end: {self.said}"
            self.page.wait_for_timeout(200)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\].*?\x07", "", self.said)
