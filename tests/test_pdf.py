"""The typeset book: the numbers of the site, links that lead somewhere, pictures as vectors, lines that fit.

`make pdf` writes it; without LaTeX, or with a book that has changed since, there is nothing to test.
"""

import functools
import re
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup
from pypdf import PdfReader

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
PDF = ROOT / "_build" / "pdf" / "book.pdf"
LATEX = ROOT / "_build" / "pdf" / "_build" / "latex"
SOURCES = [path for name in ("*.ipynb", "*.md", "*.bib", "_extensions/*") for path in (ROOT / "book").rglob(name)]

OVERFULL = 10  # points beyond the margin: a third of a letter's height is not seen, a word is
BITMAP = 100_000  # pixels: a map of coloured cells may be one, a drawing never


def reason_to_skip():
    if not PDF.exists():
        return f"{PDF.relative_to(ROOT)} is missing: make pdf"
    newer = [path for path in SOURCES if path.stat().st_mtime > PDF.stat().st_mtime]
    return f"{newer[0].relative_to(ROOT)} is newer than the PDF: make pdf" if newer else ""


pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


@functools.cache
def reader():
    return PdfReader(PDF)


@functools.cache
def page_text(index):
    return reader().pages[index].extract_text()


@functools.cache
def text():
    """All words of the book, in order, with single blanks."""
    return " ".join(" ".join(page_text(index) for index in range(len(reader().pages))).split())


