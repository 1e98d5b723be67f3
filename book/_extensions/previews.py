"""Previews: a link to an equation, a theorem, a figure, a reference or a term shows it while it is pointed at.

Each page with such links gets a script of its own with what they lead to, which `book/_static/previews.js` shows. It is
a script and not data, because a browser does not let a page read other files of a disk.
"""

import json
import posixpath
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag
from docutils import nodes
from sphinx.application import Sphinx

TARGETS = "div.math[id], div.proof[id], div.citation[id], figure[id], dl.glossary dt[id]"
SCRIPTS = ("tippy/popper.min.js", "tippy/tippy-bundle.umd.min.js")
Address = tuple[str, str]  # page, anchor


def cleaned(element: Tag) -> Tag:
    """A copy to show a second time: no id twice, no link to itself, no stop of the Tab key, no figure that computes."""
    copy = BeautifulSoup(str(element), "html.parser")
    for part in copy.select("a.headerlink, .rkd-interactive"):
        part.decompose()
    for tag in copy.find_all(True):
        for attribute in ("id", "tabindex", "role", "aria-label"):
            tag.attrs.pop(attribute, None)
    return copy


def shown(element: Tag) -> Tag:
    """What a link to this element shows: the element, and of a term also what it means."""
    copy = cleaned(element)
    meaning = element.find_next_sibling("dd") if element.name == "dt" else None
    if meaning:
        copy.append(cleaned(meaning))
    return copy


def moved(copy: Tag, source: str, target: str) -> str:
    """The copy as HTML, with links and pictures as another page has to write them."""
    copy = BeautifulSoup(str(copy), "html.parser")
    for name, attribute in (("a", "href"), ("img", "src")):
        for tag in copy.find_all(name, {attribute: True}):
            address = tag[attribute]
            if address.startswith("#"):
                address = f"{posixpath.basename(source)}.html{address}"
            if "://" not in address and not address.startswith("data:"):
                there = posixpath.join(posixpath.dirname(source), address)
                tag[attribute] = posixpath.relpath(there, posixpath.dirname(target) or ".")
    return str(copy)


def collect(
    app: Sphinx,
    pagename: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document | None,
) -> None:
    """Note what this page has to show and where it links to; load the scripts if it links anywhere."""
    if doctree is None or app.builder.format != "html":
        return
    body = BeautifulSoup(context["body"], "html.parser")
    links = {}
    for link in body.select('a.reference.internal[href*="#"]'):
        path, _, anchor = link["href"].partition("#")
        page = posixpath.normpath(posixpath.join(posixpath.dirname(pagename), path))
        links[link["href"]] = (page.removesuffix(".html") if path else pagename, anchor)
    app.preview_links[pagename] = links
    for element in body.select(TARGETS):
        names = [element["id"], *(span["id"] for span in element.select("span[id]:empty"))]
        app.preview_targets.update({(pagename, name): shown(element) for name in names})
    if links:
        for script in (*SCRIPTS, f"previews/{pagename}.js", "previews.js"):
            app.add_js_file(script, loading_method="defer")


def write(app: Sphinx, exception: Exception | None) -> None:
    if exception:
        return
    for pagename, links in app.preview_links.items():
        found = {
            href: moved(app.preview_targets[address], address[0], pagename)
            for href, address in sorted(links.items())
            if address in app.preview_targets
        }
        path = Path(app.outdir) / "_static" / "previews" / f"{pagename}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"window.previews = {json.dumps(found, ensure_ascii=False)};\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.preview_links: dict[str, dict[str, Address]] = {}
    app.preview_targets: dict[Address, Tag] = {}
    app.connect("html-page-context", collect)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
