"""The book as it was built and stored: numbers, figures, links, outputs, cell lengths, the README's promises."""

import collections
import functools
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

import rkd
from rkd.symbolic import recorded

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
NOTEBOOKS = sorted((ROOT / "book").rglob("*.ipynb"))
CODE = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
OUTPUTS = [output for cell in CODE for output in cell.outputs]
CHECKS = [check for path in NOTEBOOKS if "attachments" not in path.parts for check, _ in recorded(path)]
MODULES = sorted(path.stem for path in (ROOT / "rkd").glob("[a-z]*.py"))
FIGURES = [cell for cell in CODE if any("image/svg+xml" in output.get("data", {}) for output in cell.outputs)]


def toc(entry):
    """Every page that `_toc.yml` names."""
    if isinstance(entry, list):
        return [page for part in entry for page in toc(part)]
    own = [entry[key] for key in ("root", "file") if key in entry]
    return own + [page for key in ("parts", "chapters", "sections") for page in toc(entry.get(key, []))]


PAGES = toc(yaml.safe_load((ROOT / "_toc.yml").read_text()))


@functools.cache
def page(name):
    path = SITE / f"{name}.html"
    assert path.exists(), f"{path} is missing: build the site first (make book)"
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


class TestSite:
    def test_every_page_is_built_and_every_source_is_in_the_table_of_contents(self):
        sources = {
            path.with_suffix("").relative_to(ROOT).as_posix()
            for path in (ROOT / "book").rglob("*.md")
            if "vendor" not in path.parts
        }
        sources |= {path.with_suffix("").relative_to(ROOT).as_posix() for path in NOTEBOOKS}
        assert sources | {"genindex"} == set(PAGES)
        assert all((SITE / f"{name}.html").exists() for name in PAGES)

    @pytest.mark.parametrize(
        ("name", "first", "last"), [("knowledge-distillation", 1, 15), ("renyi-divergence", 16, 33)]
    )
    def test_equation_numbers_are_the_thesis_s(self, name, first, last):
        numbers = {
            equation["id"]: equation.select_one(".eqno").get_text().strip("()#¶ ")
            for equation in page(f"book/theory/{name}").select("div.math[id]")
        }
        assert numbers == {f"equation-eq-1-{k}": f"1.{k}" for k in range(first, last + 1)}

    def test_companion_lines_carry_the_numbers_of_their_checks(self):
        """Chapter 2 is numbered by Sphinx, in the order of the pages; the checks name the same numbers."""
        pages = [name for name in PAGES if name.startswith("book/renyi-distillation/")]
        equations = [equation for name in pages for equation in page(name).select("div.math[id]")]
        numbers = {e["id"]: e.select_one(".eqno").get_text().strip("()#¶ ") for e in equations}
        assert numbers == {f"equation-eq-2-{k}": f"2.{k}" for k in range(1, len(equations) + 1)}
        checked = {check.line for check in CHECKS if check.line.startswith("2.")}
        assert checked == set(numbers.values())

    def test_definitions_examples_and_figure_1_1(self):
        one, two = page("book/theory/knowledge-distillation"), page("book/theory/renyi-divergence")
        assert [len(html.select("div.definition")) for html in (one, two)] == [1, 1]
        assert "Definition 1 of the thesis" in one.select_one("div.definition").get_text()
        assert "Definition 2 of the thesis" in two.select_one("div.definition").get_text()
        assert [len(html.select("div.example")) for html in (one, two)] == [1, 1]
        assert "Fig. 1.1" in one.select_one("#fig-temperature-scaling figcaption").get_text()

    @pytest.mark.parametrize(("folder", "chapter"), [("theory", 1), ("renyi-distillation", 2)])
    def test_definitions_theorems_and_propositions_share_one_count(self, folder, chapter):
        """In chapter 1 that gives the thesis's definitions their numbers, 1 and 2; its examples have none."""
        pages = [page(name) for name in PAGES if name.startswith(f"book/{folder}/")]
        titles = [html.get_text() for each in pages for html in each.select("div.proof > p.admonition-title")]
        counted = [title for title in titles if not title.startswith("Example")]
        assert [title.split()[1] for title in counted] == [f"{chapter}.{k}" for k in range(1, len(counted) + 1)]
        assert {title.split()[0] for title in counted} == {"Definition", "Theorem", "Proposition"}
        if chapter == 1:
            assert ["of the thesis" in title for title in counted[:3]] == [True, True, False]

    @pytest.mark.parametrize("name", PAGES)
    def test_no_id_is_given_twice(self, name):
        ids = collections.Counter(tag["id"] for tag in page(name).find_all(id=True))
        assert not [one for one, count in ids.items() if count > 1]

    @pytest.mark.parametrize("name", PAGES)
    def test_links_inside_the_site_lead_somewhere(self, name):
        here = SITE / f"{name}.html"
        for link in page(name).select("article a[href]"):
            target, _, anchor = link["href"].partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            path = (here.parent / target).resolve() if target else here
            assert path.exists(), f"{name}: {link['href']}"
            if anchor and path.suffix == ".html":
                html = page(path.relative_to(SITE).with_suffix("").as_posix())
                assert html.find(id=anchor) or html.find(attrs={"name": anchor}), f"{name}: {link['href']}"

    @pytest.mark.parametrize("name", PAGES)
    def test_images_have_alt_text_and_captions(self, name):
        for image in page(name).select("article img"):
            assert len(image.get("alt", "")) > 30, f"{name}: {image.get('src')}"
            assert image.find_parent("figure").select_one("figcaption"), f"{name}: {image.get('src')}"

    def test_the_ledger_shows_every_line(self):
        rows = page("book/attachments/equation-ledger").select("table")[0].select("tbody tr")
        assert [row.td.get_text(strip=True) for row in rows] == [f"(1.{k})" for k in range(1, 34)]
        established = {row.select("td")[2].get_text(strip=True) for row in rows}
        assert established <= {"definition", "every n", "1 ≤ n ≤ 4", "numeric"}

    def test_the_ledger_shows_every_check(self):
        ledger = page("book/attachments/equation-ledger").get_text().replace("’", "'")
        assert len(CHECKS) > 150
        assert not [check.claim for check in CHECKS if check.claim not in ledger]

    def test_every_figure_is_listed(self):
        links = {link["href"].partition("#")[2] for link in page("book/figures-and-tables").select("article a[href]")}
        assert {cell.metadata.mystnb.figure.name for cell in FIGURES} <= links


