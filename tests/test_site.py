"""The built site as a host would serve it: nothing from elsewhere, light pages, dates, licences, downloads."""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from sphinx.util.inventory import InventoryFile
from test_book import PAGES, ROOT, SITE, page

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
SETTINGS = CONFIG["sphinx"]["config"]
VENDOR = ROOT / "book" / "vendor"
BUILT = sorted(path.relative_to(SITE).with_suffix("").as_posix() for path in SITE.glob("[!_]*.html"))
EVERY = sorted({*PAGES, *BUILT} - {"index"})  # the front page only sends on to the introduction
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
FETCHING = {"stylesheet", "preload", "modulepreload", "icon", "manifest"}
MEGABYTE = 10**6
QUIET = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def fetched(name):
    """The addresses that a browser fetches when it opens a page, as they are written there."""
    html = page(name)
    found = [tag[key] for tag_name, key in FETCHED.items() for tag in html.find_all(tag_name, {key: True})]
    found += [link["href"] for link in html.find_all("link", href=True) if FETCHING & set(link.get("rel", ()))]
    return found + re.findall(r"url\(['\"]?([^'\")]+)", " ".join(tag["style"] for tag in html.select("[style]")))


def file_of(name, address):
    """The file behind an address on a page; one that starts with a slash counts from the site's root."""
    path = urlsplit(address).path
    return SITE / path.lstrip("/") if path.startswith("/") else (SITE / f"{name}.html").parent / path


def is_outside(address):
    return bool(urlsplit(address).netloc)


class TestOffline:
    @pytest.mark.parametrize("name", EVERY)
    def test_a_page_loads_what_lies_in_the_site(self, name):
        addresses = [address for address in fetched(name) if not address.startswith("data:")]
        assert len(addresses) > 10
        assert [address for address in addresses if is_outside(address)] == []
        assert [address for address in addresses if not file_of(name, address).is_file()] == []

    def test_style_sheets_load_nothing_from_elsewhere(self):
        sheets = list(SITE.rglob("*.css"))
        assert len(sheets) > 5
        for sheet in sheets:
            text = sheet.read_text(encoding="utf-8")
            for address in re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text):
                assert not is_outside("".join(address)), sheet

    @pytest.mark.parametrize("name", EVERY)
    def test_no_script_of_a_page_names_a_host_that_serves_scripts(self, name):
        for script in page(name).find_all("script"):
            assert not re.search(r"unpkg|jsdelivr|cdnjs|esm\.sh|googleapis|thebe", str(script)), str(script)[:200]

    def test_pages_with_formulas_load_the_vendored_mathjax_and_pages_without_do_not(self):
        assert "../../_static/mathjax/startup.js" in {
            a.partition("?")[0] for a in fetched("book/theory/renyi-divergence")
        }
        assert not [address for address in fetched("book/bibliography") if "mathjax" in address]

    def test_mathjax_finds_the_parts_that_it_is_told_to_load(self):
        parts = SETTINGS["mathjax3_config"]["loader"]["load"]
        assert "a11y/assistive-mml" in parts  # formulas that screen readers can read
        assert all((VENDOR / "mathjax" / f"{part}.js").exists() for part in parts)

    def test_mathjax_finds_what_formulas_may_ask_for(self):
        tex = (VENDOR / "mathjax" / "input" / "tex.js").read_text(encoding="utf-8")
        table = re.search(r"autoload:\(0,\w+\.expandable\)\(\{(.*?)\}\)", tex)[1]
        asked = set(re.findall(r"(\w+):\[", table))
        assert "boldsymbol" in asked
        assert {path.stem for path in (VENDOR / "mathjax" / "input" / "tex" / "extensions").glob("*.js")} == asked

    def test_vendored_files_are_as_they_were_published(self):
        listed = dict(line.split()[::-1] for line in (VENDOR / "sha256sum.txt").read_text().splitlines())
        found = {path for path in VENDOR.rglob("*") if path.is_file()} - {
            VENDOR / "README.md",
            VENDOR / "sha256sum.txt",
        }
        hashes = {f"./{path.relative_to(VENDOR).as_posix()}": hashlib.sha256(path.read_bytes()) for path in found}
        assert {name: digest.hexdigest() for name, digest in hashes.items()} == listed

    def test_every_vendored_folder_is_explained_and_licensed(self):
        readme = (VENDOR / "README.md").read_text(encoding="utf-8")
        for folder in (path for path in VENDOR.iterdir() if path.is_dir()):
            assert f"| `{folder.name}` |" in readme
            assert list(folder.glob("LICENSE*"))