@functools.cache
def labels():
    """Where LaTeX put each label: {page of the book: {name: (number, page of the PDF)}}."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    pattern = re.compile(r"\\newlabel\{(?:equation:)?([^{}:]+):([^{}:]+)\}\{\{(\{[^{}]*\}|[^{}]*)\}\{(\w+)\}")
    for page, name, number, where in pattern.findall((LATEX / "book.aux").read_text(encoding="utf-8")):
        found.setdefault(page, {})[name] = (number.strip("{}"), where)
    return found


def numbers(pattern):
    """Number of every label whose name begins like this, with the page of the PDF."""
    return [(name, *place) for page in labels().values() for name, place in page.items() if re.match(pattern, name)]


def outline(entries, depth=0):
    for entry in entries:
        if isinstance(entry, list):
            yield from outline(entry, depth + 1)
        else:
            yield depth, entry.title


def site_pages():
    """The pages of the site in the order of the book: {name: tree}."""

    def names(entry):
        if isinstance(entry, list):
            return [name for part in entry for name in names(part)]
        own = [entry[key] for key in ("root", "file") if key in entry]
        return own + [name for key in ("parts", "chapters", "sections") for name in names(entry.get(key, []))]

    pages = names(yaml.safe_load((ROOT / "_toc.yml").read_text()))
    if not all((SITE / f"{name}.html").exists() for name in pages):
        pytest.skip("the site is not built, or not whole: make book")
    return {name: BeautifulSoup((SITE / f"{name}.html").read_text(encoding="utf-8"), "html.parser") for name in pages}


class TestDocument:
    def test_it_is_a_whole_book_and_says_whose(self):
        metadata = reader().metadata
        assert metadata.title == "Neural Networks and Knowledge Distillation"
        assert "Martin Grätzer" in metadata.author
        assert 150 < len(reader().pages) < 400

    def test_no_page_is_empty(self):
        assert [index for index in range(len(reader().pages)) if len(page_text(index).split()) < 5] == []

    def test_chapters_and_their_sections_are_in_the_outline(self):
        chapters = [title for depth, title in outline(reader().outline) if depth == 0]
        assert chapters[:4] == [
            "Introduction",
            "1 Knowledge Distillation and Rényi Divergence",
            "2 Rényi Distillation",
            "Conclusion",
        ]
        assert chapters[-2:] == ["Attachments", "Index"]
        assert {"1.1 Knowledge Distillation", "1.2 Rényi Divergence", "2.1 Analysis", "2.2 Experiments"} <= {
            title for depth, title in outline(reader().outline) if depth == 1
        }

    def test_every_font_is_embedded(self):
        fonts, seen = {}, set()

        def collect(resources):
            for font in resources.get("/Font", {}).values():
                font = font.get_object()
                descendant = font["/DescendantFonts"][0].get_object() if "/DescendantFonts" in font else font
                if font["/Subtype"] != "/Type3":  # its letters are drawings in the file
                    descriptor = descendant.get("/FontDescriptor", {})
                    descriptor = descriptor.get_object() if descriptor else {}
                    fonts[font["/BaseFont"]] = any(key.startswith("/FontFile") for key in descriptor)
            for form in resources.get("/XObject", {}).values():
                form = form.get_object()
                if id(form) not in seen and "/Resources" in form:
                    seen.add(id(form))
                    collect(form["/Resources"])

        for page in reader().pages:
            collect(page["/Resources"])
        assert fonts
        assert [name for name, embedded in fonts.items() if not embedded] == []

    def test_pictures_are_vectors(self):
        images, forms, seen = [], [], set()

        def collect(resources):
            for drawing in resources.get("/XObject", {}).values():
                drawing = drawing.get_object()
                if id(drawing) in seen:
                    continue
                seen.add(id(drawing))
                if drawing["/Subtype"] == "/Image":
                    images.append(drawing["/Width"] * drawing["/Height"])
                else:
                    forms.append(drawing)
                    collect(drawing.get("/Resources", {}))

        for page in reader().pages:
            collect(page["/Resources"])
        assert len(forms) >= len(numbers("fig-")) > 30
        assert [size for size in images if size > BITMAP] == []


class TestLatex:
    """What LaTeX says of its own work."""

    log = property(lambda self: (LATEX / "book.log").read_text(encoding="utf-8", errors="replace"))

    def test_every_character_has_a_glyph(self):
        assert re.findall("Missing character: .*", self.log) == []

    def test_every_reference_is_resolved(self):
        assert re.findall("LaTeX Warning: (?:Reference|Citation|There were|Label).*", self.log) == []
        assert "??" not in text()

    def test_every_line_fits(self):
        beyond = re.findall(r"Overfull \\[hv]box \(([\d.]+)pt .*", self.log)
        assert [points for points in map(float, beyond) if points > OVERFULL] == []

    def test_every_link_within_the_book_has_a_target(self):
        targets = set(reader().named_destinations)
        links = [note.get_object() for page in reader().pages for note in page.get("/Annots", [])]
        within = [link["/A"]["/D"] for link in links if link.get("/A", {}).get("/S") == "/GoTo"]
        within += [link["/Dest"] for link in links if "/Dest" in link]
        assert len(within) > 1000
        assert set(map(str, within)) <= targets


class TestNumbers:
    def test_the_lines_of_the_thesis_have_its_numbers(self):
        placed = numbers(r"eq-1-\d+$")
        assert [number for _, number, _ in placed] == [f"1.{count}" for count in range(1, 34)]
        assert all(name == "eq-" + number.replace(".", "-") for name, number, _ in placed)

    def test_each_number_stands_beside_its_formula(self):
        for _, number, where in numbers(r"eq-\d"):
            shown = page_text(reader().page_labels.index(where))
            assert re.search(rf"\({re.escape(number)}\)\s*$", shown, re.MULTILINE), f"({number}) on page {where}"

    def test_figures_tables_and_equations_are_numbered_as_on_the_site(self):
        compared = 0
        for name, tree in site_pages().items():
            for shown in tree.select("figure[id], table[id]"):
                caption = shown.select_one(".caption-number")
                if caption:
                    assert labels()[name][shown["id"]][0] == caption.get_text().split()[-1], shown["id"]
                    compared += 1
            for shown in tree.select("div.math[id]"):
                if shown.select_one(".eqno"):
                    number = re.sub(r"[^\d.]", "", shown.select_one(".eqno").get_text())
                    assert labels()[name][shown["id"].removeprefix("equation-")][0] == number, shown["id"]
                    compared += 1
        assert compared > 100

    def test_statements_are_numbered_as_on_the_site(self):
        shown = [
            " ".join(title.get_text().split())
            for tree in site_pages().values()
            for title in tree.select(".proof > .admonition-title:has(.caption-number)")
        ]
        numbered = [title for title in shown if re.search(r"\d", title)]
        assert len(numbered) > 20
        plain = [re.match(r"\w+ [\d.]+", title)[0] for title in numbered]
        assert [title for title in plain if f"{title} " not in text()] == []
        assert len(set(plain)) == len(plain)

    def test_sections_are_numbered_as_on_the_site(self):
        printed = {title for _, title in outline(reader().outline)}
        headings = {  # without the signs of a formula, and of the link behind it
            re.sub(r"^([\d.]+)\.\s+|[\\()^]|#$", lambda dot: f"{dot[1]} " if dot[1] else "", heading.get_text())
            for tree in site_pages().values()
            for heading in tree.select("h1:has(.section-number), h2:has(.section-number)")
        }
        assert len(headings) > 20
        assert headings <= printed
