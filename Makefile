# `make help` lists what can be made. Every target sets up what it needs: nothing has to be installed by hand.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
SITE   := _build/html
PORT   ?= 8000

# One processor thread, one hash seed, no dates: the same code then stores the same bytes everywhere.
export OMP_NUM_THREADS := 1
export PYTHONHASHSEED := 0
export SOURCE_DATE_EPOCH := 0
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NBVAL := $(BIN)/pytest --nbval --nbval-current-env -p no:cacheprovider -n 2 --dist loadscope -q book

.DEFAULT_GOAL := help
.PHONY: help setup book site test nbval portable notebooks lint format lock serve clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

test: site nbval  ## run all tests: the package, the built book, and every notebook against its stored outputs
	$(BIN)/pytest -n 2 -q

nbval: $(READY)  ## re-execute every notebook and compare with what is stored
	$(NBVAL)

portable: $(READY)  ## the same without the processor's vector instructions, as on another machine
	ATEN_CPU_CAPABILITY=default $(NBVAL)

notebooks: $(READY)  ## re-execute every notebook and store its outputs in place
	$(BIN)/python book/execute.py

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

serve: site  ## build the site and show it on a local port
	@echo "http://localhost:$(PORT)"
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory $(SITE)

clean:  ## remove what was built, and the environment
	rm -rf _build $(VENV) *.egg-info
