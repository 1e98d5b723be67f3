"""The site on a local port, and one browser a worker and module.

Not one a worker: Playwright keeps an event loop running in its thread as long as it lives, and tests of other modules
run loops of their own there.
"""

import pytest
from visits import CHROMIUM, PAGES, SITE, chromium, served, visitor


@pytest.fixture(scope="module")
def base():
    if not PAGES:
        pytest.skip(f"needs the built site, and {SITE} has no pages: make book")
    with served() as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def window(base, browser):
    """One window for all pages of a module, one after the other."""
    return visitor(browser, base)


@pytest.fixture
def visit(base, browser):
    """Opens a page by its name in a window of its own; at the end nothing may have failed."""
    opened = []

    def visit(name, **settings):
        opened.append(visitor(browser, base, **settings))
        if settings.get("java_script_enabled", True):
            opened[-1].open(base + name)
        else:
            opened[-1].page.goto(base + name)
            opened[-1].failed.clear()  # scripts that the page wanted
        return opened[-1].page

    yield visit
    for each in opened:
        each.page.context.close()
    assert [each.wrong for each in opened if any(each.wrong.values())] == []
