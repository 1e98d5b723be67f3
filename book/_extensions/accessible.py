"""Markup that assistive technology reads as it is meant, where Sphinx, docutils or the theme write something else.

- Sphinx breaks a long signature into a definition list without terms. Here its lines are plain spans.
- docutils gives each entry of a bibliography a role that ARIA has withdrawn, so that the list around it has no entries.
- The arrow that opens a part of the list of chapters has no name, and a fold has another name than is written on it.
- Boxes that scroll sideways are out of the keyboard's reach. Which ones do depends on the window: `accessible.js` marks
  them.
"""

from typing import Any

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode, depart_HideCellInput, visit_HideCellInput
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

SIGNATURE_TAGS = {
    "<dl>": '<span class="sig-lines">',
    "<dd>": '<span class="sig-line">',
    "</dd>": "</span>",
    "</dl>": "</span>",
}


def open_parameters(writer: HTML5Translator, node: nodes.Element) -> None:
    writer.context.append(len(writer.body))
    HTML5Translator.visit_desc_parameterlist(writer, node)


def close_parameters(writer: HTML5Translator, node: nodes.Element) -> None:
    HTML5Translator.depart_desc_parameterlist(writer, node)
    start = writer.context.pop()
    writer.body[start:] = [SIGNATURE_TAGS.get(piece.strip(), piece) for piece in writer.body[start:]]


def open_citation(writer: HTML5Translator, node: nodes.Element) -> None:
    HTML5Translator.visit_citation(writer, node)
    writer.body[-1] = writer.body[-1].replace('role="doc-biblioentry"', 'role="listitem"')


def close_citation(writer: HTML5Translator, node: nodes.Element) -> None:
    HTML5Translator.depart_citation(writer, node)


def open_fold(writer: HTML5Translator, node: nodes.Element) -> None:
    start = len(writer.body)
    visit_HideCellInput(writer, node)
    writer.body[start:] = [piece.replace(' aria-label="Toggle hidden content"', "") for piece in writer.body[start:]]


def name_arrows(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Name each arrow after the chapter that it opens."""
    make_chapters = context["generate_toctree_html"]

    def chapters(*args: Any, **options: Any) -> Any:
        tree = make_chapters(*args, **options)
        for arrow in tree.select("li > details > summary"):
            chapter = arrow.find_parent("li").find("a")
            arrow["aria-label"] = f"Pages of {' '.join(chapter.get_text().split())}"
        return tree

    context["generate_toctree_html"] = chapters


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("myst_nb")
    app.add_node(addnodes.desc_parameterlist, override=True, html=(open_parameters, close_parameters))
    app.add_node(nodes.citation, override=True, html=(open_citation, close_citation))
    app.add_node(HideCodeCellNode, override=True, html=(open_fold, depart_HideCellInput))
    app.add_js_file("accessible.js", loading_method="defer")
    app.connect("html-page-context", name_arrows, priority=900)  # after the theme
    return {"parallel_read_safe": True, "parallel_write_safe": True}
