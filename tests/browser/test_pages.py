"""Every page as a host serves it to Chromium: errors, requests, formulas, links, outside of the text too."""

import functools
import re
from urllib.parse import unquote, urldefrag

import pytest
from visits import PAGES, SITE, visitor

FORMULAS = """() => {
    const all = [...document.querySelectorAll('span.math, div.math')];
    const drawn = math => [...math.querySelectorAll('mjx-container')].some(box => box.getBoundingClientRect().width);
    return {
        all: all.length,
        bare: all.filter(math => math.checkVisibility() && !drawn(math)).map(math => math.textContent),
        undrawn: all.filter(math => !math.querySelector('mjx-container')).map(math => math.textContent),
        wrong: [...document.querySelectorAll('mjx-merror, [data-mjx-error]')]
            .map(error => error.getAttribute('data-mjx-error') || error.textContent),
    };
}"""
# what a reader sees outside code
PROSE = """() => {
    const copy = document.querySelector('main').cloneNode(true);
    copy.querySelectorAll('pre, code, script, style, mjx-container').forEach(part => part.remove());
    return copy.textContent;
}"""
TEX = re.compile(r".{0,30}(?:\\[()\[\]]|\$\$|\\(?:frac|alpha|begin|operatorname|mathbb|text)\b).{0,30}")


def formulas(page):
    """How many formulas a page has; all of them are typeset."""
    found = page.evaluate(FORMULAS)
    assert {key: found[key] for key in ("bare", "undrawn", "wrong")} == {"bare": [], "undrawn": [], "wrong": []}
    assert TEX.findall(page.evaluate(PROSE)) == []
    return found["all"]


@functools.cache
def anchors(path):
    """The ids and names that a built page has."""
    return set(re.findall(r'\s(?:id|name)="([^"]+)"', path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module", params=PAGES)
def opened(request, window, base):
    return window.open(base + request.param)


def test_nothing_fails_and_nothing_comes_from_elsewhere(opened):
    assert opened.wrong == {"errors": [], "failed": [], "outside": []}


def test_every_formula_is_typeset(opened):
    formulas(opened.page)


def test_links_of_the_whole_page_lead_somewhere(opened, base):
    """Also those of the sidebars, buttons and footers, and those that scripts make."""
    links = opened.page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)")
    inside = {link.removeprefix(base) for link in links if link.startswith(base)}
    assert len(inside) > 40
    for link in inside:
        name, anchor = urldefrag(link)
        path = SITE / unquote(name.partition("?")[0] or "index.html")
        assert path.is_file(), link
        assert not anchor or path.suffix != ".html" or unquote(anchor) in anchors(path), link


def test_formulas_are_counted(window, base):
    assert formulas(window.open(base + "book/theory/renyi-divergence.html").page) > 100


def test_the_front_page_sends_on_to_the_introduction(window, base):
    window.page.goto(base)
    window.page.wait_for_url("**/book/index.html")
    assert window.page.get_by_role("heading", name="Introduction").is_visible()


@pytest.mark.parametrize("name", ["book/renyi-distillation/explorer", "book/renyi-distillation/copies"])
def test_the_heaviest_pages_load_less_than_three_megabytes(browser, base, name):
    """Uncompressed, nothing cached, fonts included."""
    first = visitor(browser, base)
    received = {}
    first.page.on("response", lambda answer: received.setdefault(answer.url, answer))
    first.open(f"{base}{name}.html")
    weights = [len(answer.body()) for answer in received.values() if answer.ok]
    first.page.context.close()
    assert len(weights) > 20
    assert sum(weights) < 3_000_000
