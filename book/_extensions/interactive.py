"""The script that brings the figures of `rkd.interactive` to life, on the pages that have one.

Vega's runtime comes out of vl-convert, which has made the figures' specifications: the two fit. It is
written into the site when it is built. It does not lie in `book/_static`, whose scripts every page loads.
"""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

HERE = Path(__file__).parent
RUNTIME = f"vega-{version('vl-convert-python')}.js"


def has_figure(doctree: nodes.document | None) -> bool:
    return doctree is not None and any('class="rkd-interactive"' in raw.astext() for raw in doctree.findall(nodes.raw))


def write(app: Sphinx) -> None:
    """Put scripts and style into the site."""
    if app.builder.format != "html":
        return
    folder = Path(app.outdir) / "_static" / "interactive"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("interactive.js", "interactive.css"):
        shutil.copyfile(HERE / name, folder / name)
    if not (folder / RUNTIME).exists():
        from vl_convert import javascript_bundle

        script = javascript_bundle("window.vegaEmbed = vegaEmbed;")
        # a scope of its own: its names are one letter long, and other scripts have such names too
        (folder / RUNTIME).write_text(f"(() => {{{script}\n}})();\n", encoding="utf-8")


def load(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Name them in the head of a page that has a figure."""
    if has_figure(doctree):
        app.add_css_file("interactive/interactive.css")
        for name in (RUNTIME, "interactive.js"):
            app.add_js_file(f"interactive/{name}", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    app.connect("html-page-context", load)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
