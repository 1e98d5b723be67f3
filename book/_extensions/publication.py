"""What the site says about itself: where it lives, its licences, the book as one PDF, what a wrong address shows.

The addresses are given once, as `Repository` and `Documentation` in `pyproject.toml` under `[project.urls]`. The first
brings the buttons to the repository and to Binder, the second the canonical address of every page, and the picture, the
title and the sentence that social networks show for it. Without them none of these is there.
"""

import shutil
import tomllib
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

LICENCES = {
    "LICENSE": "LICENSE.txt",
    "LICENSE-text": "LICENSE-text.txt",
}  # plain names would be downloaded, not shown
CARD = "preview.png"  # social networks show no SVG
FOOTER = (
    'Text and figures: <a rel="license" href="{text}">CC BY 4.0</a>. Code: <a rel="license" href="{code}">MIT</a>. '
    'To cite the book: <a href="{cite}">CITATION.cff</a>.'
)
NOT_FOUND = (
    "<h1>Page not found</h1><p>There is no page at this address. It may have got another name: the list of chapters at "
    "the side has all pages, and the search finds words in them. The book starts with the "
    '<a href="{start}">Introduction</a>.</p>'
)


def addresses(project: dict[str, Any]) -> tuple[str, str]:
    """The repository's and the site's address in a `[project]` table; an empty string for what is not given."""
    urls = project.get("urls", {})
    site = urls.get("Documentation", "")
    return urls.get("Repository", "").rstrip("/"), site if not site or site.endswith("/") else f"{site}/"


def set_addresses(app: Sphinx, config: Config) -> None:
    options, repository, site = config.html_theme_options, app.repository, app.site
    options["repository_url"] = repository
    options["use_repository_button"] = options["use_issues_button"] = bool(repository)
    if not repository:
        options.pop("launch_buttons", None)
    if site:
        config.html_baseurl = config.ogp_site_url = site
        config.ogp_image, config.ogp_image_alt = f"_static/{CARD}", "Accuracy of students against the order of the loss"
        config.ogp_description_length, config.ogp_enable_meta_description = 0, False
        summary = escape(app.summary)
        config.ogp_custom_meta_tags = [
            f'<meta property="og:description" content="{summary}" />',
            '<meta name="twitter:card" content="summary_large_image" />',
        ]
    config.notfound_urls_prefix = urlsplit(site).path or "/"


def write_not_found(app: Sphinx) -> None:
    start = f"{app.config.notfound_urls_prefix}{app.config.root_doc}.html"
    app.config.notfound_context = {"title": "Page not found", "body": NOT_FOUND.format(start=start)}


def pdf(app: Sphinx) -> Path:
    """Where `make pdf` leaves the book."""
    return Path(app.srcdir) / "_build" / "pdf" / "book.pdf"


def describe(
    app: Sphinx,
    pagename: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document | None,
) -> None:
    """The footer of a page, and the book as PDF among its downloads."""
    to = context["pathto"]
    context["theme_extra_footer"] = FOOTER.format(
        text=to("LICENSE-text.txt", 1), code=to("LICENSE.txt", 1), cite=to("CITATION.cff", 1)
    )
    for group in context["header_buttons"]:
        if group.get("label") != "download-buttons":
            continue
        for button in group["buttons"]:
            if button["label"] == "download-pdf-button":
                button.update(text="Print this page", icon="fas fa-print")
        if pdf(app).exists():
            book = {
                "type": "link",
                "url": to("book.pdf", 1),
                "text": "The whole book, .pdf",
                "icon": "fas fa-file-pdf",
            }
            group["buttons"].append(book | {"tooltip": "Download the whole book", "label": "download-book-button"})


def copy_files(app: Sphinx, exception: Exception | None) -> None:
    if exception or app.builder.format != "html":
        return
    for name, shown in {**LICENCES, "CITATION.cff": "CITATION.cff"}.items():
        shutil.copyfile(Path(app.srcdir) / name, Path(app.outdir) / shown)
    if pdf(app).exists():
        shutil.copyfile(pdf(app), Path(app.outdir) / "book.pdf")
    if app.site:
        from vl_convert import svg_to_png

        picture = (Path(app.srcdir) / "book" / "_static" / "first-distillation.svg").read_text(encoding="utf-8")
        (Path(app.outdir) / "_static" / CARD).write_bytes(svg_to_png(picture, scale=2))


def setup(app: Sphinx) -> dict[str, bool]:
    project = tomllib.loads((Path(app.confdir) / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    app.summary = project["description"]
    app.repository, app.site = addresses(project)
    app.setup_extension("notfound.extension")
    if app.site:
        app.setup_extension("sphinxext.opengraph")
    app.connect("config-inited", set_addresses, priority=100)
    app.connect("builder-inited", write_not_found)
    app.connect("html-page-context", describe, priority=600)
    app.connect("build-finished", copy_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
