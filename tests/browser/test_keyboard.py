"""What a reader does without a mouse: skip, open the sidebars, search, change the theme, scroll, look at a preview."""

import pytest

PAGE = "book/theory/renyi-divergence.html"
PHONE = {"viewport": {"width": 420, "height": 900}}
FOCUSED = "selector => document.activeElement.matches(selector)"


def is_seen(page):
    """Whether the element with the focus looks different without it."""
    focused = page.evaluate_handle("document.activeElement")
    with_focus = page.screenshot()
    focused.evaluate("HTMLElement.prototype.blur.call(document.activeElement)")
    without = page.screenshot()
    focused.evaluate("element => element.focus()")
    return with_focus != without


def tab_to(page, selector, most=150):
    """Press Tab until the focus is there."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED, selector):
            assert is_seen(page), f"{selector} has the focus and does not show it"
            return
    raise AssertionError(f"the Tab key does not reach {selector}")


def test_the_first_stop_skips_to_the_text(visit):
    page = visit(PAGE)
    tab_to(page, "#pst-skip-link a", most=1)
    assert page.locator("#pst-skip-link a").is_visible()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED, "#main-content *")


def test_the_theme_changes_and_stays(visit):
    page = visit(PAGE, color_scheme="light")
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "light"
    tab_to(page, ".theme-switch-button")
    page.keyboard.press("Enter")
    assert page.evaluate(theme) == "dark"
    page.reload()
    assert page.evaluate(theme) == "dark"


def test_the_search_opens_closes_and_finds(visit):
    page = visit(PAGE)
    dialog = page.locator("#pst-search-dialog")
    tab_to(page, ".search-button-field, .search-button")
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    page.keyboard.press("Control+k")
    assert page.evaluate(FOCUSED, "#pst-search-dialog input")
    page.keyboard.type("temperature")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=temperature")
    page.locator("#search-results li a").nth(5).wait_for()


@pytest.mark.parametrize(
    ("toggle", "dialog"),
    [
        (".primary-toggle", "#pst-primary-sidebar-modal"),  # the list of chapters
        (".secondary-toggle", "#pst-secondary-sidebar-modal"),  # the contents of the page
    ],
)
def test_on_a_phone_the_sidebars_open_and_close(visit, toggle, dialog):
    page = visit(PAGE, **PHONE)
    assert not page.locator(dialog).is_visible()
    tab_to(page, toggle)
    page.keyboard.press("Enter")
    assert page.locator(dialog).is_visible()
    tab_to(page, f"{dialog} a.internal, {dialog} a.nav-link", most=5)
    page.keyboard.press("Escape")
    page.locator(dialog).wait_for(state="hidden")
    page.wait_for_function(FOCUSED, arg=toggle)


def test_a_part_of_the_list_of_chapters_opens(visit):
    page = visit("book/index.html")
    arrow = ".bd-docs-nav details:not([open]) > summary"
    closed = page.locator(arrow).count()
    tab_to(page, arrow)
    page.keyboard.press("Enter")
    assert page.locator(arrow).count() == closed - 1


def test_on_a_phone_a_wide_formula_scrolls(visit):
    page = visit(PAGE, **PHONE)
    page.wait_for_selector("div.math[tabindex='0'], div.math [tabindex='0']", state="attached", timeout=5000)
    tab_to(page, "div.math, div.math *")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")


def test_a_preview_opens_on_focus_and_closes_on_escape(visit):
    page = visit(PAGE)
    link = page.locator("article a.reference.internal[href*='#equation-']").first
    link.focus()
    preview = page.locator(".tippy-box")
    preview.locator("mjx-container").first.wait_for()
    assert preview.is_visible()
    assert link.get_attribute("aria-describedby") == page.locator("[data-tippy-root]").get_attribute("id")
    page.keyboard.press("Escape")
    preview.wait_for(state="detached")
    assert link.evaluate("link => link === document.activeElement")