class TestWords:
    """Glossary, notation and index are complete, and lead to the pages."""

    def test_each_word_is_explained_in_few_sentences_with_a_link(self):
        for meaning in page("book/glossary").select("dl.glossary > dd"):
            assert meaning.select("a[href*='.html']"), meaning.get_text()
            assert len(re.findall(r"[.?](?:\s|$)", meaning.get_text().replace("et al.", ""))) <= 5, meaning.get_text()

    def test_words_are_linked_where_they_first_matter(self):
        words = {term["id"] for term in page("book/glossary").select("dl.glossary > dt")}
        links = [link["href"] for name in PAGES for link in page(name).select("a[href*='#term-']")]
        used = {link.partition("#")[2] for link in links}
        assert used <= words
        assert {f"term-{word}" for word in ("teacher", "student", "logits", "temperature", "soft-targets")} <= used

    def test_each_symbol_is_on_the_page_of_notation(self):
        """Greek letters, operators, script and blackboard letters of every formula in the text."""
        greek = (
            "alpha beta gamma delta varepsilon eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi Psi nabla"
        )
        symbol = re.compile(
            r"\\(?:mathcal|mathbb|operatorname|mathbf)\s*\{?\s*[A-Za-z0-9]+|\\(?:"
            + "|".join(greek.split())
            + ")(?![a-z])"
        )

        def symbols(text):
            formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.DOTALL)
            return {re.sub(r"[{\s]", "", found) for formula in formulas for found in symbol.findall(formula)}

        known = symbols((ROOT / "book" / "notation.md").read_text(encoding="utf-8"))
        for path in NOTEBOOKS:
            cells = nbformat.read(path, as_version=4).cells
            text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
            assert symbols(text) <= known, path.stem

    def test_the_index_has_the_notions_and_is_in_the_table_of_contents(self):
        index = page("genindex")
        entries = [entry.get_text() for entry in index.select("table.genindextable li")]
        notions = [entry for entry in entries if not re.search(r"\(\)|\(in |attribute\)|\(class|Error|module", entry)]
        assert len(notions) >= 100
        assert page("book/index").select("nav a[href$='genindex.html']")


