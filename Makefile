# Two commands do everything: `make explain` and `make test`. Each builds .venv by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PROMPT   := When Mary and John went to the store, John gave a drink to
CONTRAST := When Mary and John went to the store, Mary gave a drink to

.PHONY: explain test lint format docs web bench clean help

help:
	@echo "make explain   explain a sentence with the built-in model; writes report.html"
	@echo "make test      run all tests"
	@echo "make lint      ruff and pyright"
	@echo "make docs      rewrite the generated pages"
	@echo "make web       build the bundle of the elements from web/ (node 18 or newer)"
	@echo "make bench     run the benchmarks (quiet machine, some minutes)"

# torch goes first and alone: the constraints name the version that is tested.
$(VENV)/base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "underhood needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 explain"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

explain: $(VENV)/base
	@$(BIN)/underhood explain "$(PROMPT)" --vs "$(CONTRAST)" -o report.html

test: $(VENV)/dev
	@$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/base
	$(BIN)/python -m underhood.coverage
	$(BIN)/python scripts/view_schema.py
	$(BIN)/underhood organisms list --write
	$(BIN)/python benchmarks/report.py

web: $(VENV)/base
	$(BIN)/python scripts/build_web.py

bench: $(VENV)/dev
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/circuits.py
	$(BIN)/python benchmarks/relevance.py
	$(BIN)/python benchmarks/imports.py
	$(BIN)/python benchmarks/painting.py
	$(BIN)/python benchmarks/workbench.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
