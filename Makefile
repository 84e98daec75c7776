# `make` lists the targets. Each does all the set-up it needs; the first run takes minutes.
#   PYTHON=python3.12 make setup      another interpreter
#   make test ARGS="-k parity -x"     arguments for the command a target runs

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Most tests wait for something: two at a time suit two cores; 0 runs them one by one, here.
JOBS ?= 2

STAMP := $(VENV)/.complete
BIN := $(VENV)/bin
RECIPE := kronos_stream/checkpoints/nano/recipe.toml

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench nano nano-eval parity-hub soak image image-check sbom audit deploy-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make or update the environment in .venv

# deploy/venv.sh touches the stamp last, so an interrupted set-up starts over.
$(STAMP): pyproject.toml constraints.txt deploy/venv.sh
	@PYTHON=$(PYTHON) deploy/venv.sh $(VENV)

demo: $(STAMP) ## Show forecasts flowing: exchange, daemon and broker on this machine (ARGS="--seconds 30")
	@$(BIN)/kronos-stream demo $(ARGS)

test: $(STAMP) ## Run the tests, except the soak; JOBS files at a time (ARGS="-k parity -x")
	$(BIN)/python -m pytest -m "not soak" --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(STAMP) ## Format the code and mend what can be mended mechanically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Measure this machine: the demo's latency, intake, forecasting speed (ARGS="--json")
	$(BIN)/kronos-stream demo --seconds 60 --json
	$(BIN)/kronos-stream bench --intake
	$(BIN)/kronos-stream bench $(ARGS)

nano: $(STAMP) ## Train the bundled model anew into build/nano (about an hour; resumes)
	$(BIN)/kronos-stream train tokenizer --recipe $(RECIPE) --table tokenizer-draft \
	  --threads 1 --out build/nano/draft
	$(BIN)/kronos-stream train tokenizer --recipe $(RECIPE) --init build/nano/draft \
	  --threads 1 --out build/nano/tokenizer
	$(BIN)/kronos-stream train predictor --recipe $(RECIPE) --tokenizer build/nano/tokenizer \
	  --threads 1 --out build/nano/predictor

nano-eval: $(STAMP) ## Score the bundled model on unseen generated markets (minutes)
	$(BIN)/kronos-stream evaluate generated --json build/nano-eval.json $(ARGS)

parity-hub: $(STAMP) ## Compare with the reference on the published checkpoints (needs the hub or its cache)
	$(BIN)/python -m pytest -m hub $(ARGS)

soak: $(STAMP) ## Run what takes long: faults by the hundred, kills, outages, load, memory (hours; ARGS="-k seeds")
	$(BIN)/python -m pytest -m soak -s $(ARGS)

image: ## Build the container image (VARIANT=cpu|cuda, ENGINE=docker|podman, ARGS for the build)
	@deploy/image/build.sh $(ARGS)

image-check: $(STAMP) ## Build it and look it over as it runs (ARGS for the build; gigabytes)
	@deploy/image/check.sh $(BIN) $(ARGS)

# Their tools stay out of the environment of make setup: they need as much again.
SUPPLY := build/supply
$(SUPPLY)/complete: $(STAMP) deploy/image/tools.txt
	@$(BIN)/python -m venv --clear $(SUPPLY)
	@$(SUPPLY)/bin/pip --quiet install -c constraints.txt -r deploy/image/tools.txt
	@touch $@

sbom: $(SUPPLY)/complete ## Write what the daemon runs on to build/sbom.json, in CycloneDX
	@$(SUPPLY)/bin/python deploy/image/sbom.py $(BIN)/python build/sbom.json

audit: $(SUPPLY)/complete ## Ask PyPI about known faults of the pinned versions
	@deploy/image/audit.sh $(SUPPLY)/bin/pip-audit $(ARGS)

deploy-check: $(STAMP) ## Check the Helm chart and the compose file (the first time builds helm: minutes)
	@PYTHON=$(BIN)/python deploy/kubernetes/tools.sh build/deploy
	KRONOS_REQUIRE_HELM=1 $(BIN)/python -m pytest tests/deploy/test_helm_chart.py tests/deploy/test_compose.py $(ARGS)

clean: ## Remove the environment and all caches
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kronos_stream tests -name __pycache__ -type d -prune -exec rm -rf {} +
