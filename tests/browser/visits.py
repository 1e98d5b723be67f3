"""The built site served on a local port, and Chromium visiting it with every other host out of reach."""

import contextlib
import os
import runpy
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SITE = Path(os.environ.get("RKD_SITE", ROOT / "_build" / "html")).resolve()
CHROMIUM = shutil.which("chromium") or next(filter(os.path.exists, ["/usr/bin/chromium"]), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
# the front page only sends on to the introduction
PAGES = sorted({path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")} - {"index.html"})
PAGES = [name for name in PAGES if not name.startswith("_")]

READY = """async () => {
    if (!document.querySelector('script[src*="mathjax/"]')) return;
    while (!window.MathJax?.startup?.promise) await new Promise(resolve => setTimeout(resolve, 10));
    await MathJax.startup.promise;
}"""
ALIVE = "() => !document.querySelector('.rkd-interactive') || document.documentElement.dataset.interactive === 'ready'"
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"
THEME = """theme => {
    document.documentElement.dataset.mode = document.documentElement.dataset.theme = theme;
    return new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)));
}"""


@contextlib.contextmanager
def served(folder=SITE):
    """The address of a site, as `make serve` shows it."""
    with runpy.run_path(str(ROOT / "book" / "serve.py"))["server"](folder, 0) as server:
        server.RequestHandlerClass.func.log_message = lambda *message: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextlib.contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A window, and what went wrong since a page was opened in it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @property
    def wrong(self):
        return {"errors": self.errors, "failed": self.failed, "outside": self.outside}

    def open(self, address):
        """Go there, wait until formulas are typeset and figures are alive, and stop all movement."""
        for list_ in self.wrong.values():
            list_.clear()
        self.page.goto(address)
        self.page.evaluate(READY)
        self.page.wait_for_function(ALIVE)
        self.page.add_style_tag(content=STILL)
        return self

    def show(self, theme, width=1280):
        """Set the theme as the page's own switch does, and the width of the window."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.evaluate(THEME, theme)
        return self.page


def visitor(browser, base, **settings):
    """A window whose requests to `base` and to files go through and all others are refused and written down."""
    settings = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | settings
    visit = Visit(browser.new_context(**settings).new_page())

    def refuse(route):
        visit.outside.append(route.request.url)
        route.abort()

    visit.page.context.route(lambda url: not url.startswith((base, "file:", "data:", "blob:")), refuse)
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    visit.page.on("console", lambda said: visit.errors.append(said.text) if said.type in ("error", "warning") else None)
    visit.page.on("requestfailed", lambda request: visit.failed.append(request.url))
    visit.page.on("response", lambda answer: visit.failed.append(answer.url) if answer.status >= 400 else None)
    return visit
