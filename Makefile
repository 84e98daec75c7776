# `make` lists the targets. Each target sets up the environment; the first run takes minutes.
#   PYTHON=python3.12 make setup      another interpreter
#   make test ARGS="-k parity -x"     arguments for the command of a target

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Number of test processes; most tests wait, so two suit two cores. 0 runs them in this process.
JOBS ?= 2

STAMP := $(VENV)/.complete
BIN := $(VENV)/bin
RECIPE := kronos_stream/checkpoints/nano/recipe.toml

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench nano nano-eval parity-hub soak image image-check sbom audit deploy-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create or update the environment in .venv

# deploy/venv.sh touches the stamp last, so an interrupted set-up starts over.
$(STAMP): pyproject.toml constraints.txt deploy/venv.sh
	@PYTHON=$(PYTHON) deploy/venv.sh $(VENV)

demo: $(STAMP) ## Run the demo: exchange, daemon and broker on this machine (ARGS="--seconds 30")
	@$(BIN)/kronos-stream demo $(ARGS)

test: $(STAMP) ## Run the tests except the soak tests, JOBS files at a time (ARGS="-k parity -x")
	$(BIN)/python -m pytest -m "not soak" --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(STAMP) ## Format the code and apply automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Measure this machine: the demo's latency, intake, forecasting speed (ARGS="--json")
	$(BIN)/kronos-stream demo --seconds 60 --json
	$(BIN)/kronos-stream bench --intake
	$(BIN)/kronos-stream bench $(ARGS)

nano: $(STAMP) ## Train the bundled model in build/nano (about an hour; resumes)
	$(BIN)/kronos-stream train tokenizer --recipe $(RECIPE) --table tokenizer-draft \
	  --threads 1 --out build/nano/draft
	$(BIN)/kronos-stream train tokenizer --recipe $(RECIPE) --init build/nano/draft \
	  --threads 1 --out build/nano/tokenizer
	$(BIN)/kronos-stream train predictor --recipe $(RECIPE) --tokenizer build/nano/tokenizer \
	  --threads 1 --out build/nano/predictor

nano-eval: $(STAMP) ## Evaluate the bundled model on unseen generated markets (minutes)
	$(BIN)/kronos-stream evaluate generated --json build/nano-eval.json $(ARGS)

parity-hub: $(STAMP) ## Compare with the reference on the published checkpoints (needs the hub or its cache)
	$(BIN)/python -m pytest -m hub $(ARGS)

soak: $(STAMP) ## Run the long tests: hundreds of faults, kills, outages, load, memory (hours; ARGS="-k seeds")
	$(BIN)/python -m pytest -m soak -s $(ARGS)

image: ## Build the container image (VARIANT=cpu|cuda, ENGINE=docker|podman, ARGS for the build)
	@deploy/image/build.sh $(ARGS)

image-check: $(STAMP) ## Build the container image and test it (ARGS for the build; gigabytes)
	@deploy/image/check.sh $(BIN) $(ARGS)

# A separate environment, because these tools have as many dependencies as the project.
SUPPLY := build/supply
$(SUPPLY)/complete: $(STAMP) deploy/image/tools.txt
	@$(BIN)/python -m venv --clear $(SUPPLY)
	@$(SUPPLY)/bin/pip --quiet install -c constraints.txt -r deploy/image/tools.txt
	@touch $@

sbom: $(SUPPLY)/complete ## Write the bill of materials to build/sbom.json, in CycloneDX
	@$(SUPPLY)/bin/python deploy/image/sbom.py $(BIN)/python build/sbom.json

audit: $(SUPPLY)/complete ## Check the pinned versions for known vulnerabilities
	@deploy/image/audit.sh $(SUPPLY)/bin/pip-audit $(ARGS)

deploy-check: $(STAMP) ## Check the Helm chart and the compose file (the first time builds helm: minutes)
	@PYTHON=$(BIN)/python deploy/kubernetes/tools.sh build/deploy
	KRONOS_REQUIRE_HELM=1 $(BIN)/python -m pytest tests/deploy/test_helm_*.py tests/deploy/test_compose.py $(ARGS)

clean: ## Remove the environment and all caches
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kronos_stream tests -name __pycache__ -type d -prune -exec rm -rf {} +
