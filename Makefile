# Each target sets up what it needs in .venv, from locked versions, and is quick when that is done already.
# PYTHON=python3.12 chooses the interpreter; ARGS="..." goes to the program that a target runs.
# Written for GNU make 3.81 too, which is what macOS has.

VENV ?= .venv
BIN := $(VENV)/bin
SETUP := PYTHON="$(PYTHON)" sh scripts/setup.sh "$(VENV)"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo stack up down test lint types layers lockcheck check bench format reference dashboards lock clean _docker _run _dev _typing _bench

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: _run ## see a bus at work in this terminal: ARGS="--seconds 10"
	@$(BIN)/glassbus demo $(ARGS)

stack: _run ## the stack on this machine without Docker, and the demo watched by it: ARGS="--rate 50"
	@$(BIN)/python scripts/local_stack.py $(ARGS)

up: _docker ## the stack in Docker, with a broker; SMALL=1 leaves that out
	$(if $(SMALL),,COMPOSE_PROFILES=brokers GLASSBUS_DEMO_URL=nats://nats:4222/demo) docker compose up --build --detach --wait $(ARGS)
	@sed -n 's/^#   \(http.*\)/  \1/p' compose.yaml

down: _docker ## end it: ARGS="--volumes" removes its data too
	docker compose --profile brokers down $(ARGS)

test: _dev ## run the tests: ARGS="-k retry" for some
	@$(BIN)/python -m pytest $(ARGS)

setup: _dev ## make .venv ready for work

lint: _dev ## style: ruff check and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: _typing ## types: mypy strict on all, basedpyright on the public face
	@$(BIN)/mypy
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

layers: _dev ## layering: who may import whom
	@$(BIN)/lint-imports --no-cache # its cache does not notice a module that has come or gone

lockcheck: _dev ## whether the locks still fit what they were made from
	@$(BIN)/python scripts/lock.py --check

check: lint types layers lockcheck test ## all of the above, as CI does

format: _dev ## let ruff put things right
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: _bench ## measure against peers: ARGS="--help"
	@$(BIN)/python -m bench $(ARGS)

reference: _dev ## write docs/reference from the catalogue
	@$(BIN)/python scripts/telemetry_reference.py

dashboards: _dev ## write dashboards/json from dashboards/*.py
	@$(BIN)/python -m dashboards.build

lock: _dev ## lock dependencies again (needs Python 3.11): ARGS="--upgrade" for newer ones
	@$(BIN)/python scripts/lock.py $(ARGS)

clean: ## remove everything that can be made again
	rm -rf $(VENV) build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

_docker:
	@docker compose version >/dev/null 2>&1 || { \
	echo "This needs Docker with its compose plugin (https://docs.docker.com/compose/install); 'make stack' does without." >&2; \
	exit 1; }

_run:
	@$(SETUP) run build runtime

_dev:
	@$(SETUP) dev build runtime dev

_typing:
	@$(SETUP) typing build runtime dev typing

_bench:
	@$(SETUP) bench build runtime bench