class TestWeight:
    @pytest.mark.parametrize("name", EVERY)
    def test_first_load_is_below_three_megabytes(self, name):
        """Uncompressed, nothing cached, all pictures, and of MathJax all but the fonts, which depend on formulas."""
        files = {file_of(name, address).resolve() for address in fetched(name) if not address.startswith("data:")}
        files.add(SITE / f"{name}.html")
        files.add(SITE / "_static" / "vendor" / "fontawesome" / "webfonts" / "fa-solid-900.woff2")
        if any("mathjax" in path.parts for path in files):
            files |= {path for path in (SITE / "_static" / "mathjax").rglob("*.*") if "extensions" not in path.parts}
            files = {path for path in files if path.suffix != ".woff"}
        weight = sum(path.stat().st_size for path in files)
        assert 0.5 * MEGABYTE < weight < 3 * MEGABYTE

    def test_icons_are_loaded_once(self):
        """The theme has them in a font and, ten times as large, in a script."""
        assert (SITE / "_static" / "scripts" / "fontawesome.js").stat().st_size < 1000


def git(folder, *arguments, **environment):
    identity = {
        "GIT_AUTHOR_NAME": "A",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "A",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    environment = os.environ | identity | environment
    return subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True, **QUIET).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
class TestLastChanged:
    """Small sites in each state of a checkout. Warnings are errors, as in the book's own build."""

    CONF = (
        "import sys; sys.path.insert(0, {extensions!r}); extensions = ['last_changed']\n"
        "html_last_updated_fmt, suppress_warnings = {format!r}, {suppressed!r}\n"
    )

    @pytest.fixture
    def source(self, tmp_path):
        folder = tmp_path / "source"
        folder.mkdir()
        conf = self.CONF.format(
            extensions=str(ROOT / "book" / "_extensions"),
            format=SETTINGS["html_last_updated_fmt"],
            suppressed=[kind for kind in SETTINGS["suppress_warnings"] if kind.startswith("git.")],
        )
        (folder / "conf.py").write_text(conf)
        (folder / "index.rst").write_text("Start\n=====\n")
        return folder

    def commit(self, source):
        git(source, "init", "-q")
        git(source, "add", ".")
        git(source, "commit", "-qm", "first", GIT_AUTHOR_DATE="2020-01-02T03:04:05Z")

    def built(self, source, **environment):
        """The date on the page and whether its source can still be downloaded."""
        out = source.parent / "out"
        command = [sys.executable, "-m", "sphinx", "-W", "-E", "-q", str(source), str(out)]
        done = subprocess.run(command, env=os.environ | {"SOURCE_DATE_EPOCH": "0"} | environment, check=False, **QUIET)
        assert done.returncode == 0, done.stdout
        html = (out / "index.html").read_text(encoding="utf-8")
        date = re.search(r'last-update" content="([^"]*)|Last updated on ([\w ]+)', html)
        return date and (date[1] or date[2]), "_sources/index.rst" in html

    @pytest.fixture(autouse=True)
    def footer(self, source):
        """The plainest theme with a footer and a link to the source."""
        with (source / "conf.py").open("a") as file:
            file.write("html_theme = 'classic'\n")

    def test_the_date_is_the_commit_s_and_not_the_build_s(self, source):
        self.commit(source)
        assert self.built(source) == ("02 January 2020", True)

    def test_a_page_that_is_not_committed_has_no_date(self, source):
        self.commit(source)
        git(source, "rm", "-q", "--cached", "index.rst")
        git(source, "commit", "-qm", "second")
        assert self.built(source) == (None, True)

    def test_an_archive_has_no_dates(self, source):
        assert self.built(source, GIT_CEILING_DIRECTORIES=str(source.parent)) == (None, True)

    def test_a_shallow_clone_has_no_dates(self, source, tmp_path):
        self.commit(source)
        (source / "conf.py").write_text((source / "conf.py").read_text() + "# changed\n")
        git(source, "commit", "-qam", "second")
        git(tmp_path, "clone", "-q", "--depth", "1", f"file://{source}", "shallow")
        assert self.built(tmp_path / "shallow") == (None, True)

    def test_without_git_there_are_no_dates(self, source):
        self.commit(source)
        assert self.built(source, PATH="") == (None, True)

    def test_the_site_s_dates_are_those_of_its_pages(self):
        if git(ROOT, "rev-parse", "--is-shallow-repository").strip() != "false":
            pytest.skip("a shallow clone has no dates")
        dated = 0
        for name in set(PAGES) - {
            "book/attachments/api",
            "book/bibliography",
            "genindex",
        }:  # these change with what they are made from
            path = next(path for path in (ROOT / f"{name}.md", ROOT / f"{name}.ipynb") if path.exists())
            last = git(ROOT, "log", "-1", "--format=%ad", "--date=format-local:%d %B %Y", "--", str(path), TZ="UTC")
            shown = page(name).select_one("p.last-updated")
            assert (shown.get_text(strip=True) if shown else "") == (f"Last updated on {last.strip()}." if last else "")
            dated += bool(last)
        assert dated > 20