class TestReference:
    """The API page, written from docstrings; every docstring names the page that explains it, by number and title."""

    pointer = re.compile(r"(?:section )?([A\d][.\d]*),\s+\"([^\"]+)\"")

    @functools.cached_property
    def titles(self):
        """Number and title of every page, as its heading shows them, and the page's name."""
        headings = {name: page(name).select_one("article h1").get_text().strip(" #¶\n") for name in PAGES}
        return {re.sub(r"^([\d.]+)\. ", r"\1 ", heading): name for name, heading in headings.items()}

    def pages_named_by(self, thing):
        text = re.sub(r"\s+", " ", inspect.getdoc(thing) or "")
        named = re.search(r"(?:Explained in the book|Book): (.*)", text)
        return [f"{number} {title}" for number, title in self.pointer.findall(named[1])] if named else []

    @pytest.mark.parametrize("name", rkd.__all__)
    def test_public_names_and_their_pages_point_at_each_other(self, name):
        named = self.pages_named_by(getattr(rkd, name))
        assert named, f'{name}: its docstring needs a line such as: Book: 2.1.1, "The Objective".'
        entry = page("book/attachments/api").find(id=f"rkd.{name}").find_parent("dl")
        for heading in named:
            target = self.titles[heading]
            assert page(target).select(f"article a[href$='attachments/api.html#rkd.{name}']"), heading
            assert entry.select(f"a[href$='{target.removeprefix('book/')}.html']"), heading

    @pytest.mark.parametrize("name", MODULES)
    def test_modules_name_pages_that_exist(self, name):
        named = self.pages_named_by(importlib.import_module(f"rkd.{name}"))
        assert not [heading for heading in named if heading not in self.titles]

    def test_public_names_come_first(self):
        ids = [entry["id"] for entry in page("book/attachments/api").select("dt.sig[id]")]
        public = {f"rkd.{name}" for name in rkd.__all__}
        assert {entry for entry in ids[: len(public) + 1] if entry.count(".") == 1} == public


