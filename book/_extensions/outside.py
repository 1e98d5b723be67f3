"""Types in signatures link to the documentation of other projects, without asking these at build time.

`book/inventories` lists the names that the book uses and their pages, in the plain form of Sphinx's inventories. A name
that is missing there is a warning, and so an error. Some classes say where they are defined instead of where they are
documented: these are given their public name here.
"""

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

PUBLIC = {
    "IPython.core.display.Markdown": "IPython.display.Markdown",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.container.Sequential": "torch.nn.Sequential",
    "torch.nn.modules.module.Module": "torch.nn.Module",
}


def use_public_name(app: Sphinx, env: Any, node: pending_xref, text: nodes.TextElement) -> None:
    target = node.get("reftarget")
    node["reftarget"] = PUBLIC.get(target, target)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", use_public_name, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
