"""The book as one LaTeX document: what the site shows, in the form that paper wants.

Numbers are the site's own. Sphinx has counted equations, figures, tables and statements when it read
the pages; here each number is written out, so that LaTeX cannot count differently.

- The introduction is the root page. On paper it is a chapter, and the chapters that hang below it
  on the site stand beside it.
- Cells whose input is folded on the site show their output alone; pictures go in as vectors.
- A check is one line of small print, a definition or theorem is a `bookstatement`.
- Greek letters and symbols in the prose are set by the mathematics fonts.

What these commands look like is in `preamble.tex`.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.latex.nodes import thebibliography
from sphinx.config import Config
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.transforms.post_transforms.images import ImageConverter
from sphinx.util.math import wrap_displaymath
from sphinx.writers.latex import LaTeXTranslator
from sphinx_proof.nodes import NODE_TYPES, proof_node, unenumerable_node

HERE = Path(__file__).parent
STATEMENTS = (*NODE_TYPES.values(), unenumerable_node)
PICTURE_SCALE = 57  # per cent: a figure of 8.4 inches, at 96 dots an inch in points, fills the line
BIBLIOGRAPHY = "book/bibliography"
LONG_TABLE, LINE = 28, 90  # lines of a table that stays on one page; characters of a line
NUMBERED, UNNUMBERED = 2, -1  # LaTeX's secnumdepth: down to subsections, or not even chapters

GREEK = (
    "α alpha, β beta, γ gamma, δ delta, ε varepsilon, ζ zeta, η eta, θ theta, ι iota, κ kappa, λ lambda, "
    "μ mu, µ mu, ν nu, ξ xi, π pi, ρ rho, σ sigma, τ tau, υ upsilon, φ varphi, χ chi, ψ psi, ω omega, "
    "Γ Gamma, Δ Delta, Θ Theta, Λ Lambda, Ξ Xi, Π Pi, Σ Sigma, Φ Phi, Ψ Psi, Ω Omega"
)
SYMBOLS = {
    **{letter: rf"\{name}" for letter, name in re.findall(r"(\w) (\w+)", GREEK)},
    **{"−": "-", "‖": r"\Vert", "∞": r"\infty", "≤": r"\le", "≥": r"\ge", "≪": r"\ll", "≫": r"\gg"},
    **{"≈": r"\approx", "≠": r"\ne", "→": r"\to", "∂": r"\partial", "∇": r"\nabla", "⊆": r"\subseteq"},
    **{"∈": r"\in", "√": r"\surd", "★": r"\star", "′": r"^{\prime}", "″": r"^{\prime\prime}"},
    **{"‴": r"^{\prime\prime\prime}", "ᵀ": r"^{\mathsf T}", "⁻": "^{-}", "⅔": r"\tfrac23"},
    **{raised: f"^{{{digit}}}" for digit, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{lowered: f"_{{{digit}}}" for digit, lowered in enumerate("₀₁₂₃₄₅₆₇₈₉")},
}
MEAN = re.compile("([A-Za-zα-ω])\u0304")  # a letter under a bar, which is a character of its own
SYMBOL = re.compile("[" + "".join(SYMBOLS) + "]")
TAG = re.compile(r"\\tag\{[^{}]*\}")
FOREIGN = re.compile("[^\u0000-\u017f\u2010-\u2026]+")  # what Latin Modern has not got


# --------------------------------------------------------------------------- before Sphinx resolves anything


class Outline(SphinxPostTransform):
    """Put the chapters beside the introduction; LaTeX writes the index itself."""

    formats = ("latex",)
    default_priority = 1

    def run(self, **_: object) -> None:
        introduction = next(self.document.findall(nodes.section))
        introduction["docname"] = self.document["docname"]
        below = [node for node in introduction if "toctree-wrapper" in node.get("classes", [])]
        pages = [page for wrapper in below for page in wrapper.children]
        for wrapper in below:
            introduction.remove(wrapper)
        book = nodes.section("", nodes.title(text="title page"), introduction)
        book.extend(page for page in pages if page.get("docname") != "genindex")
        self.document.children = []
        self.document += book


class Cells(SphinxPostTransform):
    """Leave out folded input; show a check as one line of text."""

    formats = ("latex",)
    default_priority = 3  # before MyST-NB chooses one form of each output

    def run(self, **_: object) -> None:
        for cell in list(self.document.findall(nodes.container)):
            element, folded = cell.get("nb_element"), cell.get("hide_mode") or ""
            if element == "cell_code" and ("input" in folded or folded == "all"):
                for source in [child for child in cell if child.get("nb_element") == "cell_code_source"]:
                    cell.remove(source)
            if element == "mime_bundle":
                forms = {form["mime_type"]: form for form in cell.children}
                if "rkd-check" in forms.get("text/html", nodes.container()).astext():
                    mark = nodes.inline("", forms["text/plain"].astext(), classes=["rkd-check"])
                    cell.replace_self(nodes.paragraph("", "", mark))


class Tables(SphinxPostTransform):
    """Lines broken by <br> in a cell; no empty paragraph, which would be a line of its own."""

    formats = ("latex",)
    default_priority = 3

    def run(self, **_: object) -> None:
        for node in list(self.document.findall(nodes.raw)):
            if node.get("format") == "html" and node.astext().startswith("<br"):
                node.replace_self(nodes.raw("", r"\newline{}", format="latex"))
        for entry in self.document.findall(nodes.entry):
            for empty in [part for part in entry if isinstance(part, nodes.paragraph) and not part.children]:
                entry.remove(empty)


class Statements(SphinxPostTransform):
    """A definition, theorem or example with its number and name."""

    formats = ("latex",)
    default_priority = 3

    def run(self, **_: object) -> None:
        for node in list(self.document.findall(lambda node: isinstance(node, STATEMENTS))):
            page = page_of(node)
            numbers = self.env.toc_fignumbers.get(page, {}).get(node.get("countertype", ""), {})
            number = ".".join(map(str, numbers.get(node["ids"][0], ())))
            title, *body = node.children
            parts = [part for child in body for part in (child if isinstance(child, nodes.section) else [child])]
            heading = f"{node['realtype'].title()} {number}".strip()
            node.replace_self(statement("", *parts, heading=heading, name=title.astext().strip(), ids=node["ids"]))
        for node in list(self.document.findall(proof_node)):
            first = next(node.findall(nodes.Text))
            first.parent.replace(first, nodes.Text(first.removeprefix("Proof. ")))
            parts = [part for admonition in node.children for part in admonition.children]
            node.replace_self(statement("", *parts, heading="Proof", name="", ids=[]))


class statement(nodes.General, nodes.Element):
    """A numbered statement of the book, for LaTeX alone."""


def page_of(node: nodes.Node) -> str:
    """The page that a node of the assembled book comes from."""
    while not (isinstance(node, nodes.section) and node.get("docname")):
        node = node.parent
    return node["docname"]


class Bibliography(SphinxPostTransform):
    """Leave the bibliography on its page; Sphinx puts it behind everything else."""

    formats = ("latex",)
    default_priority = 760  # after Sphinx has moved it

    def run(self, **_: object) -> None:
        pages = [page for page in self.document.findall(addnodes.start_of_file) if page["docname"] == BIBLIOGRAPHY]
        for entries in list(self.document.findall(thebibliography)):
            entries.parent.remove(entries)
            next(pages[0].findall(nodes.section)).append(entries)


class Vectors(ImageConverter):
    """Pictures as PDF."""

    conversion_rules: ClassVar = [("image/svg+xml", "application/pdf")]

    def is_available(self) -> bool:
        return True

    def convert(self, _from: str, _to: str) -> bool:
        from vl_convert import svg_to_pdf

        Path(_to).write_bytes(svg_to_pdf(Path(_from).read_text(encoding="utf-8")))
        return True


# --------------------------------------------------------------------------- the writer


def characters(cell: nodes.Element) -> list[float]:
    """How wide the words of a cell are, in characters of the text."""
    widths = {nodes.math: 0.4, nodes.literal: 1.4}  # of a character in the source
    return [
        (len(word) + 1) * widths.get(type(text.parent), 1.0)
        for text in cell.findall(nodes.Text)
        for word in ([text] if isinstance(text.parent, nodes.math) else text.split())
    ]


def measure(rows: list[nodes.row]) -> tuple[list[int], float]:
    """The widths of a table's columns, in characters, and its height in lines, were it as wide as the text.

    A column holds its longest word, and up to 60 characters of a text.
    """
    cells = [[characters(cell) for cell in row] for row in rows]
    widths = [round(max(max(min(sum(c), 60), *c, 7) for c in column)) + 3 for column in zip(*cells, strict=True)]
    share = [max(width - 3, 1) * min(1, LINE / sum(widths)) for width in widths]
    return widths, sum(max(-(-sum(c) // room) or 1 for c, room in zip(row, share, strict=True)) for row in cells)


class Writer(LaTeXTranslator):
    """Sphinx's writer, with the site's numbers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.elements["contentsname"] = ""  # not the caption of the first part

    def number(self, kind: str, node: nodes.Element) -> str:
        numbers = self.builder.env.toc_fignumbers.get(self.curfilestack[-1], {}).get(kind, {})
        return ".".join(map(str, next((numbers[i] for i in node["ids"] if i in numbers), ())))

    def visit_title(self, node: nodes.Element) -> None:
        if isinstance(node.parent, nodes.section) and self.sectionlevel == 1 and not self.this_is_the_title:
            numbered = self.builder.env.toc_secnumbers.get(self.curfilestack[-1], {}).get("")
            self.body.append(rf"\setcounter{{secnumdepth}}{{{NUMBERED if numbered else UNNUMBERED}}}" + "\n")
        super().visit_title(node)

    def visit_section(self, node: nodes.Element) -> None:
        self.body.append("\n\\FloatBarrier\n")  # a picture stays with the text that shows it
        super().visit_section(node)

    def visit_math_block(self, node: nodes.Element) -> None:
        """A labelled line with the site's number; LaTeX wants a \\tag outside of what it splits into lines."""
        number = self.number("displaymath", node) if node.get("label") else ""
        label = f"equation:{node['docname']}:{node['label']}" if number else None
        tags = TAG.findall(node.astext()) or [rf"\tag{{{number}}}"] * bool(number)
        formula = wrap_displaymath(TAG.sub("", node.astext()), label, False)
        formula = formula.replace(r"\begin{split}", r"\bookformula{").replace(r"\end{split}", "}")
        start, rest = formula.split("\n", 1)
        self.body.append("\n".join([start + "".join(tags), rest, ""]))
        raise nodes.SkipNode

    def visit_image(self, node: nodes.Element) -> None:
        if not {"width", "height", "scale"} & node.attributes.keys():
            node["scale"] = PICTURE_SCALE
        super().visit_image(node)

    def visit_caption(self, node: nodes.Element) -> None:
        if isinstance(node.parent, nodes.figure):
            self.body.append(rf"\renewcommand{{\thefigure}}{{{self.number('figure', node.parent)}}}" + "\n")
        super().visit_caption(node)

    def visit_table(self, node: nodes.Element) -> None:
        self.body.append(rf"\renewcommand{{\thetable}}{{{self.number('table', node)}}}" + "\n")
        rows = list(node.findall(nodes.row))
        widths, height = measure(rows)
        if height > LONG_TABLE:  # it may break across pages, and then LaTeX cannot find widths by itself
            node["classes"] += ["longtable", "colwidths-given"]
            for width, spec in zip(widths, node.findall(nodes.colspec), strict=True):
                spec["colwidth"] = width
        super().visit_table(node)

    def visit_index(self, node: nodes.Element) -> None:
        start = len(self.body)
        try:
            super().visit_index(node)
        finally:  # LaTeX reads a hyphen's command in two ways, and makes two entries of one
            self.body[start:] = [part.replace(r"\sphinxhyphen{}", "-") for part in self.body[start:]]

    def visit_statement(self, node: nodes.Element) -> None:
        labels = "".join(self.hypertarget(name) for name in node["ids"])
        self.body.append(f"\n\\begin{{bookstatement}}{{{node['heading']}}}{{{self.encode(node['name'])}}}{labels}\n")

    def depart_statement(self, node: nodes.Element) -> None:
        self.body.append("\n\\end{bookstatement}\n")

    def visit_Text(self, node: nodes.Text) -> None:
        typewriter, above = (nodes.literal, nodes.literal_block, addnodes.desc_signature), node.parent
        while above is not None and not isinstance(above, typewriter):
            above = above.parent
        self.body.append(self.encode(node.astext()) if above is None else super().encode(node.astext()))

    def encode(self, text: str) -> str:
        """Escape what LaTeX reads as a command, and set symbols in fonts that have them."""
        text = MEAN.sub(
            lambda mean: self.formula(rf"\bar{{{SYMBOLS.get(mean[1], mean[1])}}}", mean[0]), super().encode(text)
        )
        text = SYMBOL.sub(lambda symbol: self.formula(SYMBOLS[symbol[0]], symbol[0]), text)
        return FOREIGN.sub(lambda other: self.formula(rf"\text{{\symbolfont {other[0]}}}", other[0]), text)

    def formula(self, source: str, text: str) -> str:
        """A symbol, which is plain text in the PDF's list of sections."""
        return (
            rf"\texorpdfstring{{\ensuremath{{{source}}}}}{{{text}}}" if self.in_title else rf"\ensuremath{{{source}}}"
        )