class TestNotebooks:
    def test_nothing_failed_and_nothing_warned(self):
        assert not [output for output in OUTPUTS if output.output_type == "error" or output.get("name") == "stderr"]

    @pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
    def test_stored_as_executed(self, path):
        notebook = nbformat.read(path, as_version=4)
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
        assert notebook.metadata == {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }

    def test_outputs_are_compared_except_one_picture(self):
        exempt = [cell for cell in CODE if set(cell.metadata.get("tags", ())) - {"hide-input"}]
        assert [cell.metadata.tags for cell in exempt] == [["nbval-ignore-output"]]
        assert "rounds differently on other processors" in exempt[0].source

    def test_experiments_fold_the_code_that_a_reader_can_skip(self):
        """Folded: imports, pictures, tables, checks and the numbers of the text; not a single line, not what prints."""
        methods = [path for path in NOTEBOOKS if path.parent.name == "renyi-distillation"]
        experiments = PAGES[PAGES.index("book/renyi-distillation/experiments") :]
        for path in methods:
            if path.relative_to(ROOT).with_suffix("").as_posix() not in experiments:
                continue
            code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
            for number, cell in enumerate(code):
                kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
                drawn = kinds & {"image/svg+xml", "text/markdown"}
                checks = re.search(r"\bassert |\bglue\(|\bsay\(", cell.source)
                silent = kinds <= {"application/papermill.record/text/plain"} and not any(
                    output.output_type == "stream" for output in cell.outputs
                )
                folded = bool(number == 0 or drawn or (checks and silent)) and "\n" in cell.source
                assert ("hide-input" in cell.metadata.get("tags", ())) == folded, f"{path.stem}: {cell.source}"

    def test_figures_have_caption_name_and_alt_text(self):
        for cell in FIGURES:
            described = cell.metadata.mystnb
            assert described.figure.caption.endswith(".")
            assert described.figure.name.startswith("fig-")
            assert len(described.image.alt) > 80

    def test_only_the_page_shows_what_it_does_not_know(self):
        """myst-nb's warning about unknown outputs is off, because of the checks: nothing else may hide behind that."""
        known = {"text/plain", "text/html", "text/latex", "text/markdown", "image/png", "image/svg+xml"}
        known |= {"application/papermill.record/text/plain", "application/vnd.rkd.check+json"}
        assert {kind for output in OUTPUTS for kind in output.get("data", {})} <= known

    def test_each_theorem_and_proposition_is_checked_before_the_next(self):
        statement = re.compile(r":::\{prf:(?:theorem|proposition)\}.*\n:label: (.*)")
        for path in NOTEBOOKS:
            unchecked = None
            for cell in nbformat.read(path, as_version=4).cells:
                if cell.cell_type == "markdown" and (found := statement.search(cell.source)):
                    assert unchecked is None, unchecked
                    unchecked = found[1]
                elif any("application/vnd.rkd.check+json" in o.get("data", {}) for o in cell.get("outputs", ())):
                    unchecked = None
            assert unchecked is None, unchecked

    def test_chapter_pages_say_what_they_teach_and_what_they_have_shown(self):
        for path in NOTEBOOKS:
            if path.parent.name in ("theory", "renyi-distillation"):
                cells = nbformat.read(path, as_version=4).cells
                assert "\n\nAfter this page you can\n- " in cells[0].source, path.stem
                assert "## What was shown\n\n- " in cells[-1].source, path.stem

    def test_cells_are_short(self):
        lengths = sorted(len([line for line in cell.source.splitlines() if line.strip()]) for cell in CODE)
        assert lengths[len(lengths) // 2] <= 6
        assert lengths[int(0.9 * len(lengths))] <= 15
        assert lengths[-1] <= 30


class TestReadme:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def test_commands_exist(self):
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        named = {
            name
            for pair in re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", self.text, re.MULTILINE)
            for name in pair
            if name
        }
        assert {"book", "test"} <= named <= targets

    def test_the_map_is_true(self):
        """Every path in the README's map exists, and every tracked file of the package is on it."""
        block = self.text.split("## Layout", 1)[1].split("```", 2)[1]
        paths, folder = set(), {}
        for line in block.splitlines()[1:]:
            depth, name = len(line) - len(line.lstrip()), line.split()[0]
            folder = {k: v for k, v in folder.items() if k < depth}
            full = "".join(folder.values()) + name
            if name.endswith("/"):
                folder[depth] = name
            paths.add(full)
            assert (ROOT / full).exists(), full
        assert {f"rkd/{module.name}" for module in (ROOT / "rkd").glob("[a-z]*.py")} <= paths

    def test_the_example_runs(self):
        code = re.search(r"```python\n(.*?)```", self.text, re.DOTALL)[1]
        scope = {}
        exec(compile(code, "README.md", "exec"), scope)
        assert scope["loss"].item() > 0
        assert len([line for line in code.splitlines() if line.strip()]) <= 10

    def test_the_picture_is_the_book_s(self):
        stored = [cell for cell in FIGURES if cell.metadata.mystnb.figure.name == "fig-first-distillation"]
        picture = (ROOT / "book" / "_static" / "first-distillation.svg").read_text(encoding="utf-8")
        assert "first-distillation.svg" in self.text
        assert [o.data["image/svg+xml"] for o in stored[0].outputs if "image/svg+xml" in o.get("data", {})] == [picture]

    def test_links_lead_somewhere(self):
        for target in re.findall(r"\]\(([^)#]+)\)", self.text):
            assert "://" in target or (ROOT / target).exists(), target


class TestPackaging:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def test_every_requirement_is_pinned(self):
        pins = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
        wanted = [*self.project["dependencies"], *itertools.chain(*self.project["optional-dependencies"].values())]
        assert {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted} <= pins
        assert "+" not in "".join(re.findall(r"==(\S+)", (ROOT / "requirements.txt").read_text()))

    def test_import_pulls_in_nothing_heavy(self):
        """`import rkd` needs NumPy and PyTorch alone; the rest is imported where it is used."""
        heavy = {"sklearn", "scipy", "matplotlib", "pandas", "IPython", "sympy", "mpmath"}
        code = "import torch, sys; before = set(sys.modules); import rkd; print(*(set(sys.modules) - before))"
        new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert not heavy & {name.split(".")[0] for name in new.split()}

    def test_notebook_files_are_plain_json(self):
        for path in NOTEBOOKS:
            text = path.read_text(encoding="utf-8")
            assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n", path
