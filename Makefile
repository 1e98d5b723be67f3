# `make help` lists what can be made. Every target sets up what it needs: nothing has to be installed by hand.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
SITE   := _build/html
PDF    := _build/pdf/book.pdf
LATEX  := texlive-xetex texlive-fonts-recommended latexmk fonts-dejavu-core
PORT   ?= 8000

# One processor thread, one hash seed, no dates: the same code then stores the same bytes everywhere.
export OMP_NUM_THREADS := 1
export PYTHONHASHSEED := 0
export SOURCE_DATE_EPOCH := 0
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NBVAL := $(BIN)/pytest --nbval --nbval-current-env -p no:cacheprovider -n 2 --dist loadscope -q book

.DEFAULT_GOAL := help
.PHONY: help setup book site pdf test nbval portable notebook notebooks screenshots lint format lock linkcheck serve clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv and install the pinned requirements

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "Python's venv module is missing. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

book: site  ## build the site into _build/html, warnings as errors
	@echo "The book is in $(SITE)/index.html; 'make serve' shows it at http://localhost:$(PORT)"

site: $(READY)
	$(BIN)/jupyter-book build --all -W -n --keep-going --quiet .

pdf: $(READY)  ## typeset the book into _build/pdf/book.pdf, with LaTeX
	@command -v latexmk > /dev/null && command -v xelatex > /dev/null \
		|| { echo "LaTeX is missing. On Debian and Ubuntu: apt-get install --no-install-recommends $(LATEX)"; exit 1; }
	$(BIN)/jupyter-book build --all -W -n --keep-going --quiet --builder latex --path-output $(dir $(PDF)) .
	cd $(dir $(PDF))_build/latex \
		&& latexmk -pdfxe -interaction=nonstopmode -halt-on-error -file-line-error -silent book.tex > latexmk.txt 2>&1 \
		|| { grep -A 8 '^[^ ]*:[0-9]*: ' book.log; echo "LaTeX failed. It needs all of $(LATEX)"; exit 1; }
	@cp $(dir $(PDF))_build/latex/book.pdf $(PDF)
	@echo "The book is in $(PDF)"

test: site nbval  ## run all tests: the package, the built book, and every notebook against its stored outputs
	$(BIN)/pytest -n 2 -q

nbval: $(READY)  ## re-execute every notebook and compare with what is stored
	$(NBVAL)

portable: $(READY)  ## the same without the processor's vector instructions, as on another machine
	ATEN_CPU_CAPABILITY=default $(NBVAL)

notebook: $(READY)  ## re-execute one, as in: make notebook PAGE=book/theory/renyi-divergence
	@test -f "$(PAGE).ipynb" || { echo "PAGE must name a notebook without its .ipynb, got '$(PAGE)'"; exit 1; }
	$(BIN)/pytest --nbval --nbval-current-env -p no:cacheprovider -q $(PAGE).ipynb

notebooks: $(READY)  ## re-execute every notebook and store its outputs in place
	$(BIN)/python book/execute.py

screenshots: site  ## picture every page at three widths in both themes, and measure loading, into _build/screenshots
	$(BIN)/python tests/browser/screenshots.py _build/screenshots

lint: $(READY)  ## formatting, rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## let ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:  ## pin anew what pyproject.toml asks for
	$(PYTHON) -m venv _build/lock
	_build/lock/bin/python -m pip install --quiet pip-tools
	_build/lock/bin/pip-compile --quiet --all-extras --strip-extras --allow-unsafe --no-header \
		--no-emit-index-url --no-emit-find-links --output-file requirements.txt pyproject.toml
	sed -i -e '1i # The exact lock of everything the book, the tests and the linters use (Python 3.11-3.13).' \
		-e '1i # Made by `make lock` from pyproject.toml; edit that file, not this one.' \
		-e '/^# The exact lock\|^# Made by/d' -e 's/^\(torch==[^+]*\)+cpu/\1/' \
		-e 's/^triton==[^ ]*$$/& ; platform_system == "Linux"/' requirements.txt

linkcheck: $(READY)  ## ask every outside address that the book links to whether it is there
	$(BIN)/jupyter-book build --all -n --keep-going --quiet --builder linkcheck --path-output _build/linkcheck .

serve: site  ## build the site and show it on a local port
	$(BIN)/python book/serve.py $(SITE) $(PORT)

clean:  ## remove what was built, and the environment
	rm -rf _build $(VENV) *.egg-info
