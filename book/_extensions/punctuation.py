"""A formula and the punctuation after it stay on one line. Browsers may break a line at both sides of a formula."""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

PUNCTUATION = re.compile(r"[,.;:!?)\]’”–-]+")


class JoinPunctuation(SphinxPostTransform):
    """Put the formula and its punctuation into one span of class `joined`, which `book.css` does not break."""

    default_priority = 900
    formats = ("html",)

    def run(self, **options: object) -> None:
        for formula in list(self.document.findall(nodes.math)):
            text = formula.next_node(descend=False, siblings=True)
            found = PUNCTUATION.match(text) if isinstance(text, nodes.Text) else None
            if not found:
                continue
            joined = nodes.inline(classes=["joined"])
            formula.replace_self(joined)
            joined += [formula, nodes.Text(found[0])]
            text.parent.replace(text, nodes.Text(text[found.end() :]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_post_transform(JoinPunctuation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
