# AMI: make run starts the whole system on the simulated world, make test runs the tests.
# Both build what they need first, and are quick the second time.

SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROJECTS := shared/pyproject.toml $(wildcard services/*/pyproject.toml) requirements/constraints.txt requirements/dev.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROGRESS := sed -u -n -E 's/^(Collecting|Installing) ([^ ]*).*/      \1 \2/p'
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install run test check format prove prove-cartpole prove-curiosity bench bench-learning bench-half-hour bench-streams bench-snapshots bench-saving bench-growth bench-keys test-hosts audit soak docker-test mlflow clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP)  ## make the virtual environment and install everything into it

$(STAMP): $(PROJECTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12 …")'
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@echo "  1/2 torch and tools" && set -o pipefail && $(PIP) install -c requirements/constraints.txt -r requirements/dev.txt | $(PROGRESS)
	@echo "  2/2 AMI" && set -o pipefail && $(PIP) install -c requirements/constraints.txt \
		-e './shared[torch]' -e './services/controller[tracker]' -e ./services/inference -e ./services/trainer -e ./services/world | $(PROGRESS)
	@touch $@
	@echo "installed"

run: install  ## start the whole system on the simulated world (ARGS="experiment=noise …")
	@$(BIN)/ami up $(ARGS)

test: install  ## run the tests (ARGS="-k name …")
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: install  ## linters and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy shared/src services/controller/src services/inference/src services/trainer/src services/world/src

format: install  ## format the code
	@$(BIN)/ruff check --fix --quiet . && $(BIN)/ruff format .

prove: install  ## the slow proofs: learning over minutes
	@$(BIN)/python -m pytest -m slow -s $(ARGS)

prove-cartpole: install  ## PPO across processes learns CartPole-v1, three seeds (a minute each)
	@$(BIN)/python benchmarks/prove_cartpole.py $(ARGS)

prove-curiosity: install  ## curiosity explores more than chance, three seeds (two hours and more)
	@$(BIN)/python benchmarks/prove_curiosity.py $(ARGS)

bench: install  ## tick lateness with and without training, beside a bare timer loop
	@$(BIN)/python benchmarks/tick_lateness.py $(ARGS)

bench-learning: install  ## speed of acting, of gradient steps, and of SConv, each beside its yardstick
	@for name in acting_speed gradient_steps sconv_speed; do $(BIN)/python benchmarks/$$name.py || exit; echo; done

bench-half-hour: install  ## half an hour of the whole system in real time: ticks, losses, learning, memory (ARGS="--minutes 5")
	@$(BIN)/python benchmarks/half_hour.py $(ARGS)

bench-streams: install  ## both streams and control beside raw TCP, memcpy, plain PUB/SUB, a bare REQ/REP and portal
	@$(PIP) install --quiet -r requirements/bench.txt
	@$(BIN)/python benchmarks/streams.py && echo && $(BIN)/python benchmarks/snapshots.py

bench-snapshots: install  ## parameters from ready to usable, in shared memory and over TCP, beside memcpy, raw TCP and portal
	@$(PIP) install --quiet -r requirements/bench.txt
	@$(BIN)/python benchmarks/snapshots.py $(ARGS)

bench-saving: install  ## what saving 2 GB costs the living: ticks, gradient steps, seconds to the commit
	@$(BIN)/python benchmarks/saving.py $(ARGS)

bench-growth: install  ## how the cost of both streams grows with records, trainers, bodies and parameters
	@$(BIN)/python benchmarks/growth.py $(ARGS)

bench-keys: install  ## what keys cost: records a second, snapshots, round trips, with and without
	@$(PIP) install --quiet -r requirements/bench.txt
	@$(BIN)/python benchmarks/keys_cost.py $(ARGS)

test-hosts: install  ## a system with keys on four hosts in network namespaces; as root
	@$(BIN)/python -m pytest -m slow -s tests/system/test_hosts.py tests/system/test_namespaces.py $(ARGS)

audit: install  ## known holes in the installed packages, by PyPI's records
	@test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/pip install --quiet pip-audit; }
	@$(VENV)-audit/bin/pip-audit --strict --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

soak: install  ## an hour at ten times real time with a kill every half minute (ARGS="--minutes 5")
	@$(BIN)/python benchmarks/soak.py $(ARGS)

docker-test: install  ## build the containers, run them, and see that everything flows
	@$(BIN)/python -m pytest -m docker -s tests/docker $(ARGS)

mlflow: MLFLOW_DIR = $(or $(RUN),$(patsubst %/state.json,%,$(shell ls -t runs/*/state.json runs/*/*/state.json 2>/dev/null | head -1)))
mlflow: install  ## open the learning record of the newest run (RUN=runs/simulated)
	@test -f "$(MLFLOW_DIR)/state.json" || { echo "no run yet: start one with make run, or name one with RUN=folder"; exit 1; }
	@$(BIN)/python -c 'import json, sys; run = json.load(open(sys.argv[1] + "/state.json"))["mlflow_run"]; \
	  print(f"\nits curves and pictures: http://127.0.0.1:5000/#/experiments/1/runs/{run}/model-metrics\n")' "$(MLFLOW_DIR)"
	@MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow server --backend-store-uri "sqlite:///$(abspath $(MLFLOW_DIR))/mlflow.db" --host 127.0.0.1 --port 5000

clean:  ## remove the virtual environment and caches (never runs/)
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache && find . -name __pycache__ -prune -exec rm -rf {} +
