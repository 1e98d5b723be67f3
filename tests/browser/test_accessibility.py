"""Every page from the disk: that it works there, axe-core in light and dark, a phone; figures in the dark."""

import functools
import io
from importlib.util import find_spec
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from test_pages import formulas
from visits import PAGES, SITE

THEMES = ("light", "dark")
# the levels A and AA of WCAG 2.0 and 2.1; the themes differ in colours alone, and a rule of colours is a slow one
RULES = {"light": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "dark": ["color-contrast", "link-in-text-block"]}
AXE = "rules => axe.run(document, {resultTypes: ['violations'], runOnly: rules, preload: false})"
OPEN_FOLDS = "document.querySelectorAll('main details').forEach(fold => fold.open = true)"
# code has thousands of words in few colours: one of each colour and ground is looked at
ONE_WORD_OF_EACH = """() => {
    const seen = new Set();
    for (const word of document.querySelectorAll('pre span:not(:has(*))')) {
        const grounds = [word, word.closest('pre'), word.closest('div')];
        const look = grounds.map(part => getComputedStyle(part)).map(style => style.color + style.backgroundColor);
        const key = look + word.closest('div').className + word.className;
        word.style.visibility = seen.has(key) ? 'hidden' : '';
        seen.add(key);
    }
}"""

# the page is wider than the window
BEYOND = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# what stands out of the window to the right although no box around it scrolls
TOO_WIDE = """() => [...document.querySelectorAll('main :not(mjx-container *, svg *)')].filter(element => {
    if (element.getBoundingClientRect().right <= innerWidth + 1 || !element.checkVisibility()) return false;
    if (element.closest('mjx-assistive-mml, dialog')) return false;
    for (let box = element; box; box = box.parentElement) {
        const style = getComputedStyle(box);
        if (style.overflowX !== 'visible' && box.getBoundingClientRect().right <= innerWidth + 1) return false;
        if (style.position === 'fixed') return false;
    }
    return true;
}).map(element => element.outerHTML.slice(0, 150))"""
# boxes that scroll sideways and that the Tab key does not reach
OUT_OF_REACH = """() => [...document.querySelectorAll('main :not(mjx-container *, svg *)')].filter(box =>
    box.scrollWidth > box.clientWidth + 1 && box.clientWidth > 0 && box.tabIndex < 0
    && ['auto', 'scroll'].includes(getComputedStyle(box).overflowX)).map(box => box.outerHTML.slice(0, 150))"""


@functools.cache
def axe():
    found = find_spec("axe_playwright_python")
    if found is None:
        pytest.skip("needs axe-playwright-python")
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page, rules):
    """What axe-core calls serious or critical: rule, selector, start of the element, what to mend."""
    return [
        (rule["id"], node["target"], node["html"][:200], node["failureSummary"][:300])
        for rule in page.evaluate(AXE, rules)["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@pytest.fixture(scope="module", params=PAGES)
def opened(request, window, base):
    """A page with its folds open. The page for wrong addresses belongs to a host."""
    name = request.param
    window.open(base + name if name == "404.html" else (SITE / name).as_uri())
    window.page.evaluate(OPEN_FOLDS)
    return window


def test_it_works_from_the_disk(opened):
    formulas(opened.page)
    assert opened.wrong == {"errors": [], "failed": [], "outside": []}


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_serious(opened, theme):
    page = opened.show(theme)
    page.evaluate(ONE_WORD_OF_EACH)
    page.evaluate(axe())
    assert violations(page, RULES[theme]) == []


def out_of_reach(page):
    """Scripts mark what scrolls when a window has come to rest: wait for them, 3 seconds at most."""
    for _ in range(30):
        if not page.evaluate(OUT_OF_REACH):
            break
        page.wait_for_timeout(100)
    return page.evaluate(OUT_OF_REACH)


def test_on_a_phone_the_text_fits_and_wide_boxes_are_in_reach(opened):
    for width in (420, 360):
        page = opened.show("light", width)
        found = page.evaluate(BEYOND), page.evaluate(TOO_WIDE), out_of_reach(page)
        assert (width, *found) == (width, 0, [], [])


def luminance(element):
    """Relative luminance of each pixel as WCAG defines it, in [0, 1], shape (height, width)."""
    image = matplotlib.image.imread(io.BytesIO(element.screenshot()))[..., :3]
    linear = np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(pixels):
    """Of each pixel with the ground, which is what most pixels show, from 1 to 21."""
    values, counts = np.unique(pixels, return_counts=True)
    ground = values[counts.argmax()]
    return (np.maximum(pixels, ground) + 0.05) / (np.minimum(pixels, ground) + 0.05)


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("book/theory/renyi-divergence", "article figure img"),  # of matplotlib, black on a ground of its own
        (
            "book/renyi-distillation/explorer",
            "#rkd-chord .rkd-chart svg",
        ),  # drawn in the browser, in the theme's colours
    ],
)
def test_words_of_a_figure_are_legible_in_both_themes(window, base, name, picture):
    """Pixels that are ink in the light stand out from the ground in the dark, too."""
    window.open(f"{base}{name}.html")
    window.page.add_style_tag(content="img { padding: 0 !important }")  # which the themes set differently
    shown = {}
    for theme in THEMES:
        element = window.show(theme).locator(picture).first
        shown[theme] = contrast(luminance(element))
    assert shown["light"].shape == shown["dark"].shape
    ink = shown["light"] > 10
    assert 300 < ink.sum() < 0.1 * ink.size
    assert (shown["dark"][ink] > 4.5).mean() > 0.95