def configure(app: Sphinx, config: Config) -> None:
    """Fonts, title page and layout, unless `_config.yml` says otherwise."""
    preamble = (HERE / "preamble.tex").read_text(encoding="utf-8")
    elements = {
        "papersize": "a4paper",
        "pointsize": "11pt",
        "extraclassoptions": "oneside,openany",
        "fontpkg": "",
        "fncychap": "",
        "figure_align": "!htb",
        "geometry": r"\usepackage[textwidth=160mm,textheight=242mm,centering]{geometry}",
        "sphinxsetup": "",
        "fvset": r"\fvset{fontsize=\fontsize{8.5}{10.5}\selectfont}",
        "preamble": preamble,
        "maketitle": r"\booktitlepage",
        "printindex": r"\cleardoublepage\phantomsection\label{\detokenize{genindex::doc}}\printindex",
    }
    config.latex_elements = {**elements, **config.latex_elements}


def use_writer(app: Sphinx) -> None:
    """For LaTeX alone: the site's theme brings its own writer only while no other builder has been given one."""
    if app.builder.name == "latex":
        app.set_translator("latex", Writer)


def setup(app: Sphinx) -> dict[str, bool]:
    for transform in (Outline, Cells, Tables, Statements, Vectors, Bibliography):
        app.add_post_transform(transform)
    app.add_node(statement)
    app.connect("builder-inited", use_writer)
    app.connect("config-inited", configure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
