# Two commands for a fresh machine: `make demo` and `make test`. Each creates the environment it needs.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= cpu,synth,export,docs,dev
DEMO ?= --out demo

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types secrets audit docs clean

demo: $(STAMP)
	$(BIN)/dmx demo $(DEMO)

# Two tests side by side: most wait for processes that they start.
test: lint types secrets audit
	$(BIN)/pytest -n 2 --dist loadscope

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# No password, key or token in what is committed.
secrets: $(STAMP)
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --no-verify --exclude-files '^(benchmarks/results|docs/pictures)/'

# Known vulnerabilities of what is installed; without a network it says so.
audit: $(STAMP)
	$(BIN)/python .ci/audit.py

# The checker sees an installed copy: in the repository's root every module would exist twice.
types: $(STAMP)
	rm -rf build
	$(BIN)/pip install -q --no-deps --no-build-isolation --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p dmx

# The pages of docs/ in build/docs, and no link in them that leads nowhere.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	$(BIN)/python docs/links.py build/docs

$(STAMP): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else "DMX wants Python 3.11 or 3.12, found " + sys.version.split()[0] + ": set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=68" wheel
	$(BIN)/pip install -q -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build demo *.egg-info
