"""Every theorem, definition and proof with an id of its own.

sphinx-proof gives the body of each of its blocks the id `proof-content`, each proof the id
`proof`, and writes the label of an unnumbered block twice. A page with two blocks would not be
valid HTML, and a link could not tell them apart.
"""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator
from sphinx_proof.nodes import (
    depart_unenumerable_node,
    unenumerable_node,
    visit_unenumerable_node,
)


def number(app: Sphinx, doctree: nodes.document) -> None:
    """Number the ids that repeat on a page: proof-content, proof-content-2, proof-content-3, ..."""
    for repeated in ("proof-content", "proof"):
        blocks = [node for node in doctree.findall(nodes.Element) if node.get("ids") == [repeated]]
        for count, node in enumerate(blocks[1:], start=2):
            node["ids"] = [f"{repeated}-{count}"]


def open_unnumbered(writer: HTML5Translator, node: nodes.Element) -> None:
    """The opening tag of an unnumbered block, whose title carries the id."""
    bare = node.copy()
    bare["ids"] = []
    visit_unenumerable_node(writer, bare)


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx_proof")
    app.connect("doctree-read", number)
    app.add_node(
        unenumerable_node,
        override=True,
        html=(open_unnumbered, depart_unenumerable_node),
        latex=(visit_unenumerable_node, depart_unenumerable_node),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
