# The course's commands; `make help` lists them. On Windows use the pip lines of README.md.
#
#   make lab ARGS=--no-browser          options for the program that is started
#   make install PYTHON=python3.12      another interpreter than python3 (before .venv exists)

PYTHON := python3
VENV := .venv
ARGS :=

BIN := $(VENV)/bin
# For uv, in the environment of test-oldest alone.
RESOLUTION :=
# Stamps, so that only a change of pyproject.toml installs again. They hold this folder's path, for
# a .venv stops working when its folder moves; it is made anew then, or when its Python is gone.
COURSE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
MISSING := $(shell $(BIN)/python -c '' 2>/dev/null && \
  { test ! -e $(COURSE) || test "$$(cat $(COURSE))" = "$$(pwd -P)"; } || echo missing)

# The packages come from .venv alone, whatever this shell or a pip configuration says.
unexport PYTHONPATH PYTHONHOME
# Without bytecode on disk, each process compiles torch anew: three times as long to import it.
unexport PYTHONDONTWRITEBYTECODE
export PIP_USER := 0

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install lab demo doctor test quick gpu test-browser test-oldest suite notebooks missing

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(COURSE) ## create .venv and install the course

lab: $(COURSE) ## open the course in JupyterLab, in a copy of your own: my-work/
	@$(BIN)/minidora start
	@$(BIN)/minidora lab --folder my-work $(ARGS)

demo: $(COURSE) ## train, adapt with full fine-tuning, LoRA and DoRA, compare: under a minute
	$(BIN)/minidora demo $(ARGS)

doctor: $(COURSE) ## say whether the course can run here, and how to fix it where it cannot
	@$(BIN)/minidora doctor

test: $(DEV) ## every check: style, types, imports, tests, and every notebook run and compared
	$(static)
	$(suite)

quick: $(DEV) ## what to run while working: style, types, imports and the fast tests
	$(static)
	$(BIN)/python -m pytest -p no:nbval -n 2 --dist worksteal -m 'not slow'

gpu: $(DEV) ## measure layers and a LLaMA-7B on a CUDA GPU, in six minutes, into runs/gpu/
	$(BIN)/python -m minidora.evidence.gpu $(ARGS)

test-browser: $(DEV) ## every lesson in JupyterLab and Chromium; screenshots in build/browser/
	$(BIN)/python -m pytest -p no:nbval tests/browser $(ARGS)

test-oldest: ## tests and notebooks with the oldest versions that pyproject.toml allows
	$(MAKE) VENV=.venv-oldest RESOLUTION='--resolution lowest-direct' suite

suite: $(DEV)
	$(suite)

notebooks: $(DEV) ## execute every lesson anew and write it back, ready to commit
	$(BIN)/minidora notebooks execute $(ARGS)
	$(BIN)/minidora notebooks check $(ARGS)

$(COURSE): pyproject.toml $(MISSING)
	$(environment)
	$(call install,-e .)
	@pwd -P > $@

$(DEV): pyproject.toml $(MISSING)
	$(environment)
	$(call install,-e '.[dev]')
	@pwd -P | tee $(COURSE) > $@

# Style, types, and who may import whom.
define static
$(BIN)/python -m ruff check .
$(BIN)/python -m ruff format --check .
$(BIN)/python -m mypy
$(BIN)/lint-imports --no-logo
endef

# Nothing fails by the clock: a cell that has not ended after half an hour hangs.
define suite
$(BIN)/python -m pytest -p no:nbval -n 2 --dist worksteal
$(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env \
	--nbval-cell-timeout=1800 notebooks solutions
endef

# A new .venv where there is none that works, with what is missing said in words.
define environment
@test -z '$(MISSING)' || { \
  command -v '$(PYTHON)' >/dev/null || { \
    echo "There is no $(PYTHON) here. Install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv)," >&2; \
    echo "or name yours: make install PYTHON=/path/to/python" >&2; exit 1; }; \
  '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
    echo "minidora needs Python 3.11 or newer; $(PYTHON) is $$('$(PYTHON)' -c 'import platform; print(platform.python_version())')." >&2; \
    echo "Name a newer one: make install PYTHON=python3.12" >&2; exit 1; }; \
  '$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
    echo "$(PYTHON) cannot make virtual environments. Debian, Ubuntu: apt install python3-venv" >&2; exit 1; }; \
  echo "Making $(VENV) with $$('$(PYTHON)' --version)"; \
  '$(PYTHON)' -m venv --clear '$(VENV)'; \
}
endef

# uv installs about six times faster, but reads no pip configuration: where it fails, pip does it.
define install
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
@echo "Installing into $(VENV); on Linux about 6 GB, most of it torch with CUDA"
@$(BIN)/python -m pip install --quiet uv \
  && $(BIN)/python -m uv pip install --python $(BIN)/python $(RESOLUTION) $(1) \
  || { test -z '$(RESOLUTION)' || exit 1; echo "uv did not manage it, so pip does"; $(BIN)/python -m pip install $(1); }
endef
