"""Docstrings name the page that explains them, as in `Book: 2.1.1, "The Objective".`

Here that becomes a link. A title that no page has is a warning, and so an error.
"""

import json
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
SENTENCE = re.compile(r"(?:Explained in the book|Book): .*?\.(?=\s|$)", re.DOTALL)
PAGE = re.compile(r"(?:section )?([A\d][.\d]*),\s+\"([^\"]+)\"")


def title_of(source: Path) -> str:
    """The first heading of a page, without the number that an attachment's has."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    heading = re.search(r"^# (?:A\.\d+ )?(.+)$", text, re.MULTILINE)
    return heading[1] if heading else ""


def find_pages(app: Sphinx, env: Any, docnames: list[str]) -> None:
    app.book_pages = {title_of(Path(env.doc2path(name))): name for name in env.found_docs}


def link(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replace every number and title after `Book:` by a link to that page, in place."""

    def to_page(match: re.Match[str]) -> str:
        number, title = match[1], " ".join(match[2].split())
        if title not in app.book_pages:
            logger.warning("the docstring of %s names a page that does not exist: %r", name, title)
            return match[0]
        return f":doc:`{number} {title} </{app.book_pages[title]}>`"

    text = SENTENCE.sub(lambda sentence: PAGE.sub(to_page, sentence[0]), "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("env-before-read-docs", find_pages)
    app.connect("autodoc-process-docstring", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
