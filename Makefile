# What this is for: everything a person or a CI machine runs. `make demo` needs only Python 3.11 or 3.12 and make.
# Choose the interpreter with `make setup PYTHON=/path/to/python`, an accelerator with `make setup EXTRAS=cuda13`.

NEWEST = $(shell for name in python3.12 python3.11 python3 python; do \
  "$$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
  >/dev/null 2>&1 && echo "$$name" && break; done)
PYTHON ?= $(NEWEST)
EXTRAS ?=
VENV = .venv
BIN = $(VENV)/bin
VERSIONS = pyproject.toml constraints-py311.txt constraints-py312.txt

# Installs this checkout, editable, with the extras $(1), at the versions pinned for the interpreter's Python.
define install
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || test -n "$(PYTHON)" || \
	  { echo "packforcing needs Python 3.11 or 3.12 with venv; install one or give make PYTHON=/path/to/it." >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "Installing into $(VENV) ($$($(BIN)/python --version)); the first time takes a minute or two."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --prefer-binary --no-compile \
	  -c constraints-py$$($(BIN)/python -c 'import sys; print(*sys.version_info[:2], sep="")').txt \
	  -e '.$(if $(1),[$(1)])'
	@touch $(VENV)/.installed $@
endef

.PHONY: setup demo test test-slow fuzz verify-methods wheel-test browser-test serve docs docs-test methods ablations evidence overfit parity check format lint types h200 vbench-environment clean

setup: $(VENV)/.installed$(EXTRAS:%=-%)

$(VENV)/.installed: $(VERSIONS)
	$(call install,)

$(VENV)/.installed-%: $(VERSIONS)
	$(call install,$*)

demo: $(VENV)/.installed
	$(BIN)/packforcing sample --out out/demo.mp4

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
CASES = 1000
fuzz: $(VENV)/.installed-dev
	FUZZ_SEED=$(strip $(SEED)) FUZZ_CASES=$(CASES) $(BIN)/python -m pytest -rP tests/test_fuzz.py tests/test_fuzz_folders.py -k every_case

wheel-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m wheel tests/test_wheel.py

# The page of `serve` in a real browser: the system's, installed by apt where that may be. It also draws $(FIGURE), that
# of the docs by `make browser-test FIGURE=docs/figures/live.png`.
BROWSER_PROGRAM ?= $(shell command -v chromium-headless-shell || command -v chromium)
FIGURE = out/live.png
browser-test: $(VENV)/.installed-dev $(VENV)/.installed-browser
	@program="$(BROWSER_PROGRAM)"; \
	if test -z "$$program" && test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    chromium-headless-shell fonts-dejavu-core >/dev/null; \
	  program="$$(command -v chromium-headless-shell)"; \
	fi; \
	if test -z "$$program"; then \
	  echo "no browser is here and none can be installed, so the page is not tried; give BROWSER_PROGRAM=/path." >&2; \
	else \
	  mkdir -p out && BROWSER_PROGRAM="$$program" LIVE_FIGURE="$(FIGURE)" \
	    $(BIN)/python -m pytest -m browser tests/test_live_browser.py; \
	fi

serve: $(VENV)/.installed-web
	$(BIN)/packforcing serve

# What pdoc documents: it goes into a folder by itself, unless the folder's `__all__` lists no modules.
MODULES = import pkgutil, packforcing_jax as top; \
  found = [each.name for each in pkgutil.walk_packages(top.__path__, "packforcing_jax.")]; \
  print("packforcing_jax packforcing_jax.configs packforcing_jax.convert", \
  *(name for name in found if (name.count(".") == 1 or ".config." in name) and "__main__" not in name))

docs: $(VENV)/.installed-docs
	$(BIN)/python -m pdoc --output-directory out/docs $$($(BIN)/python -c '$(MODULES)')

docs-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m docs tests/test_docs.py

FILES = tests/golden/methods/*.safetensors
verify-methods: $(VENV)/.installed
	$(BIN)/packforcing verify $(FILES)

methods: $(VENV)/.installed
	$(BIN)/python -m benchmarks.methods --out out/methods

ablations: $(VENV)/.installed
	$(BIN)/python -m benchmarks.ablations

evidence: $(VENV)/.installed
	$(BIN)/python -m benchmarks.evidence

overfit: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.overfit --out runs/overfit

parity:
	@$(MAKE) setup VENV=$(VENV)-parity EXTRAS=dev,parity
	$(VENV)-parity/bin/python -m pytest -m parity tests/parity

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

check: lint types test

h200:
	@$(MAKE) setup VENV=$(VENV)-h200 EXTRAS=cuda13
	$(VENV)-h200/bin/python -m benchmarks.compile_for_h200

vbench-environment: $(VENV)/.installed
	$(BIN)/python -m packforcing_jax.evaluation.vbench_process $(VENV)-vbench

clean:
	rm -rf $(VENV) $(VENV)-h200 $(VENV)-parity $(VENV)-vbench out