class TestLicences:
    @pytest.mark.parametrize("name", EVERY)
    def test_each_page_names_both_licences(self, name):
        links = {link.get_text(): link["href"] for link in page(name).select("footer a[href]")}
        assert "Creative Commons Attribution 4.0 International" in file_of(name, links["CC BY 4.0"]).read_text()
        assert file_of(name, links["MIT"]).read_text().startswith("MIT License")
        assert file_of(name, links["CITATION.cff"]).read_bytes() == (ROOT / "CITATION.cff").read_bytes()

    def test_the_citation_is_of_this_version(self):
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert {"cff-version", "message", "title", "authors"} <= set(citation)
        assert citation["version"] == project["version"]
        assert citation["license"] == ["MIT", "CC-BY-4.0"]
        assert citation["references"][0]["authors"] == [{"family-names": "Grätzer", "given-names": "Martin"}]


class TestNames:
    def inventory(self, path, address=""):
        with path.open("rb") as file:
            return InventoryFile.load(file, address, lambda base, rest: f"{base}{rest}")

    def test_other_books_can_refer_to_this_one(self):
        found = self.inventory(SITE / "objects.inv")
        assert "rkd.renyi_kd_loss" in found["py:function"]
        assert "rkd.DistillationLoss" in found["py:class"]
        assert set(found["std:doc"]) >= set(PAGES) - {"genindex"}

    def test_types_lead_to_the_documentation_of_their_projects(self):
        """All that is listed is used, and all types of other projects in signatures are listed."""
        listed = set()
        for address, path in SETTINGS["intersphinx_mapping"].values():
            listed |= {target[2] for kind in self.inventory(ROOT / path, address).values() for target in kind.values()}
        links = {link["href"] for link in page("book/attachments/api").select("dt.sig a.external[href]")}
        assert f"{SETTINGS['intersphinx_mapping']['torch'][0]}tensors.html#torch.Tensor" in links
        assert links == listed


class TestPreviews:
    def previews(self, name):
        text = (SITE / "_static" / "previews" / f"{name}.js").read_text(encoding="utf-8")
        return json.loads(text.removeprefix("window.previews = ").removesuffix(";\n"))

    def test_equations_theorems_figures_references_and_terms_are_shown(self):
        shown = {}
        for path in (SITE / "_static" / "previews").rglob("*.js"):
            shown |= self.previews(path.relative_to(SITE / "_static" / "previews").with_suffix("").as_posix())
        kinds = ('<div class="math', '<div class="proof', "<figure", '<div class="citation', "<dt")
        assert [kind for kind in kinds if not any(html.startswith(kind) for html in shown.values())] == []

    @pytest.mark.parametrize("name", PAGES)
    def test_what_a_page_shows_works_from_there(self, name):
        if not (SITE / "_static" / "previews" / f"{name}.js").exists():
            assert not page(name).select('article a.reference.internal[href*="#"]')
            return
        for html in self.previews(name).values():
            tree = BeautifulSoup(html, "html.parser")
            assert not tree.select("[id], a.headerlink")
            for address in [image["src"] for image in tree.find_all("img")] + [
                a["href"] for a in tree.find_all("a", href=True)
            ]:
                assert is_outside(address) or file_of(name, urldefrag(address).url).is_file(), address


class TestWrongAddress:
    def test_the_page_works_at_any_depth(self):
        addresses = [*fetched("404"), *(link["href"] for link in page("404").select("a[href]"))]
        inside = [address for address in addresses if not address.startswith(("#", "data:"))]
        assert len(inside) > 40
        assert [address for address in inside if not address.startswith("/")] == []

    def test_make_serve_shows_it(self):
        with runpy.run_path(str(ROOT / "book" / "serve.py"))["server"](SITE, 0) as running:
            threading.Thread(target=running.serve_forever, daemon=True).start()
            base = f"http://127.0.0.1:{running.server_port}"
            for address in ("/nothing", "/book/theory/deep/er.html"):
                with pytest.raises(urllib.error.HTTPError) as raised:
                    urllib.request.urlopen(base + address)
                assert raised.value.code == 404
                assert "There is no page at this address" in raised.value.read().decode()
                raised.value.close()
            with urllib.request.urlopen(f"{base}/book/index.html") as answer:
                assert answer.status == 200
            running.shutdown()


ADDRESSES = (
    '[project.urls]\nRepository = "https://github.com/someone/book"\nDocumentation = "https://some.where/book"\n'
)


