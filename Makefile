# Two commands are enough, each alone on a fresh machine: `make serve` and `make test`.
BACKEND ?= SPARSE_FULL
PORT ?= 8000
MODEL ?= models/smollm2-135m-instruct
ARGS ?=
# Eager: ready in half a minute. `make serve COMPILE=1` compiles for two minutes first, once.
COMPILE ?=

.PHONY: help setup serve ray test check test-slow loadtest

help:
	@echo "make serve      set up once, then serve the demo model on 127.0.0.1:$(PORT)"
	@echo "                (BACKEND=SINK_WINDOW ARGS='--window-tokens 512' to choose a method)"
	@echo "make ray        the same model as two Ray replicas under TIDAL_DECODE, until Ctrl-C"
	@echo "make test       set up once, then run checks and the default test suite"
	@echo "make test-slow  the tests that the default suite leaves out"
	@echo "make loadtest   ten minutes of load on three servers, one after another (ARGS=... for others)"
	@echo "make check      ruff, mypy and import contracts only"
	@echo "make setup      only the set-up: .venv, CPU kernels, demo model"

setup:
	@bash scripts/setup.sh

serve: setup
	@.venv/bin/vllm-ext serve $(MODEL) --attention-backend $(BACKEND) --port $(PORT) \
		$(if $(COMPILE),,--enforce-eager) $(ARGS)

ray:
	@bash scripts/setup.sh ray
	@.venv/bin/python -m deploy.ray.local --port $(PORT) $(ARGS)

# Two files of tests at a time, in the order of their folders: the longest come first.
test: check
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	.venv/bin/python -m pytest -m slow

loadtest: setup
	@.venv/bin/python -m deploy.loadtest $(or $(ARGS),--start --small --port $(PORT))

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
