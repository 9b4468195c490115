# The two commands: `make run` (set up, start everything, stream an answer) and `make test` (set up, the tests that need no GPU; `make test-ci`
# has those that take minutes or containers).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CUDA machine that has torch already: make VENV_ARGS=--system-site-packages TORCH="torch>=2.11"
TORCH ?= torch==2.13.0
VENV_ARGS ?=
PROMPT ?= It was a dark night, and the old captain
# A file's tests stay in one process: what they share is made once, and some look back at those before them.
PYTEST_ARGS ?= -n auto --dist loadfile

.PHONY: run up test test-ci simulation mutations chaos chaos-short compose-test lint bench clean

PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --root-user-action=ignore

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	@echo "installing into $(VENV): torch and the stages, some minutes"
	@$(PIP) --upgrade pip
	@$(PIP) "$(TORCH)"
	@PYTHONWARNINGS=ignore $(PIP) -e ".[all]"
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "installing what tests need"
	@PYTHONWARNINGS=ignore $(PIP) -e ".[dev]"
	@touch $@

run: $(VENV)/.ready
	$(BIN)/gorgon run "$(PROMPT)"

up: $(VENV)/.ready
	$(BIN)/gorgon up

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.ready-dev lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# At least five minutes, 2,000 streams and 300 faults. GORGON_CHAOS_MODEL=demo: with the model that speculates.
chaos: $(VENV)/.ready-dev
	GORGON_CHAOS_SECONDS=$${GORGON_CHAOS_SECONDS:-300} GORGON_CHAOS_STREAMS=2000 GORGON_CHAOS_FAULTS=300 $(BIN)/python -m pytest -s -m chaos tests/chaos --durations 0

# What CI has time for: five minutes, however many streams and faults a slow machine gets done in them.
chaos-short: $(VENV)/.ready-dev
	GORGON_CHAOS_SECONDS=$${GORGON_CHAOS_SECONDS:-300} $(BIN)/python -m pytest -m chaos tests/chaos --durations 0

compose-test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m compose tests/compose

simulation: $(VENV)/.ready-dev
	GORGON_FOLD_SEEDS=10000 GORGON_SIM_SEEDS=$${GORGON_SIM_SEEDS:-10000} $(BIN)/python -m pytest tests/protocol/test_tokenlog.py tests/protocol/test_simulation.py -n 2 --dist loadfile --timeout 900 --durations 5

# The table in docs/reliability.md: what breaks without each rule of the fold.
mutations: $(VENV)/.ready-dev
	$(BIN)/python -m tests.protocol.mutations

test-ci: simulation chaos-short compose-test

bench: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/pipeline.py

clean:
	rm -rf data .pytest_cache .mypy_cache .ruff_cache