@pytest.fixture(scope="module", params=[False, True], ids=["nowhere yet", "published"])
def small(request, tmp_path_factory):
    """A small book with the settings of this one, before and after it has an address and a PDF."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("_config.yml", "pyproject.toml", "LICENSE", "LICENSE-text", "CITATION.cff"):
        shutil.copy(ROOT / name, folder)
    for name in ("_extensions", "_static", "vendor", "inventories"):
        shutil.copytree(ROOT / "book" / name, folder / "book" / name)
    shutil.copy(ROOT / "book" / "references.bib", folder / "book")
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n- file: book/page\n")
    (folder / "book" / "index.md").write_text("# Start\n\nA start.\n")
    cells = [nbformat.v4.new_markdown_cell("# A page"), nbformat.v4.new_code_cell("1 + 1")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "book" / "page.ipynb")
    if request.param:
        with (folder / "pyproject.toml").open("a") as file:
            file.write(ADDRESSES)
        (folder / "_build" / "pdf").mkdir(parents=True)
        (folder / "_build" / "pdf" / "book.pdf").write_bytes(b"%PDF-1.5")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "--quiet", "."]
    done = subprocess.run(command, cwd=folder, check=False, **QUIET)
    assert done.returncode == 0, done.stdout
    return folder / "_build" / "html", request.param


class TestPublication:
    def read(self, site, name):
        return BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser")

    def test_launch_and_repository_buttons(self, small):
        site, published = small
        links = {link["href"] for link in self.read(site, "book/page").select(".article-header-buttons a[href]")}
        binder = "https://mybinder.org/v2/gh/someone/book/main?urlpath=lab/tree/book/page.ipynb"
        assert (binder in links, "https://github.com/someone/book" in links) == (published, published)
        assert [link for link in links if is_outside(link) and "someone" not in link] == []

    def test_canonical_address_and_social_preview(self, small):
        site, published = small
        html = self.read(site, "book/page")
        canonical = [link["href"] for link in html.select('link[rel="canonical"]')]
        tags = {tag["property"]: tag["content"] for tag in html.select('meta[property^="og:"]')}
        if not published:
            assert (canonical, tags) == ([], {})
            return
        assert canonical == [tags["og:url"]] == ["https://some.where/book/book/page.html"]
        assert tags["og:title"] == "1. A page" or tags["og:title"] == "A page"
        picture = site / tags["og:image"].removeprefix("https://some.where/book/")
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_the_pdf_is_offered_when_it_is_there(self, small):
        site, published = small
        assert (site / "book.pdf").exists() == published
        links = {link["href"] for link in self.read(site, "book/page").select(".article-header-buttons a[href]")}
        assert ("../book.pdf" in links) == published

    def test_the_404_page_starts_where_the_site_does(self, small):
        site, published = small
        start = self.read(site, "404").select_one("article p a[href]")["href"]
        assert start == ("/book/book/index.html" if published else "/book/index.html")

    def test_the_notebook_is_offered(self, small):
        site, _ = small
        links = {link["href"] for link in self.read(site, "book/page").select(".article-header-buttons a[href]")}
        assert "../_sources/book/page.ipynb" in links
        assert (site / "_sources" / "book" / "page.ipynb").read_bytes() == (
            site.parents[1] / "book" / "page.ipynb"
        ).read_bytes()


class TestElsewhere:
    def test_binder_installs_the_lock_and_the_package(self):
        lines = (ROOT / "binder" / "requirements.txt").read_text().splitlines()
        assert [line for line in lines if not line.startswith("#")] == ["-r ../requirements.txt"]
        version = (ROOT / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
        assert tuple(map(int, version.split("."))) >= (3, 11)
        script = ROOT / "binder" / "postBuild"
        assert os.access(script, os.X_OK)
        install = "--no-deps --no-build-isolation -e ."
        assert install in script.read_text()
        assert install in (ROOT / "Makefile").read_text()

    @pytest.mark.parametrize("name", [name for name in PAGES if (ROOT / f"{name}.ipynb").exists()])
    def test_the_downloaded_notebook_is_the_book_s(self, name):
        links = [link["href"] for link in page(name).select(".article-header-buttons a[href$='.ipynb']")]
        assert [file_of(name, link).read_bytes() for link in links] == [(ROOT / f"{name}.ipynb").read_bytes()]

    def test_one_notebook_runs_alone(self, tmp_path):
        """From a copy of what git has, with nothing else beside it."""
        name = "book/renyi-distillation/predictions.ipynb"
        for folder in ("rkd", "book"):
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "vendor"))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--nbval",
            "--nbval-current-env",
            "-p",
            "no:cacheprovider",
            "-q",
            name,
        ]
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": "0", "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | fixed, check=False, **QUIET)
        assert done.returncode == 0, done.stdout
